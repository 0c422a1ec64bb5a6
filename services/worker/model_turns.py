"""Whose turn it is on the device: which model the worker loads next, which it evicts, and which jobs give way for that.

Pure. A job that could run waits for its first token no longer than the sum over the models ahead of it, and its own,
of (swap + `QUANTUM_S`), plus 2 s; a test runs these rules through a thousand random schedules and holds each job to it.
Ahead are the models that had work of its class or a better one when it came, or within `OVERTAKE_S` after; each counts
once; so do pinned models that are not here yet. What the bound leaves out: a full batch (places, not models), and jobs that were in a crash, which run apart.

A job whose model must go is paused: its sequences leave the engine, and later it goes on from the tokens it has, which
the engine computes again as it does for a job that comes from a dead worker. To keep the keys and values instead would
need a second owner of KV blocks and room that the next model wants; computing a second's tokens again takes a fraction
of that second, since a prompt is computed many tokens at once. A pause costs no attempt, and since each turn lasts a
quantum at least, every paused job gets on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.worker.pull_snapshot import ModelKey, Preload, Snapshot, WorkClass

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
    no_room: list[ModelKey] = field(default_factory=list)
    """Models with waiting jobs that no swap can bring here: what is pinned leaves too little memory."""


@dataclass(frozen=True, slots=True)
class Wish:
    """An absent model that is wanted here: by its oldest waiting job, or by a pin."""

    model: ModelKey
    work_class: WorkClass
    waited_s: float
    sequences: int


def plan_turns(snapshot: Snapshot, budget_bytes: int) -> Turns:
    """Decide the next swap.

    1. One swap at a time: nothing while a model is loading or evicting. Loading runs beside the answers of others.
    2. The next model is an absent one that a waiting job or a pin names: `choose_next`. When there is none and no job
       waits at all, it is the first preload that is absent.
    3. If the memory allows, it is loaded at once; also one above the whole budget, into an empty device.
    4. Else others make room, as few as do, in this order: those without any work, the least recently used first; for a
       live job or a pin, those with batch work only; those whose quantum is over, the longest turn first. Their jobs are
       paused. For a preload only those without work go, and only if it may evict.
    5. A model that runs a job which was in a crash stays: such a job is left alone. A pinned model stays.
    6. If those do not make room enough, nobody goes yet: a model is never evicted for nothing.
    7. A model that does not fit beside the pinned ones that are here is not waited for: `no_room` names it.
    """
    no_room = [key for key in _named(snapshot) if not _fits(snapshot, key, budget_bytes)]  # 7
    if any(slot.state != "ready" for slot in snapshot.models.values()):  # 1
        return Turns(no_room=no_room)
    wish = choose_next(snapshot, budget_bytes)  # 2
    if wish is not None:
        return _make_room(snapshot, wish.model, _victims(snapshot, wish), budget_bytes, no_room)
    preload = None if snapshot.waiting else _next_preload(snapshot, budget_bytes)
    if preload is not None:
        victims = _without_work(snapshot) if preload.may_evict else []
        return _make_room(snapshot, preload.model, victims, budget_bytes, no_room)
    return Turns(no_room=no_room)


def _make_room(
    snapshot: Snapshot, key: ModelKey, victims: Iterable[ModelKey], budget_bytes: int, no_room: list[ModelKey]
) -> Turns:
    """Rules 3 to 6 of `plan_turns`."""
    resident_bytes = sum(slot.weight_bytes for slot in snapshot.models.values())
    need_bytes = snapshot.sizes[key] + resident_bytes - budget_bytes
    if need_bytes <= 0 or resident_bytes == 0:  # 3
        return Turns(load=[key], no_room=no_room)
    evict: list[ModelKey] = []
    for victim in victims:  # 4
        evict.append(victim)
        need_bytes -= snapshot.models[victim].weight_bytes
        if need_bytes <= 0:
            break
    leaves_empty = len(evict) == sum(slot.weight_bytes > 0 for slot in snapshot.models.values())
    if need_bytes > 0 and not leaves_empty:  # 6
        return Turns(no_room=no_room)
    pause = [job.job_id for job in snapshot.running if job.model in evict]
    return Turns(evict=evict, pause=pause, no_room=no_room)


def choose_next(snapshot: Snapshot, budget_bytes: int) -> Wish | None:
    """The model that is loaded next, or None. A job whose owner does not answer asks for nothing.

    1. A model that somebody waits for with a live request goes before one that only batch work names. An absent model
       that is pinned counts as one with a live request, which has waited since it was pinned.
    2. The model whose oldest job waits longest; but among those whose oldest came within `OVERTAKE_S` of that one, the
       model with the most waiting sequences for each second of its swap. So jobs ABCABC run as AABBCC, and nobody is
       overtaken by who came much later.
    3. One that does not fit beside the pinned models is not chosen.
    """
    oldest: dict[ModelKey, Wish] = {}
    wishes = [
        Wish(job.model, job.work_class, job.waited_s, job.sequences)
        for job in snapshot.waiting
        if job.claimable or job.attempt > 0
    ]
    wishes += [Wish(key, "live", pinned_s, 1) for key, pinned_s in snapshot.pinned.items()]
    sequences: dict[ModelKey, int] = {}
    for wish in wishes:
        is_absent = wish.model not in snapshot.models and wish.model in snapshot.sizes
        if not is_absent or not _fits(snapshot, wish.model, budget_bytes):  # 3
            continue
        sequences[wish.model] = sequences.get(wish.model, 0) + wish.sequences
        first = oldest.setdefault(wish.model, wish)
        if (wish.work_class == "live", wish.waited_s) > (first.work_class == "live", first.waited_s):
            oldest[wish.model] = wish
    if not oldest:
        return None
    is_live = any(wish.work_class == "live" for wish in oldest.values())  # 1
    rivals = [wish for wish in oldest.values() if (wish.work_class == "live") is is_live]
    longest_s = max(wish.waited_s for wish in rivals)

    def benefit(wish: Wish) -> float:
        return sequences[wish.model] / max(snapshot.swap_s.get(wish.model, UNKNOWN_SWAP_S), 1e-3)

    near = [wish for wish in rivals if wish.waited_s > longest_s - OVERTAKE_S]  # 2
    return max(near, key=lambda wish: (benefit(wish), wish.waited_s))


def _named(snapshot: Snapshot) -> list[ModelKey]:
    """Absent models that jobs wait for."""
    named = dict.fromkeys(job.model for job in snapshot.waiting)
    return [key for key in named if key not in snapshot.models and key in snapshot.sizes]


def _fits(snapshot: Snapshot, key: ModelKey, budget_bytes: int) -> bool:
    """Whether it could be here together with the pinned models that are: they are never evicted."""
    pinned_bytes = sum(
        slot.weight_bytes for each, slot in snapshot.models.items() if each in snapshot.pinned and each != key
    )
    return pinned_bytes == 0 or pinned_bytes + snapshot.sizes[key] <= budget_bytes


def _next_preload(snapshot: Snapshot, budget_bytes: int) -> Preload | None:
    for preload in snapshot.preload:
        is_absent = preload.model not in snapshot.models and preload.model in snapshot.sizes
        if is_absent and _fits(snapshot, preload.model, budget_bytes):
            return preload
    return None


def _without_work(snapshot: Snapshot) -> list[ModelKey]:
    """Models that nobody needs now, the least recently used first."""
    with_work = {job.model for job in snapshot.running} | {job.model for job in snapshot.waiting}
    idle = [
        (slot.last_used_s, key)
        for key, slot in snapshot.models.items()
        if slot.weight_bytes > 0 and key not in with_work and key not in snapshot.pinned
    ]
    return [key for _, key in sorted(idle)]


def _victims(snapshot: Snapshot, wish: Wish) -> list[ModelKey]:
    """Rules 4 and 5 of `plan_turns`."""
    for_live = wish.work_class == "live"
    idle = _without_work(snapshot)
    with_live = {job.model for job in snapshot.running if job.work_class == "live"}
    with_live |= {job.model for job in snapshot.waiting if job.work_class == "live"}
    left_alone = {job.model for job in snapshot.running if job.attempt > 1} | set(snapshot.pinned)
    ranked: list[tuple[int, float, ModelKey]] = []
    for key, slot in snapshot.models.items():
        if slot.weight_bytes == 0 or key in left_alone or key in idle:
            continue
        if for_live and key not in with_live:
            ranked.append((1, -slot.turn_s, key))
        elif slot.turn_s >= QUANTUM_S and (for_live or key not in with_live):
            ranked.append((2, -slot.turn_s, key))
    return idle + [key for _, _, key in sorted(ranked)]
