"""The scheduler's settings fit together."""

from __future__ import annotations

import pytest

from services.scheduler.settings import SchedulerSettings
from shared.settings import SettingsError, load

GOOD = {"AMQP_URL": "amqp://x", "OPS_PORT": "0", "DATABASE_URL": "postgresql://x"}


def test_limits_come_from_the_settings() -> None:
    limits = load(
        SchedulerSettings, GOOD | {"ROUNDHOUSE_LOST_AFTER_S": "3", "ROUNDHOUSE_DRAIN_GRACE_S": "60"}
    ).limits
    assert (limits.lost_after_s, limits.drain_grace_s, limits.start_timeout_s) == (3, 60, 180)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ROUNDHOUSE_SCHEDULER_TICK_S", "3"),  # slower than the lease can be kept
        ("ROUNDHOUSE_LEASE_S", "nan"),
        ("ROUNDHOUSE_START_TIMEOUT_S", "0"),
    ],
)
def test_a_bad_setting_is_named(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        load(SchedulerSettings, GOOD | {variable: value})
