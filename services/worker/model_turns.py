"""Whose turn it is on the device: which model the worker loads next, which it evicts, and which jobs give way for that.

Pure. A job that could run waits for its first token no longer than the sum over the models ahead of it, and its own,
of (swap + `QUANTUM_S`), plus 2 s; a test runs these rules through a thousand random schedules and holds each job to it.
Ahead are the models that had work of its class or a better one when it came, or within `OVERTAKE_S` after; each counts
once. What the bound leaves out: a full batch (places, not models), and jobs that were in a crash, which run apart.

A job whose model must go is paused: its sequences leave the engine, and later it goes on from the tokens it has, which
the engine computes again as it does for a job that comes from a dead worker. To keep the keys and values instead would
need a second owner of KV blocks and room that the next model wants; computing a second's tokens again takes a fraction
of that second, since a prompt is computed many tokens at once. A pause costs no attempt, and since each turn lasts a
quantum at least, every paused job gets on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.worker.pull_snapshot import ModelKey, Snapshot, WaitingJob

QUANTUM_S = 1.0
"""A model with live work keeps its place on the device for that long, whoever waits."""
OVERTAKE_S = 1.0
"""Among models whose oldest jobs came within this time, the one that brings most for its swap goes first."""
UNKNOWN_SWAP_S = 1.0


@dataclass(frozen=True, slots=True)
class Turns:
    load: list[ModelKey] = field(default_factory=list)
    evict: list[ModelKey] = field(default_factory=list)
    pause: list[str] = field(default_factory=list)
    """Running jobs of models in `evict`."""


def plan_turns(snapshot: Snapshot, budget_bytes: int) -> Turns:
    """Decide the next swap.

    1. One swap at a time: nothing while a model is loading or evicting. Loading runs beside the answers of others.
    2. The next model is an absent one that a waiting job names: `choose_next`.
    3. If the memory allows, it is loaded at once; also one above the whole budget, into an empty device.
    4. Else others make room, as few as do, in this order: those without any work, the least recently used first; for a
       live job, those with batch work only; those whose quantum is over, the longest turn first. Their jobs are paused.
    5. A model that runs a job which was in a crash stays: such a job is left alone.
    6. If those do not make room enough, nobody goes yet: a model is never evicted for nothing.
    """
    if any(slot.state != "ready" for slot in snapshot.models.values()):  # 1
        return Turns()
    wanted = choose_next(snapshot)  # 2
    if wanted is None:
        return Turns()
    key = wanted.model
    resident_bytes = sum(slot.weight_bytes for slot in snapshot.models.values())
    need_bytes = snapshot.sizes[key] + resident_bytes - budget_bytes
    if need_bytes <= 0 or resident_bytes == 0:  # 3
        return Turns(load=[key])
    evict: list[ModelKey] = []
    for victim in _victims(snapshot, for_live=wanted.work_class == "live"):  # 4
        evict.append(victim)
        need_bytes -= snapshot.models[victim].weight_bytes
        if need_bytes <= 0:
            break
    leaves_empty = len(evict) == sum(slot.weight_bytes > 0 for slot in snapshot.models.values())
    if need_bytes > 0 and not leaves_empty:  # 6
        return Turns()
    return Turns(evict=evict, pause=[job.job_id for job in snapshot.running if job.model in evict])


def choose_next(snapshot: Snapshot) -> WaitingJob | None:
    """The job whose model is loaded next, or None. A job whose owner does not answer asks for nothing.

    1. A model that somebody waits for with a live request goes before one that only batch work names.
    2. The model whose oldest job waits longest; but among those whose oldest came within `OVERTAKE_S` of that one, the
       model with the most waiting sequences for each second of its swap. So jobs ABCABC run as AABBCC, and nobody is
       overtaken by who came much later.
    """
    oldest: dict[ModelKey, WaitingJob] = {}
    sequences: dict[ModelKey, int] = {}
    for job in snapshot.waiting:
        asks = job.claimable or job.attempt > 0
        if not asks or job.model in snapshot.models or job.model not in snapshot.sizes:
            continue
        sequences[job.model] = sequences.get(job.model, 0) + job.sequences
        first = oldest.setdefault(job.model, job)
        if (job.work_class == "live", job.waited_s) > (first.work_class == "live", first.waited_s):
            oldest[job.model] = job
    if not oldest:
        return None
    is_live = any(job.work_class == "live" for job in oldest.values())  # 1
    rivals = [job for job in oldest.values() if (job.work_class == "live") is is_live]
    longest_s = max(job.waited_s for job in rivals)

    def benefit(job: WaitingJob) -> float:
        return sequences[job.model] / max(snapshot.swap_s.get(job.model, UNKNOWN_SWAP_S), 1e-3)

    near = [job for job in rivals if job.waited_s > longest_s - OVERTAKE_S]  # 2
    return max(near, key=lambda job: (benefit(job), job.waited_s))


def _victims(snapshot: Snapshot, *, for_live: bool) -> Iterable[ModelKey]:
    """Rules 4 and 5 of `plan_turns`."""
    with_work = {job.model for job in snapshot.running} | {job.model for job in snapshot.waiting}
    with_live = {job.model for job in snapshot.running if job.work_class == "live"}
    with_live |= {job.model for job in snapshot.waiting if job.work_class == "live"}
    left_alone = {job.model for job in snapshot.running if job.attempt > 1}
    ranked: list[tuple[int, float, ModelKey]] = []
    for key, slot in snapshot.models.items():
        if slot.weight_bytes == 0 or key in left_alone:
            continue
        if key not in with_work:
            ranked.append((0, slot.last_used_s, key))
        elif for_live and key not in with_live:
            ranked.append((1, -slot.turn_s, key))
        elif slot.turn_s >= QUANTUM_S and (for_live or key not in with_live):
            ranked.append((2, -slot.turn_s, key))
    return [key for _, _, key in sorted(ranked)]
