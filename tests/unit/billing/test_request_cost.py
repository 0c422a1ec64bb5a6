"""What a request bears of a GPU's minute: rules as a table, and that no nano-dollar is lost or made."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.billing.instants import HOUR_US, MINUTE_US
from services.billing.minutes import LiveInterval
from services.billing.request_cost import GpuWork, share_hour, split

HOUR = 495_000 * HOUR_US
SECOND = 1_000_000


def live(start_s: int, end_s: int, place: int = 0) -> LiveInterval:
    return LiveInterval("res_a", "team_a", place, 60_000, HOUR + start_s * SECOND, HOUR + end_s * SECOND)


def ran(job_id: str, start_s: int, end_s: int, worker_id: str = "w0") -> GpuWork:
    return GpuWork(job_id, worker_id, HOUR + start_s * SECOND, HOUR + end_s * SECOND)


MINUTE_LIVE = [live(0, 60)]


@pytest.mark.parametrize(
    ("intervals", "work", "shares", "idle"),
    [
        # One request for a quarter of the minute bears a quarter; the rest was idle
        (MINUTE_LIVE, [ran("a", 0, 15)], {"a": 250}, 750),
        # One after the other: each its own time
        (MINUTE_LIVE, [ran("a", 0, 15), ran("b", 15, 45)], {"a": 250, "b": 500}, 250),
        # Side by side on one GPU: the busy time counts once, and they share it by their own times
        (MINUTE_LIVE, [ran("a", 0, 30), ran("b", 0, 30)], {"a": 250, "b": 250}, 500),
        (MINUTE_LIVE, [ran("a", 0, 30), ran("b", 0, 15)], {"a": 333, "b": 167}, 500),
        # Side by side on two GPUs, each live for the minute: half of the capacity was busy
        ([live(0, 60), live(0, 60, 1)], [ran("a", 0, 30), ran("b", 0, 30, "w1")], {"a": 250, "b": 250}, 500),
        # Across the border of two minutes: each minute costs half, and is shared on its own
        ([live(0, 120)], [ran("a", 50, 70)], {"a": 166}, 834),
        # Not live yet, or no more: that time costs nothing
        ([live(30, 60)], [ran("a", 70, 100)], {"a": 0}, 1000),
        # Before and after the hour is another hour's
        ([live(-600, 60)], [ran("a", -30, 30)], {"a": 500}, 500),
        # More work than live time (clocks of two machines): all of it busy, never more
        ([live(0, 30)], [ran("a", 0, 60)], {"a": 1000}, 0),
        # Nothing ran; nothing was live
        (MINUTE_LIVE, [], {}, 1000),
        ([], [ran("a", 0, 30)], {"a": 0}, 1000),
        # A place whose intervals overlap or touch is live once
        ([live(0, 40), live(20, 60)], [ran("a", 0, 60)], {"a": 1000}, 0),
    ],
)
def test_share_hour(
    intervals: list[LiveInterval], work: list[GpuWork], shares: dict[str, int], idle: int
) -> None:
    shared = share_hour(1000, HOUR, intervals, work)
    assert (dict(shared.shares), shared.idle_nanousd) == (shares, idle)


@pytest.mark.parametrize(
    ("amount", "weights", "parts"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (11, [1, 1, 1], [4, 4, 3]),
        (1, [1, 2], [0, 1]),
        (100, [0, 5], [0, 100]),
        (7, [], []),
        (7, [0, 0], [0, 0]),
        (10**18 + 1, [10**15, 10**15], [5 * 10**17 + 1, 5 * 10**17]),
    ],
)
def test_split(amount: int, weights: list[int], parts: list[int]) -> None:
    assert split(amount, weights) == parts


spans = st.tuples(st.integers(-HOUR_US, 2 * HOUR_US), st.integers(0, 2 * HOUR_US))
intervals_of = st.lists(
    st.builds(
        lambda place, span: LiveInterval("r", "t", place, 1, HOUR + span[0], HOUR + span[0] + span[1]),
        st.integers(0, 2),
        spans,
    ),
    max_size=6,
)
work_of = st.lists(
    st.builds(
        lambda job, worker, span: GpuWork(f"j{job}", f"w{worker}", HOUR + span[0], HOUR + span[0] + span[1]),
        st.integers(0, 5),
        st.integers(0, 2),
        spans,
    ),
    max_size=8,
)


@settings(deadline=None)
@given(st.integers(0, 10**15), intervals_of, work_of)
def test_shares_and_idle_sum_exactly_to_what_the_hour_cost(
    cost: int, intervals: list[LiveInterval], work: list[GpuWork]
) -> None:
    shared = share_hour(cost, HOUR, intervals, work)
    assert sum(shared.shares.values()) + shared.idle_nanousd == cost == shared.cost_nanousd
    assert all(part >= 0 for part in shared.shares.values()) and shared.idle_nanousd >= 0
    assert shared.shares.keys() == shared.gpu_us.keys()


@settings(deadline=None)
@given(st.integers(0, 10**15), intervals_of, work_of)
def test_the_order_of_what_is_known_changes_nothing(
    cost: int, intervals: list[LiveInterval], work: list[GpuWork]
) -> None:
    assert share_hour(cost, HOUR, intervals, work) == share_hour(cost, HOUR, intervals[::-1], work[::-1])


@settings(deadline=None)
@given(st.integers(0, 10**12), st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_split_is_never_more_than_one_off(amount: int, weights: list[int]) -> None:
    parts, total = split(amount, weights), sum(weights)
    assert sum(parts) == (amount if total else 0)
    assert all(
        abs(part * total - amount * weight) < total for part, weight in zip(parts, weights, strict=True)
    ) or (not total)


@settings(deadline=None)
@given(st.integers(0, 59), st.integers(1, MINUTE_US))
def test_a_gpu_that_never_rests_costs_no_idle_time(minute: int, length_us: int) -> None:
    start = HOUR + minute * MINUTE_US
    one = LiveInterval("r", "t", 0, 1, start, start + length_us)
    assert share_hour(977, HOUR, [one], [GpuWork("a", "w", start, start + length_us)]).idle_nanousd == 0
