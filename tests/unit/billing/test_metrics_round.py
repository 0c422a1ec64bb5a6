"""Which marked minutes are computed, and which hours they are in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.billing.metrics_round import computable, hours_of
from services.billing.metrics_store import ResourceTime

NOW = datetime(2026, 11, 28, 12, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("retention_days", "age", "is_computed"),
    [
        (30, timedelta(0), True),
        (30, timedelta(days=-1), True),
        (30, timedelta(days=28, hours=23), True),
        (
            30,
            timedelta(days=28, hours=23, minutes=1),
            False,
        ),  # a request of 25 hours may be forgotten by then
        (1, timedelta(hours=12), True),
        (1, timedelta(hours=12, minutes=1), False),
    ],
)
def test_a_minute_is_computed_while_all_of_its_records_are_there(
    retention_days: int, age: timedelta, is_computed: bool
) -> None:
    minute = ResourceTime("res_a", NOW - age)
    assert computable([minute], NOW, timedelta(days=retention_days)) == ([minute] if is_computed else [])


def test_hours_are_told_once_by_resource() -> None:
    hour = NOW.replace(minute=0)
    minutes = [
        ResourceTime(resource, hour + timedelta(minutes=minute))
        for resource in "ba"
        for minute in (0, 59, 60)
    ]
    assert hours_of(minutes) == [
        ResourceTime(resource, hour + timedelta(hours=later)) for resource in "ab" for later in (0, 1)
    ]
