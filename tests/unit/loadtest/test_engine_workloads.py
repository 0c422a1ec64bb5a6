"""What the engine's measurement asks of both sides."""

from __future__ import annotations

import pytest

from loadtest.engine_comparisons import QUICK_SHAPES, SHAPES
from loadtest.engine_workloads import (
    ALL_AT_ONCE,
    ONE_BY_ONE,
    STATIC_PLANS,
    Plan,
    Request,
    group_requests,
    make_requests,
)

TEXT = tuple(range(1000, 1200))
VOCABULARY = 5000


def test_the_ragged_workload_has_sixteen_requests_of_the_stated_lengths() -> None:
    shape = SHAPES["ragged"]
    assert len(shape.prompt_tokens) == len(shape.answer_tokens) == 16
    assert min(shape.prompt_tokens) >= 16 and max(shape.prompt_tokens) <= 256
    assert min(shape.answer_tokens) >= 16 and max(shape.answer_tokens) <= 128
    # Ragged indeed: half of the range at least is used.
    assert max(shape.prompt_tokens) - min(shape.prompt_tokens) >= 120
    assert max(shape.answer_tokens) - min(shape.answer_tokens) >= 56


@pytest.mark.parametrize("text", [TEXT, ()], ids=["text", "random tokens"])
def test_requests_have_the_shape_s_lengths_in_every_run(text: tuple[int, ...]) -> None:
    for name, shape in (*SHAPES.items(), *QUICK_SHAPES.items()):
        for run in (0, 7):
            requests = make_requests(shape, text, VOCABULARY, run)
            assert tuple(len(request.prompt) for request in requests) == shape.prompt_tokens, name
            assert tuple(request.answer_tokens for request in requests) == shape.answer_tokens, name
            assert all(0 <= token < VOCABULARY for request in requests for token in request.prompt)


def test_a_run_is_the_same_again_and_no_prompt_begins_as_another() -> None:
    shape = SHAPES["ragged"]
    assert make_requests(shape, TEXT, VOCABULARY, 3) == make_requests(shape, TEXT, VOCABULARY, 3)
    beginnings = [
        request.prompt[:2] for run in range(20) for request in make_requests(shape, TEXT, VOCABULARY, run)
    ]
    assert len(set(beginnings)) == len(beginnings)


@pytest.mark.parametrize("plan", [*STATIC_PLANS, ALL_AT_ONCE, ONE_BY_ONE], ids=str)
def test_every_request_is_in_exactly_one_group(plan: Plan) -> None:
    groups = group_requests(make_requests(SHAPES["ragged"], TEXT, VOCABULARY, 0), plan)
    assert sorted(index for group in groups for index in group) == list(range(16))
    assert {len(group) for group in groups} == {plan.batch or 16}


def test_a_sorted_plan_puts_similar_lengths_together() -> None:
    requests = [Request((1,) * prompt, answer) for prompt, answer in ((5, 1), (1, 9), (4, 3), (2, 7))]
    assert group_requests(requests, Plan(2, "answer")) == [[0, 2], [3, 1]]
    assert group_requests(requests, Plan(2, "prompt")) == [[1, 3], [2, 0]]
    assert group_requests(requests, Plan(2)) == [[0, 1], [2, 3]]
