"""Pure: what all known facts about one job amount to. Knows tokens and outcomes, neither prices nor the database.

The result depends on the set of facts alone: their order of arrival, repeats and delays change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.billing.instants import MAX_UNIX_MS
from shared.messages import JobUsage, JobVoided, Outcome, UsageEvent

MAX_TOKENS = 2**31 - 1


class BadFact(ValueError):
    """The fact cannot be true: a negative count, a time out of range."""


class FactsDisagree(ValueError):
    """Facts about one job name different teams, ways of billing or price lists: somebody is wrong, so nobody pays."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What is known of a job, and the tokens that its team pays for if the job is billed per token."""

    source: JobUsage | JobVoided
    """The deciding fact: it names team, model, class and time of acceptance."""
    usage: JobUsage | None
    """The deciding worker's fact, with the timings, if one arrived."""
    outcome: Outcome
    error_code: str | None
    prompt_tokens: int
    delivered_tokens: int
    billable_prompt_tokens: int
    billable_completion_tokens: int
    finished_unix_ms: int

    @property
    def attempt(self) -> int:
        """The attempt that ended the job; 0 when no worker reported one."""
        return self.usage.attempt if self.usage is not None else 0


def check_fact(fact: UsageEvent) -> None:
    """Refuse what no gateway or worker can truthfully say. Raises `BadFact`."""
    counts = {"prompt_tokens": fact.prompt_tokens, "revision": fact.revision}
    times: dict[str, int | None] = {"accepted_unix_ms": fact.accepted_unix_ms}
    if isinstance(fact, JobUsage):
        counts |= {"completion_tokens": fact.completion_tokens, "attempt": fact.attempt}
        times |= {"finished_unix_ms": fact.finished_unix_ms, "first_token_unix_ms": fact.first_token_unix_ms}
    else:
        counts |= {"delivered_tokens": fact.delivered_tokens}
        times |= {"voided_unix_ms": fact.voided_unix_ms}
    for name, count in counts.items():
        if not 0 <= count <= MAX_TOKENS:
            raise BadFact(f"{name} is out of range")
    for name, unix_ms in times.items():
        if unix_ms is not None and not 0 <= unix_ms <= MAX_UNIX_MS:
            raise BadFact(f"{name} is out of range")


def settle(facts: Iterable[UsageEvent]) -> Settlement:
    """Decide how a job ended and what is billable of it. Raises `FactsDisagree`; needs at least one fact.

    1. All facts must be about one job, team, way of billing, model type and class.
    2. Of several workers' facts the highest attempt decides: the owner granted it last, an older one is a zombie's.
       Twice the same attempt should not be; then what costs the team least decides.
    3. A gateway's word corrects any worker's. Of several (should not be) again the one that costs the team least.
    4. Voided, client gone -> cancelled: the tokens delivered, and the prompt if anything was delivered; else what the worker
       says it read of the prompt (of an embedding job's inputs maybe a part).
    5. Voided at the deadline -> expired: nothing.
    6. Voided because it failed or was never published -> failed: nothing.
    7. Succeeded -> prompt and completion.
    8. Cancelled -> the tokens published, and the prompt if prefill ran.
    9. Failed or expired -> nothing.
    """
    known = list(facts)
    _check_agreement(known)  # 1
    usages = [fact for fact in known if isinstance(fact, JobUsage)]
    voids = [fact for fact in known if isinstance(fact, JobVoided)]
    usage = _deciding_usage(usages)  # 2
    if voids:
        return _from_void(min(voids, key=_void_cost), usage)  # 3
    assert usage is not None  # _check_agreement refused an empty list
    return _from_usage(usage)


def _check_agreement(facts: Sequence[UsageEvent]) -> None:
    subjects = {(f.job_id, f.team_id, f.billing, f.model_type, f.work_class) for f in facts}
    if len(subjects) != 1:
        raise FactsDisagree(f"{len(subjects)} different subjects in the facts of one job")


def _deciding_usage(usages: Sequence[JobUsage]) -> JobUsage | None:
    def rank(usage: JobUsage) -> tuple[int, int, int, str]:
        prompt, completion = _billable_of_usage(usage)
        return (-usage.attempt, completion, prompt, usage.event_id)

    return min(usages, key=rank, default=None)


def _void_cost(void: JobVoided) -> tuple[int, int, str]:
    free = void.reason != "client_gone"
    return (0 if free else 1, void.delivered_tokens, void.event_id)


def _billable_of_usage(usage: JobUsage) -> tuple[int, int]:
    if usage.outcome == "succeeded":  # 7
        return usage.prompt_tokens, usage.completion_tokens
    if usage.outcome == "cancelled":  # 8
        return usage.prompt_tokens if usage.prefill_ran else 0, usage.completion_tokens
    return 0, 0  # 9


def _from_usage(usage: JobUsage) -> Settlement:
    prompt, completion = _billable_of_usage(usage)
    return Settlement(
        source=usage,
        usage=usage,
        outcome=usage.outcome,
        error_code=usage.error_code,
        prompt_tokens=usage.prompt_tokens,
        delivered_tokens=usage.completion_tokens,
        billable_prompt_tokens=prompt,
        billable_completion_tokens=completion,
        finished_unix_ms=usage.finished_unix_ms,
    )


def _from_void(void: JobVoided, usage: JobUsage | None) -> Settlement:
    outcome: Outcome
    prompt, completion = 0, 0
    if void.reason == "client_gone":  # 4
        outcome = "cancelled"
        completion = void.delivered_tokens
        if void.delivered_tokens > 0:
            prompt = void.prompt_tokens
        elif usage is not None and usage.prefill_ran:
            prompt = min(void.prompt_tokens, usage.prompt_tokens)
    elif void.reason == "deadline":  # 5
        outcome = "expired"
    else:  # 6
        outcome = "failed"
    return Settlement(
        source=void,
        usage=usage,
        outcome=outcome,
        error_code=void.error_code,
        prompt_tokens=void.prompt_tokens,
        delivered_tokens=void.delivered_tokens,
        billable_prompt_tokens=prompt,
        billable_completion_tokens=completion,
        finished_unix_ms=void.voided_unix_ms,
    )
