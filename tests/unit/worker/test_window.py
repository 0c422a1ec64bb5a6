"""How many jobs a worker holds that it cannot run yet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from services.worker.window import SHARED_AFTER_S, JobsRate, choose_shared, choose_steps


@pytest.mark.parametrize(
    ("jobs_per_s", "now_steps", "most_jobs", "expected"),
    [
        pytest.param(None, 0, 16, 1, id="one step while nothing is measured"),
        pytest.param(None, 0, 3, 0, id="but not more than is allowed"),
        pytest.param(0.1, 1, 16, 0, id="of long jobs none: others may begin them sooner"),
        pytest.param(0.1, 0, 16, 0, id="and none comes back"),
        pytest.param(2.0, 0, 16, 1, id="two seconds of work"),
        pytest.param(1.99, 0, 16, 0, id="not a job more"),
        pytest.param(1.9, 1, 16, 1, id="a rate at the edge turns nothing off"),
        pytest.param(1.4, 1, 16, 0, id="a rate well below does"),
        pytest.param(100.0, 0, 16, 1, id="one step at a time"),
        pytest.param(100.0, 4, 16, 4, id="up to the most"),
        pytest.param(100.0, 4, 8, 3, id="which may be less"),
        pytest.param(0.1, 4, 16, 3, id="also down"),
        pytest.param(6.0, 3, 16, 3, id="where it belongs"),
    ],
)
def test_choose_steps(jobs_per_s: float | None, now_steps: int, most_jobs: int, expected: int) -> None:
    assert choose_steps(jobs_per_s, now_steps, most_jobs) == expected


def test_the_rate_is_of_the_time_in_which_the_worker_was_full() -> None:
    rate = JobsRate()
    rate.look(100, 10.0, is_full=True)  # what was before is not known
    assert rate.per_s is None
    rate.look(103, 11.0, is_full=True)
    assert rate.per_s == pytest.approx(3.0)
    rate.look(103, 12.0, is_full=False)  # nobody asks: that says nothing of what it could do
    assert rate.per_s == pytest.approx(3.0)
    rate.look(112, 13.0, is_full=True)
    assert rate.per_s == pytest.approx(3.0 + 6.0 * (1 - math.exp(-0.1)))
    for second in range(14, 100):
        rate.look(112 + second - 13, float(second), is_full=True)
    assert rate.per_s == pytest.approx(1.0, abs=0.01)


def test_a_time_that_nobody_looked_is_not_taken_for_slow_work() -> None:
    rate = JobsRate()
    rate.look(0, 0.0, is_full=True)
    rate.look(5, 1.0, is_full=True)
    rate.look(5, 100.0, is_full=True)
    assert rate.per_s == pytest.approx(5.0)


@dataclass(frozen=True)
class Unbegun:
    received_s: float


def test_what_waited_goes_to_an_idle_worker_and_what_just_came_stays() -> None:
    old, new = Unbegun(10.0), Unbegun(10.1)
    assert choose_shared([new, old], 10.0 + SHARED_AFTER_S) == [old]
