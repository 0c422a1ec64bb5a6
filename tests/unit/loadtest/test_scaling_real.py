"""The parts of the real run beside the simulator that need no server: what is asked, and how the two are compared."""

from __future__ import annotations

import pytest

from loadtest.scaling_real import CROWDS, Seen, arrivals, compare, simulate


def test_arrivals_are_the_same_each_time_and_come_in_crowds() -> None:
    jobs = list(arrivals(180.0, 5))
    assert jobs == list(arrivals(180.0, 5)) != list(arrivals(180.0, 6))
    assert [job.at for job in jobs] == sorted(job.at for job in jobs) and jobs[-1].at < 180.0
    assert all(4 <= job.completion_tokens <= 200 for job in jobs)
    crowded_s = sum(end - begin for begin, end in CROWDS)
    in_crowds = sum(any(begin <= job.at < end for begin, end in CROWDS) for job in jobs)
    assert in_crowds / crowded_s > 4 * (len(jobs) - in_crowds) / (180.0 - crowded_s)


def test_simulated_waits_follow_what_was_seen_of_starts_and_tokens() -> None:
    jobs = list(arrivals(180.0, 5))
    waits_s = simulate(jobs, 20.0, 0.04, 180.0)
    assert len(waits_s) == len(jobs) and waits_s[0] == 0.0, "one worker is ready at the beginning"
    assert sum(simulate(jobs, 3.0, 0.04, 180.0)) < 0.5 * sum(waits_s)
    assert sum(simulate(jobs, 20.0, 0.02, 180.0)) < 0.5 * sum(waits_s)


@pytest.mark.parametrize(
    ("factor", "ratio", "is_below"), [(1.0, 1.0, False), (1.2, 1 / 1.2, False), (0.7, 0.7, True)]
)
def test_means_agree_within_a_fifth_whichever_is_larger(factor: float, ratio: float, is_below: bool) -> None:
    jobs = list(arrivals(60.0, 5))
    waits_s = [wait_s * factor for wait_s in simulate(jobs, 15.0, 0.04, 60.0)]
    mean, *rest = compare(jobs, Seen(waits_s, token_s=0.04, starts_s=[14.0, 16.0, 15.0]), 60.0)
    assert mean.ratio == pytest.approx(ratio) and mean.is_below_floor is is_below
    assert [row.ours for row in rest] == [15.0, 16.0, 40.0, 3]
