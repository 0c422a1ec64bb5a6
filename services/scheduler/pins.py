"""Pure: which worker of a resource holds which pinned models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_PINS = 64
"""Of one resource; all of them are in one message."""


@dataclass(frozen=True, slots=True)
class Pin:
    model_id: str
    copies: int | None
    """None: one on every worker."""


@dataclass(frozen=True, slots=True)
class PinWorker:
    """A worker that may hold pins. room: how many of them; None while it is not known."""

    place: int
    room: int | None = None
    holds: frozenset[str] = frozenset()
    """Models that are pinned there now."""
    ready: frozenset[str] = frozenset()
    """Models that are loaded there now."""


def assign_pins(pins: Sequence[Pin], workers: Sequence[PinWorker]) -> dict[int, list[str]]:
    """Return the models that each place holds, in the order of the pins.

    1. A pin gets as many copies as it asks for, at most one on a worker: all workers, for a pin that asks for all.
    2. What a worker holds it keeps, so that nothing moves without need; of too many copies, those leave that are on
       the workers with the most pins, from the highest place down.
    3. A copy that is missing goes to the worker with the fewest pins; among equals to one where the model is loaded,
       then to the lowest place.
    4. No worker gets more than it has room for; a pin that was made earlier comes first.
    """
    held: dict[int, list[str]] = {worker.place: [] for worker in workers}

    def has_room(worker: PinWorker) -> bool:
        return worker.room is None or len(held[worker.place]) < worker.room

    for pin in pins:  # 2, 4
        for worker in workers:
            if pin.model_id in worker.holds and has_room(worker):
                held[worker.place].append(pin.model_id)
    for pin in pins:
        wanted = len(workers) if pin.copies is None else min(pin.copies, len(workers))
        having = [worker for worker in workers if pin.model_id in held[worker.place]]
        having.sort(key=lambda worker: (len(held[worker.place]), worker.place))
        for worker in having[wanted:]:  # 2
            held[worker.place].remove(pin.model_id)
    for pin in pins:
        wanted = len(workers) if pin.copies is None else pin.copies
        having_count = sum(pin.model_id in models for models in held.values())
        able = [worker for worker in workers if pin.model_id not in held[worker.place] and has_room(worker)]
        able.sort(key=lambda w: (len(held[w.place]), pin.model_id not in w.ready, w.place))
        for worker in able[: max(wanted - having_count, 0)]:  # 3
            held[worker.place].append(pin.model_id)
    order = {pin.model_id: index for index, pin in enumerate(pins)}
    return {place: sorted(models, key=order.__getitem__) for place, models in held.items()}


def room_for_pins(memory_bytes: int, model_bytes: int, model_count: int) -> int | None:
    """How many models may be pinned on a worker; None while nothing is known of its memory or of the models' size.

    1. All models that may run there, if all of them fit.
    2. Else one less than fit: the others take turns in what is left.
    """
    if memory_bytes <= 0 or model_bytes <= 0:
        return None
    fitting = memory_bytes // model_bytes
    return fitting if model_count <= fitting else max(fitting - 1, 0)


def problem_of_pins(pins: Sequence[Pin], workers: int, room: int | None) -> str | None:
    """Say why so many workers, each with this room, cannot hold all pins; None if they can."""
    for pin in pins:
        if pin.copies is not None and pin.copies > workers:
            return f"{pin.copies} copies need {pin.copies} GPUs, the resource has {workers}"
    held = assign_pins(pins, [PinWorker(place, room) for place in range(workers)])
    for pin in pins:
        wanted = workers if pin.copies is None else pin.copies
        if sum(pin.model_id in models for models in held.values()) < wanted:
            return (
                f"each GPU has room for {room} pinned model{'' if room == 1 else 's'} beside one that is not pinned, "
                "and the pins would need more"
            )
    return None
