"""Alarms of workers about models: kept for who owns the resource, and counted for who is called at night."""

from __future__ import annotations

import structlog

from shared import telemetry
from shared.broker import Delivery
from shared.database import Database
from shared.messages import ModelDamaged
from shared.outcomes import Done, Outcome

log = structlog.get_logger()

MOST_REASON = 500
MODEL_ALARMS = "roundhouse.scheduler.model_alarms"

# A resource that is gone has nobody to show an alarm to. The same alarm may come twice.
_KEEP = """
    INSERT INTO scheduler.model_alarms (event_id, resource_id, worker_id, model_id, revision, reason, found_at)
    SELECT $1, resource_id, $3, $4, $5, $6, to_timestamp($7 / 1000.0)
    FROM scheduler.resources WHERE resource_id = $2
    ON CONFLICT (event_id) DO NOTHING
"""
_FORGET = "DELETE FROM scheduler.model_alarms WHERE found_at < now() - interval '90 days'"


class AlarmKeeper:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._alarms = telemetry.meter().create_counter(
            MODEL_ALARMS, description="Models that a worker took out because they were damaged"
        )

    async def on_alarm(self, delivery: Delivery) -> Outcome:
        """Raises `Unavailable`; then it comes again."""
        alarm: ModelDamaged = delivery.message
        async with self._database.transaction() as connection:
            await connection.execute(
                _KEEP,
                alarm.event_id,
                alarm.resource_id,
                alarm.worker_id,
                alarm.model_id,
                alarm.revision,
                alarm.reason[:MOST_REASON],
                alarm.found_unix_ms,
            )
            await connection.execute(_FORGET)
        self._alarms.add(1)
        log.error("model_damaged", model_id=alarm.model_id, revision=alarm.revision, reason=alarm.reason)
        return Done()
