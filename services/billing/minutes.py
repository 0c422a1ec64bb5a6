"""Pure: the minutes that each seat of a resource is billed for, and what is still to be posted of them.

Times are integer Unix microseconds UTC, the resolution of the database; hours are UTC hours, so there is no daylight
saving in here, and POSIX time has no leap seconds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from services.billing.instants import HOUR_US, MINUTE_US
from services.billing.pricing import minutes_amount_nanousd

SETTLED_AFTER_H = 2
"""Hours before the current one that every pass looks at again: heartbeats may be proved a little late."""


@dataclass(frozen=True, slots=True)
class LiveInterval:
    """A replica was live at this seat, and heartbeats have proved it until `proved_us`."""

    resource_id: str
    team_id: str
    place: int
    hourly_rate_nanousd: int
    started_us: int
    proved_us: int


class HourKey(NamedTuple):
    """What is charged on its own: one seat, one UTC hour, one rate."""

    resource_id: str
    place: int
    hour_us: int
    hourly_rate_nanousd: int


@dataclass(frozen=True, slots=True)
class PostedMinutes:
    """What the ledger already has for one `HourKey`."""

    team_id: str
    minutes: int
    posted_nanousd: int
    postings: int


@dataclass(frozen=True, slots=True)
class MinutePosting:
    """One transaction to post, and the new state of its key afterwards."""

    key: HourKey
    team_id: str
    minutes: int
    amount_nanousd: int
    difference_nanousd: int
    posting_no: int


def first_hour_us(now_us: int, caught_up_us: int | None, lookback_h: int) -> int:
    """The start of the first hour to look at. Always a full hour, so that an hour is never seen in part.

    1. Normally `SETTLED_AFTER_H` hours before the current one.
    2. After an outage: from the hour that was caught up with last.
    3. Never more than `lookback_h` back; that far if nothing was ever posted.
    """
    this_hour_us = now_us // HOUR_US * HOUR_US
    earliest_us = this_hour_us - lookback_h * HOUR_US
    if caught_up_us is None:
        return earliest_us
    return max(earliest_us, min(caught_up_us // HOUR_US * HOUR_US, this_hour_us - SETTLED_AFTER_H * HOUR_US))


def billed_minutes(intervals: Iterable[LiveInterval], first_us: int) -> dict[HourKey, int]:
    """Minutes of each seat, hour and rate, for hours that start at or after `first_us` (the start of an hour).

    `intervals` must hold all that overlap those hours, in any order; parts before `first_us` are left out.

    1. Live time of a seat is the union of its intervals. Where two rates overlap (should not be), the lower counts.
    2. Within an hour, live time is counted on in minutes from the first live moment; a begun minute is a whole one.
       So an hour has ceil(live seconds / 60) minutes, at most 60, however often the replica came and went.
    3. A minute belongs to the rate at which it begins: one that is shared by two rates belongs to the earlier.
    """
    by_seat: dict[tuple[str, int], list[LiveInterval]] = defaultdict(list)
    for interval in intervals:
        by_seat[interval.resource_id, interval.place].append(interval)
    minutes: Counter[HourKey] = Counter()
    for (resource_id, place), seat in by_seat.items():
        counted_us: Counter[int] = Counter()
        for start_us, end_us, rate in _cut_at_hours(_live_segments(seat), first_us):
            hour_us = start_us // HOUR_US * HOUR_US
            before_us = counted_us[hour_us]
            after_us = before_us + end_us - start_us
            counted_us[hour_us] = after_us
            begun = _minutes_begun(after_us) - _minutes_begun(before_us)  # 2, 3
            if begun:
                minutes[HourKey(resource_id, place, hour_us, rate)] += begun
    return dict(minutes)


def _minutes_begun(live_us: int) -> int:
    return -(-live_us // MINUTE_US)


def _live_segments(seat: Iterable[LiveInterval]) -> Iterator[tuple[int, int, int]]:
    """Disjoint (start, end, rate) in order of time; rule 1."""
    edges = []
    for interval in seat:
        if interval.proved_us > interval.started_us:
            edges.append((interval.started_us, 1, interval.hourly_rate_nanousd))
            edges.append((interval.proved_us, -1, interval.hourly_rate_nanousd))
    edges.sort()
    live: Counter[int] = Counter()
    since_us = 0
    for at_us, change, rate in edges:
        if live and at_us > since_us:
            yield since_us, at_us, min(live)
        since_us = at_us
        live[rate] += change
        if live[rate] == 0:
            del live[rate]


def _cut_at_hours(segments: Iterable[tuple[int, int, int]], first_us: int) -> Iterator[tuple[int, int, int]]:
    for start_us, end_us, rate in segments:
        start_us = max(start_us, first_us)
        while start_us < end_us:
            border_us = min(end_us, (start_us // HOUR_US + 1) * HOUR_US)
            yield start_us, border_us, rate
            start_us = border_us


def postings_due(
    minutes: Mapping[HourKey, int], teams: Mapping[str, str], posted: Mapping[HourKey, PostedMinutes]
) -> list[MinutePosting]:
    """The differences between what is billed and what was posted, oldest hour first.

    teams: team of each resource in `minutes`. posted: all rows of the same hours. Intervals only grow, so a difference
    is negative only if a later fact moved a minute from one rate to another; then it gives back what was too much.
    """
    due = []
    for key in sorted(minutes.keys() | posted.keys(), key=lambda k: (k.hour_us, k)):
        before = posted.get(key)
        amount = minutes_amount_nanousd(key.hourly_rate_nanousd, minutes.get(key, 0))
        difference = amount - (before.posted_nanousd if before else 0)
        if difference == 0:
            continue
        due.append(
            MinutePosting(
                key=key,
                team_id=before.team_id if before else teams[key.resource_id],
                minutes=minutes.get(key, 0),
                amount_nanousd=amount,
                difference_nanousd=difference,
                posting_no=(before.postings if before else 0) + 1,
            )
        )
    return due
