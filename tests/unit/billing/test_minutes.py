"""Minutes of seats: union, hours, rates, and what is posted of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.instants import HOUR_US, MINUTE_US, from_unix_us, to_unix_us
from services.billing.minutes import (
    HourKey,
    LiveInterval,
    MinutePosting,
    PostedMinutes,
    billed_minutes,
    first_hour_us,
    postings_due,
)
from services.billing.rounds import minute_charge

SECOND_US = 1_000_000
HOUR0_US = to_unix_us(datetime(2026, 10, 25, 0, tzinfo=UTC))
RATE = 1_200_000_000


def live(
    start_s: float, end_s: float, *, rate: int = RATE, place: int = 0, resource: str = "res"
) -> LiveInterval:
    return LiveInterval(
        resource_id=resource,
        team_id="team_a",
        place=place,
        hourly_rate_nanousd=rate,
        started_us=HOUR0_US + int(start_s * SECOND_US),
        proved_us=HOUR0_US + int(end_s * SECOND_US),
    )


def by_hour(intervals: list[LiveInterval]) -> dict[tuple[int, int], int]:
    """Minutes by (hour number from HOUR0, rate), for tests of one seat."""
    return {
        ((key.hour_us - HOUR0_US) // HOUR_US, key.hourly_rate_nanousd): minutes
        for key, minutes in billed_minutes(intervals, HOUR0_US).items()
    }


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        pytest.param([], {}, id="nothing"),
        pytest.param([live(0, 0)], {}, id="ready-but-nothing-proved"),
        pytest.param([live(0, 0.000001)], {(0, RATE): 1}, id="a-microsecond-begins-a-minute"),
        pytest.param([live(5, 65)], {(0, RATE): 1}, id="a-minute-need-not-start-on-the-minute"),
        pytest.param([live(0, 60.000001)], {(0, RATE): 2}, id="a-bit-more-than-a-minute"),
        pytest.param([live(0, 3600)], {(0, RATE): 60}, id="a-full-hour"),
        pytest.param(
            [live(3570, 3630)], {(0, RATE): 1, (1, RATE): 1}, id="an-hour-border-rounds-up-on-both-sides"
        ),
        pytest.param([live(0, 7200)], {(0, RATE): 60, (1, RATE): 60}, id="two-hours"),
        pytest.param([live(0, 1230), live(600, 900)], {(0, RATE): 21}, id="overlap-counts-once"),
        pytest.param(
            [live(s, s + 1) for s in range(0, 600, 10)], {(0, RATE): 1}, id="flapping-is-not-charged-per-flap"
        ),
        pytest.param(
            [live(0, 1230, rate=1), live(1230, 3600, rate=2)], {(0, 1): 21, (0, 2): 39}, id="shared-minute"
        ),
        pytest.param([live(0, 30, rate=1), live(30, 60, rate=2)], {(0, 1): 1}, id="one-minute-of-two-rates"),
        pytest.param(
            [live(0, 30, rate=1), live(40, 90, rate=2)], {(0, 1): 1, (0, 2): 1}, id="shared-across-a-gap"
        ),
        pytest.param(
            [live(0, 600, rate=2), live(300, 600, rate=1)], {(0, 1): 5, (0, 2): 5}, id="overlap-of-rates"
        ),
    ],
)
def test_billed_minutes(intervals: list[LiveInterval], expected: dict[tuple[int, int], int]) -> None:
    assert by_hour(intervals) == expected


def test_places_and_resources_are_charged_apart() -> None:
    minutes = billed_minutes([live(0, 60), live(0, 60, place=1), live(0, 60, resource="other")], HOUR0_US)
    assert sorted((k.resource_id, k.place, m) for k, m in minutes.items()) == [
        ("other", 0, 1),
        ("res", 0, 1),
        ("res", 1, 1),
    ]


def test_hours_before_the_first_are_left_out_and_the_others_are_whole() -> None:
    intervals = [live(-7200, 600)]
    assert by_hour(intervals) == {(0, RATE): 10}


@pytest.mark.parametrize(
    "border",
    [
        datetime(2026, 12, 31, 23, tzinfo=UTC),  # a year ends
        datetime(2028, 2, 28, 23, tzinfo=UTC),  # a leap day begins
        datetime(2026, 3, 29, 0, tzinfo=UTC),  # summer time begins in Europe
        datetime(2026, 10, 25, 0, tzinfo=UTC),  # and ends
        datetime(2016, 12, 31, 23, tzinfo=UTC),  # had a leap second, which POSIX time does not
    ],
)
def test_every_hour_has_sixty_minutes(border: datetime) -> None:
    first_us = to_unix_us(border)
    interval = LiveInterval("res", "team_a", 0, RATE, first_us, first_us + 3 * HOUR_US)
    assert list(billed_minutes([interval], first_us).values()) == [60, 60, 60]


_points = st.integers(0, 3 * 3600 * 1000)  # milliseconds over three hours


@st.composite
def _single_rate(draw: st.DrawFn) -> list[LiveInterval]:
    pairs = draw(st.lists(st.tuples(_points, _points), min_size=1, max_size=8))
    return [live(min(a, b) / 1000, max(a, b) / 1000) for a, b in pairs]


@st.composite
def _rates_in_turn(draw: st.DrawFn) -> list[LiveInterval]:
    """A seat as it is: one replica after the other, each at the rate of its time."""
    borders = sorted(draw(st.lists(_points, min_size=2, max_size=10)))
    rates = draw(st.lists(st.integers(1, 3), min_size=len(borders) - 1, max_size=len(borders) - 1))
    return [live(a / 1000, b / 1000, rate=r) for a, b, r in zip(borders, borders[1:], rates, strict=False)]


@given(_single_rate(), st.randoms(), _points)
def test_order_duplication_and_splitting_change_no_minute(
    intervals: list[LiveInterval], random: Any, cut_ms: int
) -> None:
    cut_us = HOUR0_US + cut_ms * 1000
    pieces = [piece for interval in intervals for piece in split(interval, cut_us)] * 2
    random.shuffle(pieces)
    assert billed_minutes(pieces, HOUR0_US) == billed_minutes(intervals, HOUR0_US)


@given(_rates_in_turn(), st.randoms(), _points)
def test_splitting_changes_no_minute_of_any_rate(
    intervals: list[LiveInterval], random: Any, cut_ms: int
) -> None:
    pieces = [piece for interval in intervals for piece in split(interval, HOUR0_US + cut_ms * 1000)]
    random.shuffle(pieces)
    assert billed_minutes(pieces, HOUR0_US) == billed_minutes(intervals, HOUR0_US)


@given(st.one_of(_single_rate(), _rates_in_turn()))
def test_minutes_are_the_union_rounded_up_once_per_hour(intervals: list[LiveInterval]) -> None:
    """Against the rule said naively: count the live milliseconds of each hour one after the other."""
    minutes = billed_minutes(intervals, HOUR0_US)
    for hour in range(3):
        hour_us = HOUR0_US + hour * HOUR_US
        spans = sorted((max(i.started_us, hour_us), min(i.proved_us, hour_us + HOUR_US)) for i in intervals)
        live_us, reached_us = 0, hour_us
        for start_us, end_us in spans:
            live_us += max(0, end_us - max(start_us, reached_us))
            reached_us = max(reached_us, end_us)
        in_all = sum(m for key, m in minutes.items() if key.hour_us == hour_us)
        assert in_all == (live_us + MINUTE_US - 1) // MINUTE_US
        assert in_all <= 60


@given(_rates_in_turn(), _points)
def test_posting_as_the_hours_go_on_only_adds_and_ends_at_the_same_sum(
    intervals: list[LiveInterval], now_ms: int
) -> None:
    # Given what was proved until some moment, posted
    seen = [clip(i, HOUR0_US + now_ms * 1000) for i in intervals if i.started_us <= HOUR0_US + now_ms * 1000]
    early = postings_due(billed_minutes(seen, HOUR0_US), {"res": "team_a"}, {})
    posted = after(early)
    # When the rest is known
    late = postings_due(billed_minutes(intervals, HOUR0_US), {"res": "team_a"}, posted)
    # Then only differences are added, and the sum is as if it had been posted at once
    assert all(posting.difference_nanousd > 0 for posting in early + late)
    at_once = postings_due(billed_minutes(intervals, HOUR0_US), {"res": "team_a"}, {})
    total = sum(p.difference_nanousd for p in early) + sum(p.difference_nanousd for p in late)
    assert total == sum(p.difference_nanousd for p in at_once)
    assert postings_due(billed_minutes(intervals, HOUR0_US), {"res": "team_a"}, posted | after(late)) == []


def test_a_posting_gives_back_what_another_rate_took() -> None:
    key = HourKey("res", 0, HOUR0_US, 600)
    due = postings_due({}, {}, {key: PostedMinutes("team_a", 2, 20, 3)})
    assert [(p.difference_nanousd, p.amount_nanousd, p.posting_no) for p in due] == [(-20, 0, 4)]
    assert minute_charge(due[0]).kind == "correction"


def test_postings_come_oldest_hour_first() -> None:
    minutes = billed_minutes([live(0, 7200, place=1), live(0, 7200)], HOUR0_US)
    due = postings_due(minutes, {"res": "team_a"}, {})
    assert [(p.key.hour_us, p.key.place) for p in due] == [
        (HOUR0_US, 0),
        (HOUR0_US, 1),
        (HOUR0_US + HOUR_US, 0),
        (HOUR0_US + HOUR_US, 1),
    ]


def test_a_charge_of_minutes_is_unique_by_seat_hour_rate_and_posting() -> None:
    posting = MinutePosting(HourKey("res", 2, HOUR0_US, 600), "team_a", 7, 70, 10, 3)
    charge = minute_charge(posting)
    assert charge.unique_key == "minutes:res:2:2026-10-25T00Z:600:3"
    assert (charge.kind, charge.amount_nanousd, charge.hour) == ("minutes", 10, from_unix_us(HOUR0_US))


@pytest.mark.parametrize(
    ("caught_up_h", "lookback_h", "expected_h"),
    [(None, 10, -10), (0, 10, -2), (-1, 10, -2), (-5, 10, -5), (-50, 10, -10), (3, 10, -2)],
)
def test_first_hour(caught_up_h: int | None, lookback_h: int, expected_h: int) -> None:
    caught_up_us = None if caught_up_h is None else HOUR0_US + caught_up_h * HOUR_US + 17 * MINUTE_US
    now_us = HOUR0_US + 59 * MINUTE_US
    assert first_hour_us(now_us, caught_up_us, lookback_h) == HOUR0_US + expected_h * HOUR_US


def split(interval: LiveInterval, cut_us: int) -> list[LiveInterval]:
    if not interval.started_us < cut_us < interval.proved_us:
        return [interval]
    return [clip(interval, cut_us), _from(interval, cut_us)]


def clip(interval: LiveInterval, until_us: int) -> LiveInterval:
    return LiveInterval(
        interval.resource_id,
        interval.team_id,
        interval.place,
        interval.hourly_rate_nanousd,
        interval.started_us,
        min(interval.proved_us, until_us),
    )


def _from(interval: LiveInterval, start_us: int) -> LiveInterval:
    return LiveInterval(
        interval.resource_id,
        interval.team_id,
        interval.place,
        interval.hourly_rate_nanousd,
        start_us,
        interval.proved_us,
    )


def after(postings: list[MinutePosting]) -> dict[HourKey, PostedMinutes]:
    return {p.key: PostedMinutes(p.team_id, p.minutes, p.amount_nanousd, p.posting_no) for p in postings}
