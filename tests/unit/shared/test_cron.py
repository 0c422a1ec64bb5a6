"""Times that repeat: what the five fields mean, and what clocks that are put forward and back do to them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cron import DAY_S, is_time_zone, latest_start, next_start, parse_cron

WEEK_S = 7 * DAY_S


def unix(text: str) -> float:
    return datetime.fromisoformat(text).astimezone(UTC).timestamp()


@pytest.mark.parametrize(
    ("cron", "zone", "now", "before", "after"),
    [
        ("0 8 * * *", "UTC", "2026-11-25T08:00Z", "2026-11-25T08:00Z", "2026-11-26T08:00Z"),
        ("0 8 * * *", "UTC", "2026-11-25T07:59Z", "2026-11-24T08:00Z", "2026-11-25T08:00Z"),
        ("*/20 9-10 * * *", "UTC", "2026-11-25T09:30Z", "2026-11-25T09:20Z", "2026-11-25T09:40Z"),
        ("5,50 23 * * *", "UTC", "2026-11-25T23:30Z", "2026-11-25T23:05Z", "2026-11-25T23:50Z"),
        # 28 November 2026 is a Saturday.
        ("0 8 * * mon-fri", "UTC", "2026-11-28T12:00Z", "2026-11-27T08:00Z", "2026-11-30T08:00Z"),
        ("0 8 * * 7", "UTC", "2026-11-28T12:00Z", "2026-11-22T08:00Z", "2026-11-29T08:00Z"),
        ("0 8 * * 0", "UTC", "2026-11-28T12:00Z", "2026-11-22T08:00Z", "2026-11-29T08:00Z"),
        ("0 0 1 dec *", "UTC", "2026-11-28T12:00Z", None, "2026-12-01T00:00Z"),
        # One of the two days is enough where both are restricted.
        ("0 0 27 * sun", "UTC", "2026-11-28T12:00Z", "2026-11-27T00:00Z", "2026-11-29T00:00Z"),
        ("0 9 * * *", "Asia/Tokyo", "2026-11-25T00:30Z", "2026-11-25T00:00Z", "2026-11-26T00:00Z"),
        # The clock goes from 02:00 to 03:00 on 29 March 2026: half past two is half past three.
        ("30 2 * * *", "Europe/Berlin", "2026-03-29T01:29Z", "2026-03-28T01:30Z", "2026-03-29T01:30Z"),
        ("30 2 * * *", "Europe/Berlin", "2026-03-29T01:30Z", "2026-03-29T01:30Z", "2026-03-30T00:30Z"),
        # It goes from 03:00 to 02:00 on 25 October 2026: half past two is the first of the two.
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:29Z", "2026-10-24T00:30Z", "2026-10-25T00:30Z"),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T01:30Z", "2026-10-25T00:30Z", "2026-10-26T01:30Z"),
        # 02:30, which the clock skips, is the same moment as 03:30.
        ("30 2,3 * * *", "Europe/Berlin", "2026-03-29T01:31Z", "2026-03-29T01:30Z", "2026-03-30T00:30Z"),
        ("0 0 30 2 *", "UTC", "2026-11-28T12:00Z", None, None),
    ],
)
def test_the_start_before_and_the_start_after(
    cron: str, zone: str, now: str, before: str | None, after: str | None
) -> None:
    times = parse_cron(cron)
    assert latest_start(times, zone, unix(now), WEEK_S) == (before and unix(before))
    assert next_start(times, zone, unix(now), WEEK_S) == (after and unix(after))


@pytest.mark.parametrize(
    ("cron", "words"),
    [
        ("0 8 * *", "five fields"),
        ("0 8 * * * *", "five fields"),
        ("0 8 * * " + "1," * 60 + "1", "five fields"),
        ("60 8 * * *", "minute: '60' is not between 0 and 59"),
        ("0 24 * * *", "hour: '24'"),
        ("0 8 0 * *", "day of month: '0'"),
        ("0 8 * 13 *", "month: '13'"),
        ("0 8 * mon *", "month: 'mon'"),
        ("0 8 * * 8", "day of week: '8'"),
        ("0 17-8 * * *", "hour: '17-8' is empty"),
        ("*/0 8 * * *", "minute: '*/0' is empty"),
        ("-1 8 * * *", "minute: '-1' is not understood"),
        ("0;8 8 * * *", "minute: '0;8' is not understood"),
        ("٣ 8 * * *", "minute: '٣' is not understood"),
    ],
)
def test_what_is_wrong_is_named(cron: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_cron(cron)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["Europe", "", "../UTC", "Europe/Nowhere", "/etc/passwd", "europe/berlin"])
def test_no_time_zone(name: str) -> None:
    assert not is_time_zone(name)
    assert is_time_zone("Europe/Berlin") and is_time_zone("UTC")


@given(
    cron=st.sampled_from(["0 8 * * *", "*/7 * * * *", "30 2 * * sun", "59 23 28-31 * *", "15 */5 1 * mon"]),
    zone=st.sampled_from(
        ["UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Asia/Kathmandu"]
    ),
    now=st.integers(int(unix("2025-12-01T00:00Z")), int(unix("2027-02-01T00:00Z"))),
)
def test_the_next_start_is_the_latest_once_it_has_come_and_none_lies_between(
    cron: str, zone: str, now: int
) -> None:
    times = parse_cron(cron)
    after = next_start(times, zone, now, 60 * DAY_S)
    before = latest_start(times, zone, now, 60 * DAY_S)
    assert after is not None and before is not None and before <= now < after
    assert latest_start(times, zone, after, 1.0) == after
    assert next_start(times, zone, before, 61 * DAY_S) == after
