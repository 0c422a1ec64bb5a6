"""The engine's decisions as tables."""

from __future__ import annotations

import random
from typing import Any

import pytest

from services.worker.engine.batching import (
    Admission,
    Chunk,
    ModelBatch,
    SequenceView,
    choose_admissions,
    choose_victim,
    plan_step,
)


def view(sequence_id: str, arrival: int = 0, **changes: Any) -> SequenceView:
    values: dict[str, Any] = {
        "model": "m",
        "known_tokens": 20,
        "computed_tokens": 0,
        "most_tokens": 100,
        **changes,
    }
    values.setdefault("prompt_tokens", values["known_tokens"])
    return SequenceView(sequence_id=sequence_id, arrival=arrival, **values)


def decoding(sequence_id: str, arrival: int = 0, known: int = 20, **changes: Any) -> SequenceView:
    values: dict[str, Any] = {
        "prompt_tokens": 1,
        "known_tokens": known,
        "computed_tokens": known - 1,
        **changes,
    }
    return view(sequence_id, arrival, **values)


@pytest.mark.parametrize(
    ("waiting", "running", "free_blocks", "max_batch", "expected"),
    [
        pytest.param([], 0, 10, 4, [], id="nobody waits"),
        pytest.param([view("a")], 0, 10, 4, [Admission("a", 2)], id="21 tokens take 2 blocks of 16"),
        pytest.param([view("a", known_tokens=16)], 0, 10, 4, [Admission("a", 2)], id="the next token counts"),
        pytest.param(
            [view("a", known_tokens=16, most_tokens=16)],
            0,
            10,
            4,
            [Admission("a", 1)],
            id="unless there is none",
        ),
        pytest.param([view("b", 2), view("a", 1)], 0, 9, 1, [Admission("a", 2)], id="in order of arrival"),
        pytest.param([view("a")], 4, 10, 4, [], id="no place in the batch"),
        pytest.param([view("a")], 0, 1, 4, [], id="no room"),
        pytest.param([view("a")], 3, 4, 9, [], id="a spare block for each of those running"),
        pytest.param([view("a")], 3, 5, 9, [Admission("a", 2)], id="and not one more"),
        pytest.param(
            [view("big", 1, known_tokens=90), view("small", 2, known_tokens=1)],
            0,
            5,
            9,
            [],
            id="the first holds all back",
        ),
        pytest.param(
            [view("a", 1), view("b", 2)], 0, 4, 9, [Admission("a", 2)], id="newcomers are counted as running"
        ),
        pytest.param([view("a", preemptions=1)], 0, 9, 4, [Admission("a", 2)], id="once pre-empted"),
        pytest.param([view("a", preemptions=2)], 0, 9, 4, [Admission("a", 7)], id="twice: its full length"),
        pytest.param([view("a", preemptions=2)], 0, 6, 4, [], id="or nothing"),
    ],
)
def test_choose_admissions(
    waiting: list[SequenceView], running: int, free_blocks: int, max_batch: int, expected: list[Admission]
) -> None:
    assert choose_admissions(waiting, running, free_blocks, max_batch, block_tokens=16) == expected


@pytest.mark.parametrize(
    ("running", "turn", "expected"),
    [
        pytest.param([], 0, [], id="nothing runs"),
        pytest.param(
            [decoding("b", 2), decoding("a", 1)],
            0,
            [ModelBatch("m", ("a", "b"), ())],
            id="all decode together",
        ),
        pytest.param(
            [view("a")], 0, [ModelBatch("m", (), (Chunk("a", 0, 16),))], id="a chunk ends at its multiple"
        ),
        pytest.param(
            [view("a", known_tokens=90, computed_tokens=20)],
            0,
            [ModelBatch("m", (), (Chunk("a", 20, 12),))],
            id="also when it begins between two",
        ),
        pytest.param(
            [view("a", computed_tokens=16)],
            0,
            [ModelBatch("m", (), (Chunk("a", 16, 4),))],
            id="or with the prompt",
        ),
        pytest.param(
            [view("a", known_tokens=1)],
            0,
            [ModelBatch("m", (), (Chunk("a", 0, 1),))],
            id="a prompt of one token",
        ),
        pytest.param(
            [decoding("a", 1), view("b", 2)],
            0,
            [ModelBatch("m", ("a",), (Chunk("b", 0, 16),))],
            id="prompts beside answers",
        ),
        pytest.param(
            [view("a", 1, known_tokens=6), view("b", 2, known_tokens=16), view("c", 3)],
            0,
            [ModelBatch("m", (), (Chunk("a", 0, 6), Chunk("b", 0, 16)))],
            id="whole chunks until the amount is used",
        ),
        pytest.param(
            [view("a", 1), view("b", 2, model="n")],
            0,
            [ModelBatch("m", (), (Chunk("a", 0, 16),))],
            id="models take turns: the first",
        ),
        pytest.param(
            [view("a", 1), view("b", 2, model="n")],
            1,
            [ModelBatch("n", (), (Chunk("b", 0, 16),))],
            id="models take turns: the second",
        ),
        pytest.param(
            [view("a", 1), decoding("b", 2, model="n")],
            3,
            [ModelBatch("n", ("b",), ()), ModelBatch("m", (), (Chunk("a", 0, 16),))],
            id="every model decodes",
        ),
    ],
)
def test_plan_step(running: list[SequenceView], turn: int, expected: list[ModelBatch]) -> None:
    assert plan_step(running, chunk_tokens=16, turn=turn) == expected


def test_a_chunk_never_reaches_from_the_prompt_into_the_answer() -> None:
    resumed = {"prompt_tokens": 20, "known_tokens": 200, "most_tokens": 300}
    computed, cuts = 0, []
    while computed < 199:
        [batch] = plan_step([view("a", computed_tokens=computed, **resumed)], chunk_tokens=16, turn=0)
        [chunk] = batch.chunks or [Chunk("a", computed, 1)]
        cuts.append((chunk.start, chunk.count))
        computed += chunk.count
    assert cuts == [(0, 16), (16, 4), (20, 64), (84, 64), (148, 52)]


def test_plan_step_cuts_a_prompt_at_the_same_places_whatever_runs_beside_it() -> None:
    rng = random.Random(3)
    for _ in range(200):
        neighbours = [
            view(f"n{n}", n, known_tokens=rng.randrange(1, 60), model=rng.choice("mn"))
            for n in range(rng.randrange(5))
        ]
        mine = view("mine", 10, known_tokens=50, computed_tokens=32)
        for batch in plan_step([*neighbours, mine], chunk_tokens=16, turn=rng.randrange(4)):
            for chunk in batch.chunks:
                if chunk.sequence_id == "mine":
                    assert chunk == Chunk("mine", 32, 16)


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        pytest.param([], None, id="nobody"),
        pytest.param([decoding("old", 1), decoding("young", 2)], "young", id="the youngest"),
        pytest.param([decoding("old", 1), decoding("young", 2, preemptions=2)], "old", id="not after two"),
        pytest.param([decoding("a", 1, preemptions=2)], None, id="nobody can give way"),
    ],
)
def test_choose_victim(running: list[SequenceView], expected: str | None) -> None:
    assert choose_victim(running) == expected
