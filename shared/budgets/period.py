"""Which day and month an amount counts in: the one rule that gateways (which reserve) and billing (which posts) share.

A team's credit is a budget without an end: its one period is `ever`. Days and months are UTC. A job counts when it was accepted, a minute in its hour, whatever the time of the posting.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Literal

Period = Literal["day", "month", "ever"]
CREDIT_PREFIX = "credit:"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def day_of(unix_ms: int) -> date:
    return (EPOCH + timedelta(milliseconds=unix_ms)).date()


def period_start(period: Period, day: date) -> date:
    """The first day of the period that the day belongs to."""
    if period == "ever":
        return EPOCH.date()
    return day if period == "day" else day.replace(day=1)


def period_end(period: Period, start: date) -> date:
    """The first day after the period that begins on `start`."""
    if period == "ever":
        return date.max
    return start + timedelta(days=1) if period == "day" else (start + timedelta(days=31)).replace(day=1)


def credit_budget_id(team_id: str) -> str:
    """What leases on a team's credit are of."""
    return CREDIT_PREFIX + team_id


def credit_team(budget_id: str) -> str | None:
    """The team whose credit it is; None for an ordinary budget."""
    return budget_id.removeprefix(CREDIT_PREFIX) if budget_id.startswith(CREDIT_PREFIX) else None
