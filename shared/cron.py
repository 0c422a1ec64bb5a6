"""Pure: times that repeat, in the five fields of cron: minute, hour, day of month, month, day of week.

1. A field is `*`, a number, a range `a-b`, either with a step `/n`, or a list of these with commas. Months and days of
   the week may be named by three letters; Sunday is 0 and 7.
2. If both days are restricted, a date fits that fits one of them, as in every cron.
3. Times are of the wall clock in a zone. One that a clock passes over in spring is taken as much later; one that
   comes twice in autumn is taken the first time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from zoneinfo import ZoneInfo, available_timezones

DAY_S = 86_400
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_PART = re.compile(r"(\*|([0-9a-z]{1,3})(?:-([0-9a-z]{1,3}))?)(?:/([0-9]{1,2}))?")
_MAX_TEXT = 100


@dataclass(frozen=True, slots=True)
class Cron:
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    week_days: frozenset[int]
    """0 is Sunday."""
    either_day: bool

    def fits(self, day: date) -> bool:
        in_month = day.day in self.days
        in_week = day.isoweekday() % 7 in self.week_days
        return day.month in self.months and (in_month or in_week if self.either_day else in_month and in_week)


@functools.lru_cache(maxsize=1024)
def parse_cron(text: str) -> Cron:
    """Return the times. Raises `ValueError` that says what is wrong."""
    fields = text.split()
    if len(text) > _MAX_TEXT or len(fields) != 5:
        raise ValueError("must have five fields: minute, hour, day of month, month, day of week")
    minutes, hours = _field(fields[0], "minute", 0, 59), _field(fields[1], "hour", 0, 23)
    days, months = _field(fields[2], "day of month", 1, 31), _field(fields[3], "month", 1, 12, _MONTHS, 1)
    week_days = {day % 7 for day in _field(fields[4], "day of week", 0, 7, _DAYS, 0)}
    return Cron(
        tuple(sorted(minutes)),
        tuple(sorted(hours)),
        frozenset(days),
        frozenset(months),
        frozenset(week_days),
        not fields[2].startswith("*") and not fields[4].startswith("*"),
    )


def is_time_zone(name: str) -> bool:
    return name in _zones()


def latest_start(cron: Cron, zone: str, now: float, within_s: float) -> float | None:
    """The latest time that fits in (now - within_s, now], in Unix seconds."""
    for day in _dates(zone, now, -int(within_s // DAY_S) - 2):
        for at in _times(cron, zone, day, reverse=True):
            if at <= now:
                return at if at > now - within_s else None
    return None


def next_start(cron: Cron, zone: str, now: float, within_s: float) -> float | None:
    """The first time that fits in (now, now + within_s], in Unix seconds."""
    for day in _dates(zone, now, int(within_s // DAY_S) + 2):
        for at in _times(cron, zone, day, reverse=False):
            if at > now:
                return at if at <= now + within_s else None
    return None


def _dates(zone: str, now: float, count: int) -> Iterator[date]:
    """Today in the zone, and so many days after it, or before it if the count is negative."""
    today = datetime.fromtimestamp(now, ZoneInfo(zone)).date()
    for days in range(abs(count)):
        yield today + timedelta(days=days if count > 0 else -days)


def _times(cron: Cron, zone: str, day: date, *, reverse: bool) -> list[float]:
    if not cron.fits(day):
        return []
    # Sorted as instants: a gap moves a time of the wall clock past one that comes after it.
    return sorted(
        (_unix_s(day, hour, minute, zone) for hour in cron.hours for minute in cron.minutes), reverse=reverse
    )


def _unix_s(day: date, hour: int, minute: int, zone: str) -> float:
    local = datetime.combine(day, time(hour, minute), ZoneInfo(zone))
    # Through the offset, which in a gap is the one before it: so that 02:30 becomes 03:30.
    return local.replace(tzinfo=timezone(local.utcoffset() or timedelta(0))).timestamp()


def _field(
    text: str, name: str, low: int, high: int, names: tuple[str, ...] = (), first: int = 0
) -> set[int]:
    found: set[int] = set()
    for part in text.lower().split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"{name}: {part[:20]!r} is not understood")
        everything, one, last, step_text = match.groups()
        if everything == "*":
            start, end = low, high
        else:
            start = _number(one, name, low, high, names, first)
            end = _number(last, name, low, high, names, first) if last else (high if step_text else start)
        step = int(step_text) if step_text else 1
        if step == 0 or end < start:
            raise ValueError(f"{name}: {part[:20]!r} is empty")
        found.update(range(start, end + 1, step))
    return found


def _number(text: str, name: str, low: int, high: int, names: tuple[str, ...], first: int) -> int:
    number = names.index(text) + first if text in names else int(text) if text.isdecimal() else -1
    if not low <= number <= high:
        raise ValueError(f"{name}: {text!r} is not between {low} and {high}")
    return number


@functools.cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())
