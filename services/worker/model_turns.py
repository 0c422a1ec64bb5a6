"""Whose turn it is on the device: which model the worker loads next, which it evicts, and which jobs give way for that.

Pure. A job that could run waits for its first token no longer than the sum over the models ahead of it, and its own,
of (swap + `QUANTUM_S`), plus 2 s; a test runs these rules through a thousand random schedules and holds each job to it.
Ahead are the models that had work of its class or a better one when it came, or within `OVERTAKE_S` after; each counts
once; so do pinned models that are not here yet. What the bound leaves out: a full batch (places, not models), and jobs that were in a crash, which run apart.

A job whose model must go is paused: its sequences leave the engine, and later it goes on from the tokens it has. Their
keys and values stay findable for as long as nobody needs the blocks, also while the model is away; what is not found is
computed again, as for a job that comes from a dead worker. A pause costs no attempt, and since each turn lasts a quantum
at least, every paused job gets on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from services.worker.pull_snapshot import ModelKey, Preload, RunningJob, Snapshot, WaitingJob, WorkClass

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
    2. The next model is an absent one that a waiting job or a pin names: `choose_next`; for an adapter whose base is
       absent it is the base. When there is none and no job
       waits at all, it is the first preload that is absent.
    3. If the memory allows, it is loaded at once; also one above the whole budget, into an empty device.
    4. Else others make room, as few as do, in this order: those without any work, the least recently used first; for a
       live job or a pin, those with batch work only; those whose quantum is over, the one with the fewest sequences first,
       and of equals the longest turn; but these only when the last swap was a quantum ago: so `n` models on the device
       have turns of about `n` quanta. Their jobs are paused. For a preload only those without work go, and only if it may
       evict.
    5. A model that runs a job which was in a crash stays: such a job is left alone. A pinned model stays. The base of an
       adapter is used by whatever the adapter is used for; it goes with all adapters on it, which go first, or not at all.
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
        return _make_room(snapshot, _target(snapshot, preload.model), victims, budget_bytes, no_room)
    return Turns(no_room=no_room)


def _make_room(
    snapshot: Snapshot, key: ModelKey, victims: Iterable[ModelKey], budget_bytes: int, no_room: list[ModelKey]
) -> Turns:
    """Rules 3 to 6 of `plan_turns`."""
    base = snapshot.bases.get(key)
    others = {each: slot.weight_bytes for each, slot in snapshot.models.items() if each != base}
    need_bytes = (
        snapshot.sizes[key] + sum(slot.weight_bytes for slot in snapshot.models.values()) - budget_bytes
    )
    if need_bytes <= 0 or sum(others.values()) == 0:  # 3
        return Turns(load=[key], no_room=no_room)
    evict: list[ModelKey] = []
    for victim in victims:  # 4
        if victim == base:
            continue
        # 5: those on it are victims themselves, or it would be none.
        group = [*_adapters_on(snapshot, victim), victim]
        evict += [each for each in group if each not in evict]
        if sum(others[each] for each in evict) >= need_bytes:
            break
    need_bytes -= sum(others[each] for each in evict)
    leaves_empty = len(evict) == sum(weight_bytes > 0 for weight_bytes in others.values())
    if need_bytes > 0 and not leaves_empty:  # 6
        return Turns(no_room=no_room)
    pause = [job.job_id for job in snapshot.running if job.model in evict]
    return Turns(evict=evict, pause=pause, no_room=no_room)


def choose_next(snapshot: Snapshot, budget_bytes: int) -> Wish | None:
    """The model that is loaded next, or None. A job whose owner does not answer asks for nothing.

    1. A model that somebody waits for with a live request goes before one that only batch work names. An absent model
       that is pinned counts as one with a live request, which has waited since it was pinned.
    2. The model whose oldest job waits longest; but among those whose oldest came within `OVERTAKE_S` of that one, the
       model with the most waiting sequences for each second of its swap (of both, for an adapter and an absent base: the
       base is loaded first). So jobs ABCABC run as AABBCC, and nobody is
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
        if not _can_come(snapshot, wish.model) or not _fits(snapshot, wish.model, budget_bytes):  # 3
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
        # With its base's, which is no longer counted once that is here: so nobody else goes between the two.
        steps = {wish.model, _target(snapshot, wish.model)}
        swap_s = sum(snapshot.swap_s.get(key, UNKNOWN_SWAP_S) for key in steps)
        return sequences[wish.model] / max(swap_s, 1e-3)

    near = [wish for wish in rivals if wish.waited_s > longest_s - OVERTAKE_S]  # 2
    chosen = max(near, key=lambda wish: (benefit(wish), wish.waited_s))
    return replace(chosen, model=_target(snapshot, chosen.model))


def _can_come(snapshot: Snapshot, key: ModelKey) -> bool:
    """Whether it is absent and can be loaded, and its base too."""
    is_known = key in snapshot.sizes and _target(snapshot, key) in snapshot.sizes
    return is_known and key not in snapshot.models


def _target(snapshot: Snapshot, key: ModelKey) -> ModelKey:
    """What is loaded next for a model: itself, or the base that it lacks."""
    base = snapshot.bases.get(key)
    return key if base is None or base in snapshot.models else base


def _adapters_on(snapshot: Snapshot, base: ModelKey) -> list[ModelKey]:
    """Those that are here; one that failed is not."""
    return [
        key
        for key, slot in snapshot.models.items()
        if snapshot.bases.get(key) == base and slot.weight_bytes > 0
    ]


def _with_bases(snapshot: Snapshot, keys: Iterable[ModelKey]) -> set[ModelKey]:
    found = set(keys)
    return found | {snapshot.bases[key] for key in found if key in snapshot.bases}


def _named(snapshot: Snapshot) -> list[ModelKey]:
    """Absent models that jobs wait for."""
    named = dict.fromkeys(job.model for job in snapshot.waiting)
    return [key for key in named if _can_come(snapshot, key)]


def _fits(snapshot: Snapshot, key: ModelKey, budget_bytes: int) -> bool:
    """Whether it, with its base, could be here together with the pinned models that are: they are never evicted."""
    pinned = _with_bases(snapshot, snapshot.pinned)
    own = _with_bases(snapshot, [key])
    pinned_bytes = sum(
        slot.weight_bytes for each, slot in snapshot.models.items() if each in pinned and each not in own
    )
    own_bytes = sum(
        snapshot.models[each].weight_bytes if each in snapshot.models else snapshot.sizes.get(each, 0)
        for each in own
    )
    return pinned_bytes == 0 or pinned_bytes + own_bytes <= budget_bytes


def _next_preload(snapshot: Snapshot, budget_bytes: int) -> Preload | None:
    for preload in snapshot.preload:
        if _can_come(snapshot, preload.model) and _fits(snapshot, preload.model, budget_bytes):
            return preload
    return None


def _without_work(snapshot: Snapshot) -> list[ModelKey]:
    """Models that nobody needs now, the least recently used first."""
    with_work = {job.model for job in snapshot.running} | {job.model for job in snapshot.waiting}
    needed = _with_bases(snapshot, with_work | set(snapshot.pinned))
    idle = [
        (slot.last_used_s, key)
        for key, slot in snapshot.models.items()
        if slot.weight_bytes > 0 and key not in needed
    ]
    return [key for _, key in sorted(idle)]


def _count_sequences(snapshot: Snapshot, key: ModelKey) -> int:
    """Those that run or wait for the model, or for an adapter on it."""
    jobs: list[RunningJob | WaitingJob] = [*snapshot.running, *snapshot.waiting]
    return sum(job.sequences for job in jobs if key in (job.model, snapshot.bases.get(job.model)))


def _victims(snapshot: Snapshot, wish: Wish) -> list[ModelKey]:
    """Rules 4 and 5 of `plan_turns`."""
    for_live = wish.work_class == "live"
    idle = _without_work(snapshot)
    with_live = {job.model for job in snapshot.running if job.work_class == "live"}
    with_live |= {job.model for job in snapshot.waiting if job.work_class == "live"}
    with_live = _with_bases(snapshot, with_live)
    in_crash = {job.model for job in snapshot.running if job.attempt > 1}
    left_alone = _with_bases(snapshot, in_crash | set(snapshot.pinned))
    may_interrupt = snapshot.since_swap_s >= QUANTUM_S
    ranked: list[tuple[int, int, float, ModelKey]] = []
    for key, slot in snapshot.models.items():
        if slot.weight_bytes == 0 or key in left_alone or key in idle:
            continue
        if for_live and key not in with_live:
            ranked.append((1, 0, -slot.turn_s, key))
        elif may_interrupt and slot.turn_s >= QUANTUM_S and (for_live or key not in with_live):
            ranked.append((2, _count_sequences(snapshot, key), -slot.turn_s, key))
    found = idle + [key for *_, key in sorted(ranked)]
    return [key for key in found if all(each in found for each in _adapters_on(snapshot, key))]
