"""Queues in thought, for each number of workers; and what swaps cost a job."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.crowds import HOUR_S, USUAL_S, Crowds, SeenCrowds, Terms, Worth, worth_of
from services.scheduler.swap_cost import mean_swap_s
from shared.messages import ModelHistory, WorkerReport

FORGET_S = 300.0


def after(*steps: tuple[float, float], **terms: float) -> Crowds:
    """(requests that come, seconds that pass); each is a second's work of one worker."""
    crowds, now = Crowds(4), 0.0
    for requests, passed_s in steps:
        now += passed_s
        crowds.pass_time(
            requests,
            1.0,
            now,
            passed_s,
            Terms(**{"wait_s": 5.0, "least_share": 1.0, "forget_s": FORGET_S, **terms}),
        )
    return crowds


def late(crowds: Crowds) -> list[float]:
    seen = crowds.seen()
    return [] if seen is None else [round(each, 1) for each in seen.late]


@pytest.mark.parametrize(
    ("crowds", "expected"),
    [
        (after(), []),
        (after((1, 1)), []),  # done as it came
        (after((6, 1)), []),
        # Of ten, one worker does one as they come; four of the others wait longer than five seconds.
        (after((10, 1)), [4.0]),
        (after((30, 1)), [24.0, 18.0, 12.0, 6.0]),
        (after((10, 1), wait_s=2.0), [7.0, 4.0, 1.0]),
        # Each is two seconds' work of a worker that is to be half busy.
        (after((10, 1), utilisation=0.5), [7.0, 4.0, 1.0]),
        # What is done meanwhile waits for none.
        (after((10, 1), (0, 5)), [3.9]),
        # The second crowd comes before the first is done, or after.
        (after((10, 1), (10, 1)), [13.9, 6.0]),
        (after((10, 1), (0, 5), (10, 1)), [11.9]),
        (after((10, 1), (0, 20), (10, 1)), [7.7]),
    ],
)
def test_who_is_late_with_how_many(crowds: Crowds, expected: list[float]) -> None:
    assert late(crowds) == pytest.approx(expected, abs=0.11)


def test_the_late_are_forgotten_in_minutes_and_how_many_came_in_an_hour() -> None:
    before, after_it = after((100, 1)).seen(), after((100, 1), (0, FORGET_S)).seen()
    assert before is not None and after_it is not None
    assert after_it.late[0] == pytest.approx(before.late[0] / math.e, rel=0.01)
    assert after_it.requests == pytest.approx(before.requests * math.exp(-FORGET_S / HOUR_S), rel=0.01)
    assert after((100, 1), (0, 1e6)).seen() is None


def test_no_worker_counts_for_more_than_some_times_what_it_has_to() -> None:
    # Thirty came; with four workers six of them are late, with each fewer six more.
    assert late(after((30, 1), least_share=0.03)) == [21.6, 16.2, 10.8, 5.4]  # 6 * 0.03 * 30
    # However long too few would have been behind, they are forgotten as soon.
    for seconds in (60, 600, 3600):
        busy = [(3.5, 1.0)] * seconds
        ends = [after(*busy, (0, 11 + since), least_share=0.02).seen() for since in (0, 2.2 * FORGET_S)]
        assert [worth_of(seen, 0.02).workers for seen in ends if seen is not None] == [4, 1]


def test_what_usually_comes_is_a_mean_of_minutes() -> None:
    found = after(*[(3, 1)] * round(USUAL_S)).seen()
    assert found is not None and found.usual_per_s == pytest.approx(3 * (1 - 1 / math.e), rel=0.01)


def test_too_few_for_hours_are_not_behind_for_hours_afterwards() -> None:
    hour = [(3.5, 1.0)] * 3600
    ended, later = after(*hour, (0, 11)), after(*hour, (0, 11), (4, 1))
    assert len(late(ended)) == 3, "four workers do what comes"
    grown = [a - b for a, b in zip(late(later), late(ended), strict=True)]
    assert max(grown) <= 0, "one that comes after the end waits for none of those before it"


def seen(requests: float, *late: float) -> SeenCrowds:
    return SeenCrowds(at=0.0, requests=requests, usual_per_s=0.0, late=list(late))


@pytest.mark.parametrize(
    ("crowds", "least_share", "worth"),
    [
        (seen(1000), 0.01, Worth(1, 0.0)),
        (seen(1000, 9), 0.01, Worth(1, 0.0)),
        (seen(1000, 11), 0.01, Worth(2, 11.0)),
        (seen(1000, 100, 50, 25, 12), 0.01, Worth(5, 12.0)),
        (seen(1000, 100, 50, 20, 9), 0.01, Worth(4, 20.0)),
        # A second one alone is not worth it, nor is a third; three more together spare 32 late answers.
        (seen(1000, 32, 25, 18), 0.01, Worth(4, 18.0)),
        (seen(1000, 29, 25, 18), 0.01, Worth(1, 0.0)),
        (seen(10_000, 100, 50, 25, 12), 0.01, Worth(1, 0.0)),
        (seen(0), 0.01, Worth(1, 0.0)),
    ],
)
def test_as_many_as_were_worth_it(crowds: SeenCrowds, least_share: float, worth: Worth) -> None:
    assert worth_of(crowds, least_share) == worth


times = st.lists(st.tuples(st.integers(0, 10_000), st.floats(0.1, 60)), max_size=30)


@given(times, st.floats(0.1, 100), st.floats(0.001, 1), st.floats(0.001, 1))
def test_more_workers_are_late_with_fewer_and_who_asks_for_more_gets_fewer(
    steps: list[tuple[float, float]], wait_s: float, one: float, other: float
) -> None:
    found = after(*steps, wait_s=wait_s).seen()
    if found is None:
        return
    assert found.late == sorted(found.late, reverse=True)
    less, more = sorted((one, other))
    assert 5 >= worth_of(found, less).workers >= worth_of(found, more).workers >= 1


def test_the_next_leader_goes_on_with_what_was_seen() -> None:
    first = after((100, 1), (0, 60), (50, 1))
    found = first.seen()
    assert found is not None
    second = Crowds(4, msgspec.json.decode(msgspec.json.encode(found), type=SeenCrowds))
    for crowds in (first, second):
        crowds.pass_time(0.0, 1.0, 200.0, 138.0, Terms())
    assert late(second) == pytest.approx(late(first), abs=0.1)
    ours, theirs = first.seen(), second.seen()
    assert ours is not None and theirs is not None
    assert theirs.at == ours.at and theirs.requests == pytest.approx(ours.requests, abs=0.001)
    assert theirs.usual_per_s == pytest.approx(ours.usual_per_s, abs=1e-5)


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
