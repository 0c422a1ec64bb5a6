"""The owner's half of the job protocol: who may run a job, which tokens count, and when it is over.

An owner (a gateway for a live request, the batch service for a line) holds its jobs in memory while they run and alone
decides between workers. The broker's delivery is only a hint: an unacked message is no lock, a confirmed one may come
twice. Everything here is synchronous and takes the time as an argument; `OwnedJob` turns each event into a list of
actions, and the service around it carries them out.

    queued --claim--> running --finish--> succeeded | failed | cancelled
       \\________________\\______deadline______________________> expired
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from shared import topology
from shared.messages import (
    CancelJob,
    ChoiceResult,
    Drop,
    FinishedReport,
    GenerateJob,
    Granted,
    JobClaimed,
    JobFinished,
    JobQueueMessage,
    Message,
    Outcome,
    RepeatTokens,
    Timings,
    TokenDelta,
    TokenLogprob,
)

MAX_ATTEMPTS = 3
"""Attempt 4 is not granted: the job is poison. Attempt 3 runs alone, so an innocent neighbour never gets there."""

HOLDER_SILENCE_S = 2.0
"""Workers beat once a second: after two silent ones the holder is dead, frozen or cut off, and may be replaced."""

LOST_SILENCE_S = 8.0
"""No word from a holder and no new claim: the message itself is lost, so the owner publishes the job again."""

UNKNOWN_PUBLISH_S = 1.0
"""A job whose publish was never confirmed is published again once the owner's connection is up this long: if it was in
the queue after all, the second copy's claim is refused."""

REPEAT_INTERVAL_S = 0.5
"""At most one request per choice and interval to repeat missing tokens."""


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to the worker's command queue."""

    queue: str
    message: Message


@dataclass(frozen=True, slots=True)
class Deliver:
    """New tokens of one choice, in order and each exactly once."""

    choice: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class End:
    """The job is over; nothing follows."""

    outcome: Outcome
    error_code: str | None
    error_message: str | None
    timings: Timings
    prompt_logprobs: tuple[TokenLogprob, ...]
    by_worker: bool
    """Whether a worker's granted finish ended it. If not, the owner must leave a void for billing."""
    embeddings: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Republish:
    """Put the job into its queue again: its message is lost, or may be."""


Action = Send | Deliver | End | Republish


@dataclass(slots=True)
class _Holder:
    worker_id: str
    queue: str
    last_word_s: float


@dataclass(slots=True)
class _Choice:
    tokens: list[int] = field(default_factory=list)
    chars: int = 0
    logprobs: int = 0
    finish_reason: str | None = None
    granted_chars: int = 0
    granted_logprobs: int = 0
    repeat_asked_s: float = -1e9


@dataclass(frozen=True, slots=True)
class Grant:
    attempt: int


RefusalReason = Literal["unknown", "finished", "cancelled", "expired", "running_elsewhere", "poison"]


@dataclass(frozen=True, slots=True)
class Refuse:
    reason: RefusalReason


@dataclass(frozen=True, slots=True)
class Hold:
    """Answer later: it is not yet known whether the present holder still lives."""


def decide_claim(
    *,
    state: JobState,
    attempt: int,
    holder_worker_id: str | None,
    holder_last_word_s: float,
    claimant_worker_id: str,
    claimed_s: float,
    now_s: float,
    deadline_s: float,
) -> Grant | Refuse | Hold:
    """Decide what a worker's claim gets. Pure; times are seconds on the owner's monotonic clock.

    1. The job is over -> refuse, saying how.
    2. Its deadline has passed -> refuse.
    3. The claimant holds it already (its message came again) -> the same attempt once more.
    4. Another worker holds it and has spoken since the claim came -> refuse: it is running elsewhere.
    5. Another worker holds it and was heard less than `HOLDER_SILENCE_S` ago -> hold the answer.
    6. All attempts are used -> refuse as poison.
    7. Otherwise -> the next attempt; whoever held it is fenced out by the attempt's number.
    """
    if state in TERMINAL:  # 1
        return Refuse(
            "cancelled"
            if state is JobState.CANCELLED
            else "expired"
            if state is JobState.EXPIRED
            else "finished"
        )
    if now_s >= deadline_s:  # 2
        return Refuse("expired")
    if holder_worker_id == claimant_worker_id:  # 3
        return Grant(attempt)
    if holder_worker_id is not None:
        # Deltas sent before the holder died may still arrive just after the claim, hence the margin.
        if holder_last_word_s > claimed_s + HOLDER_SILENCE_S / 4:  # 4
            return Refuse("running_elsewhere")
        if now_s - holder_last_word_s < HOLDER_SILENCE_S:  # 5
            return Hold()
    if attempt >= MAX_ATTEMPTS:  # 6
        return Refuse("poison")
    return Grant(attempt + 1)  # 7


class OwnedJob:
    """One job as its owner sees it. Not thread-safe; every method returns what must be done now."""

    def __init__(self, job: JobQueueMessage, *, deadline_s: float, now_s: float) -> None:
        """deadline_s, now_s: seconds on the owner's monotonic clock."""
        self.job = job
        self.state = JobState.QUEUED
        self.attempt = 0
        self.deadline_s = deadline_s
        self.publish_confirmed = True
        """Set to False by the owner when the broker's confirm did not come, and back when one did."""
        self._holder: _Holder | None = None
        # A job without an answer has no choices: it is over when its worker says so.
        self._choices = [_Choice() for _ in range(job.choices if isinstance(job, GenerateJob) else 0)]
        self._waiting: dict[str, tuple[JobClaimed, float]] = {}
        self._last_activity_s = now_s
        self.report: FinishedReport | None = None
        """Set once a worker's finish ended the job: what billing must hear of it, from whichever worker."""

    @property
    def over(self) -> bool:
        return self.state in TERMINAL

    @property
    def holder_queue(self) -> str | None:
        """The command queue of the worker that runs the job now."""
        return self._holder.queue if self._holder and not self.over else None

    @property
    def tokens(self) -> list[list[int]]:
        """Accepted tokens of each choice."""
        return [list(choice.tokens) for choice in self._choices]

    @property
    def finish_reasons(self) -> tuple[str | None, ...]:
        return tuple(choice.finish_reason for choice in self._choices)

    def on_claim(self, claim: JobClaimed, now_s: float) -> list[Action]:
        """A worker asks to run the job; the answer may come later, from `on_tick`."""
        self._waiting[claim.worker_id] = (claim, now_s)
        return self._answer_claims(now_s)

    def _answer_claims(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        for worker_id, (claim, claimed_s) in list(self._waiting.items()):
            decision = decide_claim(
                state=self.state,
                attempt=self.attempt,
                holder_worker_id=self._holder.worker_id if self._holder else None,
                holder_last_word_s=self._holder.last_word_s if self._holder else 0.0,
                claimant_worker_id=worker_id,
                claimed_s=claimed_s,
                now_s=now_s,
                deadline_s=self.deadline_s,
            )
            match decision:
                case Hold():
                    continue
                case Grant(attempt):
                    actions += self._grant(claim, attempt, now_s)
                case Refuse(reason):
                    actions.append(self._drop(claim, reason))
                    if reason == "poison":
                        message = f"the job ended {MAX_ATTEMPTS} workers before it ended itself"
                        actions += self._end(JobState.FAILED, "poison", message)
            self._waiting.pop(worker_id, None)
        return actions

    def _grant(self, claim: JobClaimed, attempt: int, now_s: float) -> list[Action]:
        actions: list[Action] = []
        if attempt > self.attempt:
            if self._holder is not None:
                fence = CancelJob(job_id=self.job.job_id, attempt=self.attempt, reason="replaced")
                actions.append(Send(self._holder.queue, fence))
            for choice in self._choices:
                choice.granted_chars = choice.chars
                choice.granted_logprobs = choice.logprobs
        self.attempt = attempt
        self.state = JobState.RUNNING
        self._holder = _Holder(claim.worker_id, claim.worker_queue, now_s)
        self._last_activity_s = now_s
        grant = Granted(
            job_id=self.job.job_id, claim_id=claim.claim_id, attempt=attempt, prior_tokens=self.tokens
        )
        return [*actions, Send(claim.worker_queue, grant)]

    def _drop(self, claim: JobClaimed, reason: RefusalReason) -> Send:
        drop = Drop(job_id=self.job.job_id, claim_id=claim.claim_id, reason=reason, report=self.report)
        return Send(claim.worker_queue, drop)

    def _adopt(self, worker_id: str, attempt: int, now_s: float) -> None:
        """The first word on a job that nobody holds is as good as a claim: its grant follows when the claim comes."""
        if self.state is JobState.QUEUED and attempt == 1 and now_s < self.deadline_s:
            self.state = JobState.RUNNING
            self.attempt = 1
            self._holder = _Holder(worker_id, topology.worker_commands(worker_id).name, now_s)

    def on_beat(self, worker_id: str, attempt: int, now_s: float) -> list[Action]:
        """The holder says that it still has the job."""
        if self._holds(worker_id, attempt):
            self._heard(now_s)
        return self._answer_claims(now_s) if self._waiting else []

    def on_delta(self, worker_id: str, delta: TokenDelta, now_s: float) -> list[Action]:
        """Take new tokens from the granted attempt, by index: doubles are ignored, gaps are asked for."""
        self._adopt(worker_id, delta.attempt, now_s)
        if (
            self.over
            or not self._holds(worker_id, delta.attempt)
            or not 0 <= delta.choice < len(self._choices)
        ):
            return []
        self._heard(now_s)
        choice = self._choices[delta.choice]
        have = len(choice.tokens)
        if delta.token_start > have:
            if now_s - choice.repeat_asked_s < REPEAT_INTERVAL_S or self._holder is None:
                return []
            choice.repeat_asked_s = now_s
            ask = RepeatTokens(
                job_id=self.job.job_id, attempt=self.attempt, choice=delta.choice, token_start=have
            )
            return [Send(self._holder.queue, ask)]
        if delta.token_start < have or choice.finish_reason is not None:
            return []
        return [
            self._accept(choice, delta.choice, delta.tokens, delta.text, delta.logprobs, delta.finish_reason)
        ]

    def _accept(
        self,
        choice: _Choice,
        index: int,
        tokens: Sequence[int],
        text: str,
        logprobs: Sequence[TokenLogprob],
        finish_reason: str | None,
    ) -> Deliver:
        choice.tokens.extend(tokens)
        choice.chars += len(text)
        choice.logprobs += len(logprobs)
        choice.finish_reason = finish_reason
        return Deliver(index, tuple(tokens), text, tuple(logprobs), finish_reason)

    def on_finished(self, finished: JobFinished, now_s: float) -> list[Action]:
        """The granted attempt ended: deliver what is still missing, then end. Older attempts are ignored."""
        # Attempt 0 is the dead-letter consumer's word: no worker could take the message at all.
        dead_letter = finished.attempt == 0 and self.state is JobState.QUEUED
        self._adopt(finished.worker_id, finished.attempt, now_s)
        if self.over or not (dead_letter or self._holds(finished.worker_id, finished.attempt)):
            return []
        actions: list[Action] = [
            rest for result in finished.choices if (rest := self._mend(result)) is not None
        ]
        self.state = JobState(finished.outcome)
        if not dead_letter:
            completion_tokens = sum(len(choice.tokens) for choice in self._choices)
            self.report = FinishedReport(
                attempt=self.attempt,
                outcome=finished.outcome,
                completion_tokens=completion_tokens,
                error_code=finished.error_code,
            )
        actions.append(
            End(
                finished.outcome,
                finished.error_code,
                finished.error_message,
                finished.timings,
                tuple(finished.prompt_logprobs),
                by_worker=not dead_letter,
                embeddings=tuple(finished.embeddings),
            )
        )
        return actions + self._drop_waiting()

    def _mend(self, result: ChoiceResult) -> Deliver | None:
        if not 0 <= result.index < len(self._choices):
            return None
        choice = self._choices[result.index]
        if choice.finish_reason is not None:
            return None
        missing_text = result.text[choice.chars - choice.granted_chars :]
        missing_tokens = result.tokens[len(choice.tokens) :]
        missing_logprobs = result.logprobs[choice.logprobs - choice.granted_logprobs :]
        if not missing_text and not missing_tokens and result.finish_reason is None:
            return None
        return self._accept(
            choice, result.index, missing_tokens, missing_text, missing_logprobs, result.finish_reason
        )

    def on_tick(self, now_s: float, connected_for_s: float) -> list[Action]:
        """Answer held claims, end at the deadline, notice a message that is lost or never arrived.

        connected_for_s: how long the owner's own connection is up; its own silence says nothing about workers.
        """
        if self.over:
            return []
        if now_s >= self.deadline_s:
            return self.give_up("expired", "deadline_exceeded", "the deadline passed", now_s)
        actions = self._answer_claims(now_s)
        silent_s = min(now_s - self._last_activity_s, connected_for_s)
        if self.state is JobState.RUNNING and silent_s > LOST_SILENCE_S:
            self._last_activity_s = now_s
            actions.append(Republish())
        unknown = self.state is JobState.QUEUED and not self.publish_confirmed
        if unknown and connected_for_s > UNKNOWN_PUBLISH_S:
            actions.append(Republish())
        return actions

    def give_up(self, outcome: Outcome, code: str | None, message: str | None, now_s: float) -> list[Action]:
        """End the job by the owner's own will: client gone, deadline, resource off. Idempotent."""
        if self.over:
            return []
        actions: list[Action] = []
        if self._holder is not None:
            cancel = CancelJob(job_id=self.job.job_id, attempt=self.attempt, reason=code or outcome)
            actions.append(Send(self._holder.queue, cancel))
        return actions + self._end(JobState(outcome), code, message) + self._drop_waiting()

    def _end(self, state: JobState, code: str | None, message: str | None) -> list[Action]:
        self.state = state
        return [End(state.value, code, message, Timings(), (), by_worker=False)]  # type: ignore[arg-type]

    def _drop_waiting(self) -> list[Action]:
        drops: list[Action] = [self._drop(claim, "finished") for claim, _ in self._waiting.values()]
        self._waiting.clear()
        return drops

    def _holds(self, worker_id: str, attempt: int) -> bool:
        return self._holder is not None and self._holder.worker_id == worker_id and self.attempt == attempt

    def _heard(self, now_s: float) -> None:
        if self._holder is not None:
            self._holder.last_word_s = now_s
        self._last_activity_s = now_s
