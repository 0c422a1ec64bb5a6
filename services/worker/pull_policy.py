"""What the worker does next with the jobs it holds: which it claims, starts, pauses, which model it loads or evicts.

Pure: a snapshot in, a plan out; asked again after every event, so it never has to remember anything. Whose turn it is
on the device is decided in `model_turns.py`, who gets a place in the batch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.worker.model_turns import QUANTUM_S, plan_turns
from services.worker.pull_snapshot import ModelKey, RunningJob, Snapshot, WaitingJob

PASSED_OVER_S = 1.0
"""A job of several sequences that has waited that long has places kept for it as they become free."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, in this order: pause, start, claim, evict, load."""

    claim: list[str]
    begin_at_once: bool
    """Whether claimed jobs that were never delivered before may run while their claims are on the way."""
    start: list[str]
    load: list[ModelKey]
    evict: list[ModelKey]
    pause: list[str]
    no_room: list[ModelKey]
    """Models whose jobs have to be told that they cannot be served here."""


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

    1. Models come and go as `plan_turns` says; jobs of a model that goes are paused.
    2. A full batch makes room: batch work for live (`_yield_to_live`), else a crowd for who is starved (`_yield_to_starved`).
    3. Granted jobs first, retried ones before fresh ones: each starts if `may_start` and its model is ready.
    4. Held jobs are claimed, and paused ones go on, while places are free: first the one for which a crowd made room;
       then live before batch; among live ones the lane that was served the fewest tokens, then the longest wait. None while a
       retried job waits for its turn to run. What is claimed may begin at once where a first attempt may start. A job that
       needs more places than are free is passed over, but after `PASSED_OVER_S` nothing behind it is claimed until it fits.
    """
    turns = plan_turns(snapshot, model_memory_bytes)  # 1
    ready = {key for key, slot in snapshot.models.items() if slot.state == "ready"} - set(turns.evict)
    retried_waits = any(job.attempt > 1 for job in snapshot.waiting)
    running = [job for job in snapshot.running if job.job_id not in turns.pause]
    chosen: list[WaitingJob] = []
    pause = list(turns.pause)
    if not retried_waits:
        room, made_for = _yield_to_live(snapshot, running, ready, max_sequences), None  # 2
        starved = _find_starved(snapshot, running, ready)
        if not room and starved is not None:
            room = _yield_to_starved(snapshot, running, max_sequences, starved)
            made_for = starved if room else None
        pause += room
        running = [job for job in running if job.job_id not in room]
        chosen = _plan_places(snapshot, running, ready, max_sequences, made_for)  # 4
    attempts = [job.attempt for job in running]

    start: list[str] = []
    granted = [
        job for job in snapshot.waiting if job.attempt > 0 and not job.is_paused and job.model in ready
    ]
    for job in sorted(granted, key=lambda job: job.attempt == 1):  # 3
        if may_start(job.attempt, attempts, retried_waits and job.attempt == 1):
            start.append(job.job_id)
            attempts.append(job.attempt)

    begin_at_once = may_start(1, attempts, retried_waits)  # 4
    if begin_at_once:
        start += [job.job_id for job in chosen if job.is_paused]
    claim = [job.job_id for job in chosen if not job.is_paused]
    return Plan(claim, begin_at_once, start, turns.load, turns.evict, pause, turns.no_room)


def _taken(snapshot: Snapshot, running: Sequence[RunningJob]) -> int:
    """Places that are filled or spoken for."""
    taken = sum(job.sequences for job in running) + snapshot.claimed_sequences
    return taken + sum(job.sequences for job in snapshot.waiting if job.attempt > 0 and not job.is_paused)


def _may_take_place(job: WaitingJob, ready: set[ModelKey]) -> bool:
    is_open = job.is_paused or (job.attempt == 0 and job.claimable)
    return is_open and job.model in ready


def _find_starved(
    snapshot: Snapshot, running: Sequence[RunningJob], ready: set[ModelKey]
) -> WaitingJob | None:
    """The live job that has waited longest, `QUANTUM_S` or more, while no place is held by a job of its model."""
    served = {job.model for job in running}
    served |= {job.model for job in snapshot.waiting if job.attempt > 0 and not job.is_paused}
    starved = [
        job
        for job in snapshot.waiting
        if job.work_class == "live"
        and job.waited_s >= QUANTUM_S
        and job.model not in served
        and _may_take_place(job, ready)
    ]
    return max(starved, key=lambda job: job.waited_s, default=None)


def _plan_places(
    snapshot: Snapshot,
    running: Sequence[RunningJob],
    ready: set[ModelKey],
    max_sequences: int,
    made_for: WaitingJob | None,
) -> list[WaitingJob]:
    """Rule 4 of `plan`."""
    taken = _taken(snapshot, running)
    order = sorted(
        (job for job in snapshot.waiting if _may_take_place(job, ready)),
        key=lambda job: (
            job is not made_for,
            job.work_class == "batch",
            snapshot.lane_tokens.get(job.lane, 0),
            -job.waited_s,
        ),
    )
    chosen = []
    for job in order:
        # A job with more choices than the batch has places still runs, alone.
        if taken + job.sequences <= max_sequences or taken == 0:
            chosen.append(job)
            taken += job.sequences
        elif job.waited_s >= PASSED_OVER_S:
            break  # from now on places are kept for it
    return chosen


def _yield_to_live(
    snapshot: Snapshot, running: Sequence[RunningJob], ready: set[ModelKey], max_sequences: int
) -> list[str]:
    """Batch work that leaves, the youngest first, for each live job that finds no place, if that makes room enough.

    Jobs that were in a crash are left alone.
    """
    free = max_sequences - _taken(snapshot, running)
    live = [job for job in snapshot.waiting if job.work_class == "live" and _may_take_place(job, ready)]
    pause: list[str] = []
    batch = [job for job in running if job.work_class == "batch" and job.attempt == 1]
    batch.sort(key=lambda job: -job.ran_s)
    for job in live:
        if free + sum(each.sequences for each in batch) < job.sequences:
            break
        while free < job.sequences:
            youngest = batch.pop()
            pause.append(youngest.job_id)
            free += youngest.sequences
        free -= job.sequences
    return pause


def _yield_to_starved(
    snapshot: Snapshot, running: Sequence[RunningJob], max_sequences: int, starved: WaitingJob
) -> list[str]:
    """The youngest jobs of the model with the most sequences, as few as make room enough for the starved job.

    One of them always stays, nobody leaves for nothing, and jobs that were in a crash are left alone.
    """
    jobs_of: dict[ModelKey, list[RunningJob]] = {}
    for job in running:
        if job.attempt == 1:
            jobs_of.setdefault(job.model, []).append(job)
    crowd = max(jobs_of.values(), key=lambda jobs: sum(job.sequences for job in jobs), default=[])
    free = max_sequences - _taken(snapshot, running)
    pause: list[str] = []
    for job in sorted(crowd, key=lambda job: job.ran_s)[:-1]:
        if free >= starved.sequences:
            break
        pause.append(job.job_id)
        free += job.sequences
    return pause if free >= starved.sequences else []
