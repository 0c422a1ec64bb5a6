"""Backlogs in thought, for each number of workers; and what swaps cost a job."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.crowds import Crowds
from services.scheduler.swap_cost import mean_swap_s
from shared.messages import ModelHistory, WorkerReport


def after(*steps: tuple[float, float]) -> Crowds:
    """(tokens that arrive, seconds that pass), of workers that do ten tokens a second."""
    crowds = Crowds(4)
    for arrived, passed_s in steps:
        crowds.pass_time(arrived, passed_s, 10.0, 100.0)
    return crowds


def test_too_few_for_hours_are_not_behind_for_hours_afterwards() -> None:
    crowds = Crowds(4)
    for _ in range(3600):
        crowds.pass_time(35.0, 1.0, 10.0, 5.0)
    assert crowds.least_workers(5.0, 10.0) == 4
    for _ in range(15):
        crowds.pass_time(0.0, 1.0, 10.0, 5.0)
    assert crowds.least_workers(5.0, 10.0) == 0


@pytest.mark.parametrize(
    ("crowds", "wait_s", "workers"),
    [
        (after(), 5, 0),
        (after((9, 1)), 5, 0),  # done as it came
        (after((100, 1)), 5, 2),  # two have 80 left, four seconds each
        (after((100, 1)), 9, 1),
        (after((100, 1)), 0.1, 4),  # none are enough: the most
        (after((100, 1), (0, 5)), 4, 1),
        (after((100, 1), (0, 9)), 5, 0),
        # Two small crowds that come before the first is done are one large one.
        (after((60, 1), (60, 1)), 5, 2),
        (after((60, 1), (0, 5), (60, 1)), 5, 1),
    ],
)
def test_the_fewest_that_would_have_done(crowds: Crowds, wait_s: float, workers: int) -> None:
    assert crowds.least_workers(wait_s, 10.0) == workers


@given(
    st.lists(st.tuples(st.floats(-100, 1e5), st.floats(0.1, 60)), max_size=30),
    st.floats(0.1, 100),
    st.floats(0.1, 100),
)
def test_who_may_wait_longer_wants_no_more(
    steps: list[tuple[float, float]], one_s: float, other_s: float
) -> None:
    crowds = after(*steps)
    shorter, longer = sorted((one_s, other_s))
    assert 4 >= crowds.least_workers(shorter, 10.0) >= crowds.least_workers(longer, 10.0) >= 0


def history(**counts: Any) -> ModelHistory:
    return ModelHistory(**{"model_id": "m", "revision": 1, **counts})


def test_what_a_job_waits_for_its_model_on_average() -> None:
    def report(*models: ModelHistory) -> WorkerReport:
        return WorkerReport(
            worker_id="w",
            resource_id="r",
            place=0,
            incarnation="i",
            phase="ready",
            sent_unix_ms=0,
            history=list(models),
        )

    assert mean_swap_s([]) == mean_swap_s([report()]) == 0.0
    resident = history(loads=1, load_ms_p50=4000, hits=98, misses=2)
    swapped = history(loads=50, load_ms_p50=500, hits=0, misses=100)
    assert mean_swap_s([report(resident)]) == 0.08
    assert mean_swap_s([report(resident), report(swapped)]) == pytest.approx((2 * 4 + 100 * 0.5) / 200)
