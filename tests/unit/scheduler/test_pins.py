"""Which worker holds which pinned models: the rules as a table, and what has to hold of any pins and workers."""

from __future__ import annotations

import random

import pytest

from services.scheduler.pins import Pin, PinWorker, assign_pins, problem_of_pins, room_for_pins


def worker(place: int, room: int | None = None, holds: str = "", ready: str = "") -> PinWorker:
    return PinWorker(place, room, frozenset(holds), frozenset(ready))


def pins(*each: str) -> list[Pin]:
    """`a2`: two copies of a; `a*`: on every worker."""
    return [Pin(text[0], None if text[1:] == "*" else int(text[1:])) for text in each]


@pytest.mark.parametrize(
    ("asked", "workers", "expected"),
    [
        pytest.param([], [worker(0)], {0: ""}, id="no pins"),
        pytest.param(pins("a1"), [], {}, id="no workers"),
        pytest.param(pins("a1"), [worker(0), worker(1)], {0: "a", 1: ""}, id="one copy, the lowest place"),
        pytest.param(pins("a1", "b1"), [worker(0), worker(1)], {0: "a", 1: "b"}, id="pins are spread"),
        pytest.param(pins("a2"), [worker(0), worker(1), worker(2)], {0: "a", 1: "a", 2: ""}, id="two copies, two workers"),
        pytest.param(pins("a*"), [worker(0), worker(1), worker(2)], {0: "a", 1: "a", 2: "a"}, id="all"),
        pytest.param(pins("a3"), [worker(0), worker(1)], {0: "a", 1: "a"}, id="no more than there are workers"),
        pytest.param(pins("a1"), [worker(0), worker(1, ready="a")], {0: "", 1: "a"}, id="where it is loaded already"),
        pytest.param(
            pins("a1", "b1"), [worker(0, ready="ab"), worker(1)], {0: "a", 1: "b"}, id="but spreading comes first"
        ),
        pytest.param(pins("a1"), [worker(0), worker(1, holds="a")], {0: "", 1: "a"}, id="who holds it keeps it"),
        pytest.param(
            pins("a1", "b1"), [worker(0), worker(1, holds="ab")], {0: "", 1: "ab"}, id="nothing moves only to be spread"
        ),
        pytest.param(pins("b1"), [worker(0, holds="ab"), worker(1)], {0: "b", 1: ""}, id="an unpinned model goes"),
        pytest.param(
            pins("a1", "b1"),
            [worker(0, holds="a"), worker(1, holds="ab")],
            {0: "a", 1: "b"},
            id="of too many copies those on the fullest worker go",
        ),
        pytest.param(
            pins("a1"), [worker(0, holds="a"), worker(1, holds="a")], {0: "a", 1: ""}, id="then the highest place"
        ),
        pytest.param(pins("a1"), [worker(0, room=0), worker(1, room=1)], {0: "", 1: "a"}, id="not where no room is"),
        pytest.param(
            pins("a1", "b1", "c1"), [worker(0, 1), worker(1, 1)], {0: "a", 1: "b"}, id="the last pin is without"
        ),
        pytest.param(
            pins("a1", "b1"), [worker(0, room=1, holds="ab")], {0: "a"}, id="less room: the older pin stays"
        ),
        pytest.param(
            pins("a*", "b1"), [worker(0, 1), worker(1, 2)], {0: "a", 1: "ab"}, id="room of each worker"
        ),
    ],
)  # fmt: skip
def test_assign_pins(asked: list[Pin], workers: list[PinWorker], expected: dict[int, str]) -> None:
    assert assign_pins(asked, workers) == {place: list(models) for place, models in expected.items()}


@pytest.mark.parametrize("seed", range(300))
def test_any_assignment_is_within_bounds_settled_and_stable(seed: int) -> None:
    dice = random.Random(seed)
    asked = [
        Pin(model, dice.choice([None, 1, 1, 2, 3])) for model in dice.sample("abcdefgh", dice.randint(0, 8))
    ]
    room = dice.choice([None, 1, 2, 3, 8])
    workers = [
        worker(place, room, "".join(dice.sample("abcdefgh", dice.randint(0, 3))))
        for place in dice.sample(range(8), dice.randint(0, 5))
    ]
    held = assign_pins(asked, workers)
    for pin in asked:
        wanted = len(workers) if pin.copies is None else min(pin.copies, len(workers))
        having = sum(pin.model_id in models for models in held.values())
        assert having <= wanted
        if having < wanted:
            full = [models for models in held.values() if pin.model_id not in models]
            assert room is not None and all(len(models) == room for models in full)
    for models in held.values():
        assert len(models) == len(set(models)) and (room is None or len(models) <= room)

    settled = [worker(each.place, room, "".join(held[each.place])) for each in workers]
    assert assign_pins(asked, settled) == held, "asked again it changes nothing"
    dice.shuffle(settled)
    assert assign_pins(asked, settled) == held, "the order of the workers does not matter"
    if settled:
        gone = settled.pop()
        after = assign_pins(asked, settled)
        for each in settled:
            assert set(held[each.place]) <= set(after[each.place]), f"{gone.place} left, and others lost pins"
        newcomer = [*settled, worker(99, room)]
        kept = assign_pins(
            asked, [worker(each.place, room, "".join(after.get(each.place, ""))) for each in newcomer]
        )
        for each in settled:
            assert kept[each.place] == after[each.place], "a newcomer moves nothing"


@pytest.mark.parametrize(
    ("memory_bytes", "model_bytes", "model_count", "room"),
    [
        (0, 10, 3, None),
        (100, 0, 3, None),
        (100, 10, 10, 10),
        (100, 10, 11, 9),
        (109, 10, 11, 9),
        (15, 10, 1, 1),
        (15, 10, 2, 0),
        (5, 10, 1, 0),
    ],
)
def test_room_for_pins(memory_bytes: int, model_bytes: int, model_count: int, room: int | None) -> None:
    assert room_for_pins(memory_bytes, model_bytes, model_count) == room


@pytest.mark.parametrize(
    ("asked", "workers", "room", "problem"),
    [
        (pins("a1"), 1, 1, None),
        (pins("a2"), 1, None, "2 copies need 2 GPUs, the resource has 1"),
        (pins("a*", "b*"), 3, 2, None),
        (pins("a*", "b*", "c1"), 3, 2, "each GPU has room for 2 pinned models"),
        (pins("a1", "b1", "c1"), 3, 1, None),
        (pins("a1", "b1", "c2"), 3, 1, "each GPU has room for 1 pinned model beside"),
        (pins("a*", "b*", "c*"), 3, None, None),
        (pins("a*"), 0, None, None),
        (pins("a1"), 1, 0, "each GPU has room for 0 pinned models"),
    ],
)
def test_problem_of_pins(asked: list[Pin], workers: int, room: int | None, problem: str | None) -> None:
    found = problem_of_pins(asked, workers, room)
    assert (found or "").startswith(problem or "") and (found is None) == (problem is None)
