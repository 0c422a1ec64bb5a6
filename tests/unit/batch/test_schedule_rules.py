"""When a recurring batch is due: missed times, clock changes, what never comes."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from services.batch.schedule_rules import Due, find_due, first_time


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("next_at", "now", "due", "then"),
    [
        ("2026-03-02 02:00", "2026-03-02 01:59:59", None, "2026-03-02 02:00"),  # 1
        ("2026-03-02 02:00", "2026-03-02 02:00", "2026-03-02 02:00", "2026-03-03 02:00"),  # 2
        ("2026-03-02 02:00", "2026-03-02 02:00:01", "2026-03-02 02:00", "2026-03-03 02:00"),
        ("2026-03-02 02:00", "2026-03-03 01:59:59", "2026-03-02 02:00", "2026-03-03 02:00"),
        # several were missed: the latest alone
        ("2026-03-02 02:00", "2026-03-05 12:00", "2026-03-05 02:00", "2026-03-06 02:00"),
    ],
)
def test_daily(next_at: str, now: str, due: str | None, then: str) -> None:
    found = find_due("0 2 * * *", "UTC", at(next_at), at(now))
    assert found == Due(None if due is None else at(due), at(then))


def test_a_time_that_was_missed_for_over_a_day_is_passed_over() -> None:
    found = find_due("0 2 1 * *", "UTC", at("2026-03-01 02:00"), at("2026-03-02 02:00:01"))
    assert found == Due(None, at("2026-04-01 02:00"))
    found = find_due("0 2 1 * *", "UTC", at("2026-03-01 02:00"), at("2026-03-02 01:59:59"))
    assert found.due_unix_s == at("2026-03-01 02:00")


def test_nothing_is_due_from_before_it_went_on() -> None:
    """Paused over 02:00 and on again at 03:00: the time in the pause is no missed one."""
    found = find_due("0 2 * * *", "UTC", at("2026-03-03 02:00"), at("2026-03-02 03:00"))
    assert found == Due(None, at("2026-03-03 02:00"))


def test_clock_changes() -> None:
    berlin = "Europe/Berlin"
    # 02:30 does not exist on this night: it is taken an hour later by the clock, once.
    found = find_due("30 2 * * *", berlin, at("2026-03-29 01:30", "UTC"), at("2026-03-29 01:30", "UTC"))
    assert found == Due(at("2026-03-29 01:30", "UTC"), at("2026-03-30 00:30", "UTC"))
    # 02:30 comes twice: the first time.
    found = find_due("30 2 * * *", berlin, at("2026-10-25 00:30", "UTC"), at("2026-10-25 01:31", "UTC"))
    assert found == Due(at("2026-10-25 00:30", "UTC"), at("2026-10-26 01:30", "UTC"))


@pytest.mark.parametrize(
    ("cron", "zone", "problem"),
    [
        ("0 2 * *", "UTC", "five fields"),
        ("61 2 * * *", "UTC", "cron minute"),
        ("0 2 * * *", "Mars/Phobos", "time_zone"),
        ("0 2 30 2 *", "UTC", "never"),
    ],
)
def test_what_is_no_schedule_is_refused(cron: str, zone: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        first_time(cron, zone, at("2026-03-01 00:00"))


def test_the_first_time() -> None:
    now = at("2026-03-01 00:00")
    assert first_time("0 2 * * *", "UTC", now) == at("2026-03-01 02:00")
    assert first_time("0 0 29 2 *", "UTC", now) == datetime(2028, 2, 29, tzinfo=UTC).timestamp()
