"""Pure: which hard caps a request is under, and what it costs at most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from shared.budgets.period import Period
from shared.inference.errors import ApiError, must_not_retry
from shared.messages import GenerateJob, JobQueueMessage

RESERVED_RETRY_S = 2
SILENT_RETRY_S = 2


@dataclass(frozen=True, slots=True)
class Cap:
    """A budget that refuses pay-per-token requests when it is spent; or a team's credit (scope `credit`)."""

    budget_id: str
    team_id: str
    scope: str
    scope_id: str
    period: Period


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """A price version, as billing publishes it."""

    model_type: str
    work_class: str
    prompt_nanousd: int
    completion_nanousd: int
    starts_unix_ms: int


def caps_on(caps: Iterable[Cap], job: JobQueueMessage) -> list[Cap]:
    """The caps that the job counts in. Only what is paid by the token counts: GPUs are paid by the minute."""
    if job.billing != "ppt":
        return []
    names = {
        "team": job.team_id,
        "resource": job.resource_id,
        "model": job.model.model_id,
        "key": job.key_id,
        "credit": job.team_id,
    }
    return [cap for cap in caps if cap.team_id == job.team_id and names[cap.scope] == cap.scope_id]


def worst_case_nanousd(job: JobQueueMessage, prices: Iterable[TokenPrice]) -> int | None:
    """What billing charges for the job if it gives all the tokens that it may; None while no price covers it.

    The price version is the last one that had started when the job was accepted, as billing chooses it.
    """
    started = [
        price
        for price in prices
        if (price.model_type, price.work_class) == (job.model_type, job.work_class)
        and price.starts_unix_ms <= job.accepted_unix_ms
    ]
    price = max(started, key=lambda each: each.starts_unix_ms, default=None)
    if price is None:
        return None
    completion_tokens = job.max_tokens * job.choices if isinstance(job, GenerateJob) else 0
    return job.input_token_count * price.prompt_nanousd + completion_tokens * price.completion_nanousd


def refusal_of_cap(cap: Cap, *, spent_up: bool) -> ApiError:
    """What a client is told whose request does not fit.

    1. It would not fit if nothing else ran -> no retry before the period ends, or the budget is raised, or money comes in.
    2. Requests that run have reserved what it needs, and may cost less -> to be tried again soon.
    """
    is_credit = cap.scope == "credit"
    budget = "the team's credit" if is_credit else f"the {cap.scope}'s budget of this {cap.period} (UTC)"
    code = "insufficient_credit" if is_credit else "budget_exceeded"
    if spent_up:  # 1
        message = f"Less is left of {budget} than this request may cost."
        return must_not_retry(ApiError(402, code, message))
    message = f"What is left of {budget} is reserved by requests that run."
    headers = {"x-should-retry": "true"}
    return ApiError(402, code, message, retry_after_s=RESERVED_RETRY_S, headers=headers)  # 2


def refusal_when_silent() -> ApiError:
    message = (
        "A budget applies to this request, and the service that knows what is left of it did not answer."
    )
    return ApiError(503, "billing_unavailable", message, retry_after_s=SILENT_RETRY_S)


def refusal_without_price(model_type: str) -> ApiError:
    message = f"A budget applies to this request, and the type '{model_type}' has no price to count it by."
    return must_not_retry(ApiError(409, "no_price", message))


def with_leases(
    jobs: Sequence[JobQueueMessage], lease_ids: Sequence[str], amounts: Sequence[int]
) -> list[JobQueueMessage]:
    """The jobs, saying what was reserved for them."""
    return [
        msgspec.structs.replace(job, lease_ids=list(lease_ids), reserved_nanousd=amount)
        for job, amount in zip(jobs, amounts, strict=True)
    ]
