"""Which rate an hour has at each moment, and which rates can be set."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.instants import HOUR_US, MINUTE_US
from services.billing.minutes import HourKey, LiveInterval, billed_minutes
from services.billing.price_versions import WITHDRAWABLE_MS, withdrawal_refusal
from services.billing.rates import MAX_HOURLY_RATE_NANOUSD, Rate, rate_pieces, rate_refusal

HOUR0_US = 500_000 * HOUR_US
MADE_WITH = 7


def make_rate(rate: int, minute: int = 0, second: int = 0) -> Rate:
    return Rate(f"rate_{rate}", "opt_a", rate, HOUR0_US // 1000 + minute * 60_000 + second * 1000)


def make_interval(start_us: int, end_us: int) -> LiveInterval:
    return LiveInterval("res_a", "team_a", 0, MADE_WITH, HOUR0_US + start_us, HOUR0_US + end_us)


def minutes_by_rate(pieces: list[LiveInterval]) -> dict[int, int]:
    minutes: Counter[int] = Counter()
    for key, count in billed_minutes(pieces, HOUR0_US).items():
        minutes[key.hourly_rate_nanousd] += count
    return dict(minutes)


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([], {MADE_WITH: 30}),
        ([make_rate(1)], {1: 30}),
        ([make_rate(1, minute=50)], {1: 30}),
        ([make_rate(1), make_rate(2, minute=10)], {1: 10, 2: 20}),
        ([make_rate(2, minute=10), make_rate(1)], {1: 10, 2: 20}),
        ([make_rate(1), make_rate(2, minute=10, second=1)], {1: 11, 2: 19}),
        ([make_rate(1), make_rate(2, minute=10, second=59)], {1: 11, 2: 19}),
        ([make_rate(1), make_rate(2, minute=30)], {1: 30}),
        ([make_rate(1), make_rate(2, minute=29, second=59)], {1: 30}),
        ([make_rate(1), make_rate(2, minute=10), make_rate(3, minute=10, second=30)], {1: 10, 2: 1, 3: 19}),
        ([make_rate(1), make_rate(2, minute=5), make_rate(1, minute=10)], {1: 25, 2: 5}),
    ],
)
def test_each_minute_has_the_rate_at_which_it_begins(versions: list[Rate], expected: dict[int, int]) -> None:
    assert minutes_by_rate(rate_pieces(make_interval(0, 30 * MINUTE_US), versions)) == expected


@given(
    st.integers(0, 3 * HOUR_US),
    st.integers(0, 3 * HOUR_US),
    st.lists(st.tuples(st.integers(-HOUR_US // 1000, 4 * HOUR_US // 1000), st.integers(0, 5)), max_size=6),
)
def test_pieces_are_the_interval_and_no_minute_is_lost_or_doubled(
    start_us: int, length_us: int, versions: list[tuple[int, int]]
) -> None:
    interval = make_interval(start_us, start_us + length_us)
    rates = [Rate(f"r{n}", "opt_a", rate, HOUR0_US // 1000 + at) for n, (at, rate) in enumerate(versions)]
    pieces = rate_pieces(interval, rates)
    assert (pieces[0].started_us, pieces[-1].proved_us) == (interval.started_us, interval.proved_us)
    assert all(one.proved_us == next_.started_us for one, next_ in itertools.pairwise(pieces))
    assert hours_of(billed_minutes(pieces, HOUR0_US)) == hours_of(billed_minutes([interval], HOUR0_US))


def hours_of(minutes: dict[HourKey, int]) -> dict[int, int]:
    hours: Counter[int] = Counter()
    for key, count in minutes.items():
        hours[key.hour_us] += count
    return dict(hours)


NOW_MS = HOUR0_US // 1000
FIRST = [make_rate(1, minute=-60)]


@pytest.mark.parametrize(
    ("rate", "starts_unix_ms", "versions", "code"),
    [
        (0, NOW_MS, FIRST, None),
        (MAX_HOURLY_RATE_NANOUSD, NOW_MS + 1, FIRST, None),
        (MAX_HOURLY_RATE_NANOUSD + 1, NOW_MS, FIRST, "invalid_rate"),
        (-1, NOW_MS, FIRST, "invalid_rate"),
        (1, -1, FIRST, "invalid_rate"),
        (1, 10**15, FIRST, "invalid_rate"),
        (1, NOW_MS, [], "option_not_found"),
        (1, NOW_MS - 1, FIRST, "rate_starts_in_past"),
        (1, NOW_MS + 60_000, [*FIRST, make_rate(1, minute=1)], "rate_overlaps"),
        (1, FIRST[0].starts_unix_ms, FIRST, "rate_overlaps"),
    ],
)
def test_a_rate_is_refused_for_a_reason(
    rate: int, starts_unix_ms: int, versions: list[Rate], code: str | None
) -> None:
    refusal = rate_refusal(rate, starts_unix_ms, versions, NOW_MS)
    assert (refusal[0] if refusal else None) == code


@pytest.mark.parametrize(
    ("starts_unix_ms", "code"),
    [
        (None, "not_found"),
        (NOW_MS - 1, "price_in_force"),
        (NOW_MS, "price_in_force"),
        (NOW_MS + WITHDRAWABLE_MS - 1, "price_in_force"),
        (NOW_MS + WITHDRAWABLE_MS, None),
    ],
)
def test_what_has_begun_or_is_about_to_is_not_withdrawn(starts_unix_ms: int | None, code: str | None) -> None:
    refusal = withdrawal_refusal(starts_unix_ms, NOW_MS)
    assert (refusal[0] if refusal else None) == code
