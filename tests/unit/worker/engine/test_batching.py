"""The engine's decisions as tables."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from services.worker.engine.batching import (
    Chunk,
    FoundPrefix,
    ModelBatch,
    SequenceView,
    choose_admission,
    choose_victim,
    plan_step,
    waits_for_prefix,
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
    values.setdefault("base", values["model"])
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
    ("waiting", "found", "running", "free_blocks", "expected"),
    [
        pytest.param(view("a"), (0, 0), 0, 10, 2, id="21 tokens take 2 blocks of 16"),
        pytest.param(view("a", known_tokens=16), (0, 0), 0, 10, 2, id="the next token counts"),
        pytest.param(view("a", known_tokens=16, most_tokens=16), (0, 0), 0, 10, 1, id="unless there is none"),
        pytest.param(view("a"), (0, 0), 9, 99, None, id="no place in the batch"),
        pytest.param(view("a"), (0, 0), 8, 99, 2, id="the last place"),
        pytest.param(view("a"), (0, 0), 0, 1, None, id="no room"),
        pytest.param(view("a"), (0, 0), 3, 4, None, id="a spare block for each of those running"),
        pytest.param(view("a"), (0, 0), 3, 5, 2, id="and not one more"),
        pytest.param(view("a", known_tokens=90), (5, 0), 0, 1, 1, id="what others hold is not taken again"),
        pytest.param(view("a", known_tokens=90), (5, 5), 0, 5, None, id="what is idle was counted as free"),
        pytest.param(view("a", known_tokens=90), (5, 5), 0, 6, 1, id="and is enough with one more"),
        pytest.param(
            view("a", known_tokens=90), (5, 2), 1, 3, None, id="one spare, two shared: none is left"
        ),
        pytest.param(view("a", known_tokens=90), (5, 2), 1, 4, 1, id="one spare, two shared, one taken"),
        pytest.param(view("a", preemptions=1), (0, 0), 0, 9, 2, id="once pre-empted"),
        pytest.param(view("a", preemptions=2), (0, 0), 0, 9, 7, id="twice: its full length"),
        pytest.param(view("a", preemptions=2), (1, 1), 0, 9, 6, id="less what is found"),
        pytest.param(view("a", preemptions=2), (0, 0), 0, 6, None, id="or nothing"),
    ],
)
def test_choose_admission(
    waiting: SequenceView, found: tuple[int, int], running: int, free_blocks: int, expected: int | None
) -> None:
    chosen = choose_admission(
        waiting, FoundPrefix(*found), running, free_blocks, max_batch=9, block_tokens=16
    )
    assert chosen == expected


@pytest.mark.parametrize(
    ("left_blocks", "coming_blocks", "expected"),
    [(0, 0, False), (4, 0, False), (4, 1, False), (4, 2, True), (5, 2, False), (5, 5, True)],
)
def test_waits_for_prefix(left_blocks: int, coming_blocks: int, expected: bool) -> None:
    assert waits_for_prefix(left_blocks, coming_blocks) is expected


@pytest.mark.parametrize(
    ("running", "turn", "expected"),
    [
        pytest.param([], 0, [], id="nothing runs"),
        pytest.param(
            [decoding("a", 1), decoding("b", 2)],
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
            [view("a", 1, known_tokens=6), view("b", 2, known_tokens=14), view("c", 3)],
            0,
            [ModelBatch("m", (), (Chunk("a", 0, 6), Chunk("b", 0, 14)))],
            id="whole chunks as long as they fit",
        ),
        pytest.param(
            [view("a", 1, known_tokens=6), view("b", 2, known_tokens=15), view("c", 3, known_tokens=1)],
            0,
            [ModelBatch("m", (), (Chunk("a", 0, 6),))],
            id="who does not fit holds back those behind",
        ),
        pytest.param(
            [
                view("a", 1, known_tokens=6),
                view("b", 2, known_tokens=15),
                view("c", 3, known_tokens=1, model="n"),
            ],
            0,
            [ModelBatch("m", (), (Chunk("a", 0, 6),)), ModelBatch("n", (), (Chunk("c", 0, 1),))],
            id="but not another model's",
        ),
        pytest.param(
            [
                *(decoding(f"d{n}", n) for n in range(14)),
                view("a", 20, known_tokens=6),
                view("b", 21, known_tokens=1),
            ],
            0,
            [ModelBatch("m", tuple(f"d{n}" for n in range(14)), (Chunk("a", 0, 6),))],
            id="answers leave less to prompts",
        ),
        pytest.param(
            [*(decoding(f"d{n}", n) for n in range(30)), view("a", 40), view("b", 41)],
            0,
            [ModelBatch("m", tuple(f"d{n}" for n in range(30)), (Chunk("a", 0, 16),))],
            id="but never nothing",
        ),
        pytest.param(
            [view("a", known_tokens=17, computed_tokens=16)],
            0,
            [ModelBatch("m", (), (Chunk("a", 16, 1),))],
            id="a prompt whose last token alone is left is a prompt",
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
            [ModelBatch("m", (), (Chunk("a", 0, 16),))],
            id="the number of the step alone decides no turn",
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
    assert plan_step(running, 16, 20, turn, {}).batches == expected


@pytest.mark.parametrize(
    ("accounts", "expected"),
    [
        ({"m": 0, "n": 1}, ["m"]),
        ({"m": 1, "n": 0}, ["n"]),
        ({"m": 7}, ["m"]),
        ({"n": 7, "gone": 3}, ["m"]),
    ],
)
def test_the_model_with_the_least_account_has_its_prompt_computed(
    accounts: dict[str, int], expected: list[str]
) -> None:
    plan = plan_step([view("a", 1), view("b", 2, model="n")], 16, 20, 0, accounts)
    assert [batch.model for batch in plan.batches] == expected
    assert set(plan.accounts) == {"m", "n"}


def test_models_share_prompts_by_their_weights_and_none_starves() -> None:
    """Eight prompts of one model, two of another, one of a third, each as long as it lasts: 4 to 2 to 1."""
    views = [view(f"{model}{n}", n, model=model, known_tokens=2000, team="t")
             for model, count in (("m", 8), ("n", 2), ("o", 1)) for n in range(count)]  # fmt: skip
    accounts: dict[str, int] = {}
    chunks: Counter[str] = Counter()
    for step in range(70):
        plan = plan_step(views, 16, 16, step, accounts)
        accounts = plan.accounts
        for batch in plan.batches:
            chunks[batch.model] += len(batch.chunks)
            for chunk in batch.chunks:
                (mine,) = [each for each in views if each.sequence_id == chunk.sequence_id]
                mine.computed_tokens += chunk.count
    assert chunks == {"m": 40, "n": 20, "o": 10}


def test_a_model_that_only_answers_takes_no_turn_from_the_others_prompts() -> None:
    views = [
        decoding("d", 0, model="a"),
        *(view(f"s{model}", 1, model=model, known_tokens=900) for model in "mn"),
    ]
    accounts: dict[str, int] = {}
    order = []
    for step in range(6):
        plan = plan_step(views, 16, 16, step, accounts)
        accounts = plan.accounts
        order += [batch.model for batch in plan.batches if batch.chunks]
    assert order == ["m", "n"] * 3


def test_who_comes_back_is_owed_nothing() -> None:
    busy = [view("a", 1, known_tokens=9000)]
    accounts: dict[str, int] = {}
    for step in range(50):
        accounts = plan_step(busy, 16, 16, step, accounts).accounts
    both = [*busy, view("b", 2, model="n", known_tokens=9000)]
    served = []
    for step in range(4):
        plan = plan_step(both, 16, 16, step, accounts)
        accounts = plan.accounts
        served += [batch.model for batch in plan.batches]
    assert sorted(served) == ["m", "m", "n", "n"]


def test_a_chunk_never_reaches_from_the_prompt_into_the_answer() -> None:
    resumed = {"prompt_tokens": 20, "known_tokens": 200, "most_tokens": 300}
    computed, cuts = 0, []
    while computed < 199:
        [batch] = plan_step([view("a", computed_tokens=computed, **resumed)], 16, 16, 0, {}).batches
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
        for batch in plan_step([*neighbours, mine], 16, rng.randrange(1, 99), rng.randrange(4), {}).batches:
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
