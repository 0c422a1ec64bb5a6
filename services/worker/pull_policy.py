"""What the worker does next with the jobs it holds: which it claims and starts, which model it loads or evicts.

Pure: a snapshot in, a plan out; asked again after every event, so it never has to remember anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

CLOSE_AFTER_S = 1.0
"""A model that must go for a waiting one takes no new jobs after this long: its quantum is over."""
PASSED_OVER_S = 1.0
"""A job of several sequences that has waited that long has places kept for it as they become free."""

ModelKey = tuple[str, int]
"""(model id, revision): a job names its revision and never gets another."""


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job that is not running: held (attempt 0), or granted and not yet started."""

    job_id: str
    model: ModelKey
    work_class: Literal["live", "batch"]
    sequences: int
    waited_s: float
    lane: int = 0
    """Queue it came from; on a shared pool the lanes take turns by tokens."""
    attempt: int = 0
    claimable: bool = True
    """False while its claim is out, or while its owner does not answer."""


@dataclass(frozen=True, slots=True)
class RunningJob:
    job_id: str
    model: ModelKey
    sequences: int
    attempt: int


@dataclass(frozen=True, slots=True)
class ModelSlot:
    """A model on the device."""

    state: Literal["loading", "ready", "evicting"]
    weight_bytes: int
    last_used_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    waiting: Sequence[WaitingJob]
    """Oldest first."""
    running: Sequence[RunningJob]
    claimed_sequences: int
    """Sequences of jobs whose claim is out: their places are spoken for."""
    models: Mapping[ModelKey, ModelSlot]
    sizes: Mapping[ModelKey, int]
    """Weight bytes of the models that waiting jobs name; a model that is missing here cannot be loaded."""
    lane_tokens: Mapping[int, int] = field(default_factory=dict)
    """Tokens that each lane was served so far."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now."""

    claim: list[str]
    begin_at_once: bool
    """Whether claimed jobs that were never delivered before may run while their claims are on the way."""
    start: list[str]
    load: list[ModelKey]
    evict: list[ModelKey]


def may_start(attempt: int, running_attempts: Sequence[int], retried_waits: bool) -> bool:
    """Whether a granted job may run beside what runs. A job that was in a crash runs apart from fresh ones.

    1. Nothing runs -> yes.
    2. A first attempt joins first attempts, unless a retried job waits for them to end.
    3. A second attempt joins second attempts: all of them were in the same crash, one of them may have caused it.
    4. A third attempt runs alone: after its crash, the next claim is refused as poison, and nobody else was hurt.
    """
    if not running_attempts:  # 1
        return True
    if attempt == 1:  # 2
        return not retried_waits and all(other == 1 for other in running_attempts)
    return attempt == 2 and all(other == 2 for other in running_attempts)  # 3, 4


def plan(snapshot: Snapshot, *, max_sequences: int, model_memory_bytes: int) -> Plan:
    """Decide the next moves.

    1. Granted jobs first, retried ones before fresh ones: each starts if `may_start` and its model is ready.
    2. Held jobs are claimed while places are free: live before batch; among live ones the lane that was served the
       fewest tokens, then the longest wait. Nothing is claimed while a retried job waits for its turn to run. What is
       claimed may begin at once where a first attempt may start. A job that needs more places than are free is passed
       over, but after `PASSED_OVER_S` nothing behind it is claimed until it fits.
    3. A held job whose model is absent asks for it: loaded if the memory allows, else the least recently used model
       without work goes first. One load at a time, oldest job first.
    4. If every resident model has work and the job has waited `CLOSE_AFTER_S`, the least recently used of them is
       closed: its held jobs are not claimed, so that it runs out of work and can go.
    """
    retried_waits = any(job.attempt > 1 for job in snapshot.waiting)
    running_attempts = [job.attempt for job in snapshot.running]
    ready = {key for key, slot in snapshot.models.items() if slot.state == "ready"}

    start: list[str] = []
    granted = [job for job in snapshot.waiting if job.attempt > 0 and job.model in ready]
    for job in sorted(granted, key=lambda job: job.attempt == 1):  # 1
        if may_start(job.attempt, running_attempts, retried_waits and job.attempt == 1):
            start.append(job.job_id)
            running_attempts.append(job.attempt)

    load, evict, closed = _plan_models(snapshot, model_memory_bytes)  # 3, 4
    claim = [] if retried_waits else _plan_claims(snapshot, ready - closed - set(evict), max_sequences)  # 2
    begin_at_once = may_start(1, running_attempts, retried_waits)  # 2
    return Plan(claim, begin_at_once, start, load, evict)


def _plan_claims(snapshot: Snapshot, usable: set[ModelKey], max_sequences: int) -> list[str]:
    taken = sum(job.sequences for job in snapshot.running) + snapshot.claimed_sequences
    taken += sum(job.sequences for job in snapshot.waiting if job.attempt > 0)
    order = sorted(
        (job for job in snapshot.waiting if job.attempt == 0 and job.claimable and job.model in usable),
        key=lambda job: (job.work_class == "batch", snapshot.lane_tokens.get(job.lane, 0), -job.waited_s),
    )
    claim = []
    for job in order:
        # A job with more choices than the batch has places still runs, alone.
        if taken + job.sequences <= max_sequences or taken == 0:
            claim.append(job.job_id)
            taken += job.sequences
        elif job.waited_s >= PASSED_OVER_S:
            break  # from now on places are kept for it
    return claim


def _plan_models(
    snapshot: Snapshot, budget_bytes: int
) -> tuple[list[ModelKey], list[ModelKey], set[ModelKey]]:
    if any(slot.state != "ready" for slot in snapshot.models.values()):
        return [], [], set()
    wanted = next(
        (job for job in snapshot.waiting if job.model not in snapshot.models and job.model in snapshot.sizes),
        None,
    )
    if wanted is None:
        return [], [], set()
    need = (
        snapshot.sizes[wanted.model]
        + sum(slot.weight_bytes for slot in snapshot.models.values())
        - budget_bytes
    )
    if need <= 0 or not snapshot.models:
        return [wanted.model], [], set()
    busy = {job.model for job in snapshot.running} | {
        job.model for job in snapshot.waiting if job.attempt > 0
    }
    busy |= {job.model for job in snapshot.waiting if not job.claimable}
    by_use = sorted(snapshot.models, key=lambda key: snapshot.models[key].last_used_s)
    idle = [key for key in by_use if key not in busy]
    if idle:
        return [], idle[:1], set()
    if wanted.waited_s < CLOSE_AFTER_S:
        return [], [], set()
    return [], [], set(by_use[:1])
