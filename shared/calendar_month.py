"""A calendar month in UTC, as statements are cut: written `YYYY-MM`, half open.

In UTC there is no daylight saving. POSIX time has no leap seconds: a moment within one (23:59:60) is told by clocks as
the first second of the next day, and so belongs to the next month.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime

_MONTH = re.compile(r"(2\d{3})-(0[1-9]|1[0-2])", re.ASCII)


@dataclass(frozen=True, slots=True)
class CalendarMonth:
    """`end` is the first moment that is not in it."""

    name: str
    start: datetime
    end: datetime


def read_month(text: str) -> CalendarMonth | None:
    """The month that the text names; None for any other text, and for years before 2000 or after 2999."""
    match = _MONTH.fullmatch(text)
    if match is None:
        return None
    year, month = int(match[1]), int(match[2])
    following = (year + 1, 1) if month == 12 else (year, month + 1)
    return CalendarMonth(text, datetime(year, month, 1, tzinfo=UTC), datetime(*following, 1, tzinfo=UTC))
