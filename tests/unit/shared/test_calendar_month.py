from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.calendar_month import read_month


@pytest.mark.parametrize(
    ("text", "start", "end", "days"),
    [
        ("2026-11", (2026, 11), (2026, 12), 30),
        ("2026-12", (2026, 12), (2027, 1), 31),
        ("2027-01", (2027, 1), (2027, 2), 31),
        ("2027-02", (2027, 2), (2027, 3), 28),
        ("2028-02", (2028, 2), (2028, 3), 29),
        ("2100-02", (2100, 2), (2100, 3), 28),
        # Clocks were changed in Europe and America: a UTC month has its days all the same
        ("2026-03", (2026, 3), (2026, 4), 31),
        ("2026-10", (2026, 10), (2026, 11), 31),
        # It ended with a leap second, which POSIX time does not count
        ("2016-12", (2016, 12), (2017, 1), 31),
    ],
)
def test_a_month_is_whole_utc_days(
    text: str, start: tuple[int, int], end: tuple[int, int], days: int
) -> None:
    month = read_month(text)
    assert month is not None and month.name == text
    assert (month.start, month.end) == (datetime(*start, 1, tzinfo=UTC), datetime(*end, 1, tzinfo=UTC))
    assert month.end - month.start == timedelta(days=days)
    assert (month.end.timestamp() - month.start.timestamp()) == days * 86_400


@pytest.mark.parametrize(
    "text", ["", "2026", "2026-1", "2026-00", "2026-13", "1999-12", "3000-01", "2026-11-01", " 2026-11", "2026-11\n", "２０２６-11"]
)  # fmt: skip
def test_anything_else_is_no_month(text: str) -> None:
    assert read_month(text) is None


@given(st.datetimes(datetime(2000, 1, 1), datetime(2999, 12, 31)), st.integers(-14, 14))
def test_every_moment_is_in_exactly_the_month_that_utc_says(moment: datetime, offset_h: int) -> None:
    here = moment.replace(tzinfo=UTC).astimezone(timezone(timedelta(hours=offset_h)))
    month = read_month(moment.strftime("%Y-%m"))
    assert month is not None and month.start <= here < month.end
