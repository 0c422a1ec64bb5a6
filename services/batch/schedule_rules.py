"""Pure: which time of a schedule is due, and which comes next."""

from __future__ import annotations

from dataclasses import dataclass

from shared.cron import DAY_S, is_time_zone, latest_start, next_start, parse_cron

MISSED_S = float(DAY_S)
"""A time that passed while nobody looked still gets its batch for so long."""
AHEAD_S = 8 * 366.0 * DAY_S
"""The rarest time is a 29 February on a certain day of the week; what does not come within eight years never does."""


@dataclass(frozen=True, slots=True)
class Due:
    """due_unix_s: the time that gets a batch now; None: none does. next_unix_s: to look again; None: there is none."""

    due_unix_s: float | None
    next_unix_s: float | None


def find_due(cron: str, time_zone: str, next_unix_s: float, now_unix_s: float) -> Due:
    """Decide. The cron and the zone were checked when the schedule was made.

    1. The next time has not come -> nothing.
    2. It has -> the latest time that fits and is not after now is due: of several that were missed, this one alone.
    3. One that was missed for over a day is passed over.
    4. The next is the first that fits after now.
    """
    if now_unix_s < next_unix_s:  # 1
        return Due(None, next_unix_s)
    times = parse_cron(cron)
    latest = latest_start(times, time_zone, now_unix_s, MISSED_S)  # 2, 3
    return Due(latest, next_start(times, time_zone, now_unix_s, AHEAD_S))  # 4


def first_time(cron: str, time_zone: str, now_unix_s: float) -> float:
    """The first time after now. Raises `ValueError` that says what is wrong."""
    if not is_time_zone(time_zone):
        raise ValueError("time_zone must be a name such as UTC or Europe/Berlin")
    try:
        times = parse_cron(cron)
    except ValueError as error:
        raise ValueError(f"cron {error}") from error
    found = next_start(times, time_zone, now_unix_s, AHEAD_S)
    if found is None:
        raise ValueError("cron never comes")
    return found
