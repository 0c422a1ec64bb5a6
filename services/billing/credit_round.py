"""Turns off the resources of teams that may spend nothing more: minutes are the one thing that goes on costing by itself.

Level-triggered: what is on at a look without credit is asked to drain and go off, and asked again at the next look if
it still is. Running requests are finished. Shared GPUs are closed to such a team at the gateway's door.
"""

from __future__ import annotations

import time

import structlog

from shared import topology
from shared.broker import Broker
from shared.database import Database
from shared.ids import new_id
from shared.messages import TurnOffResource
from shared.outcomes import PublishRefused, PublishUnknown, Unroutable

log = structlog.get_logger()

ACTOR = "billing:no_credit"
COMMAND_DEADLINE_MS = 20_000
AT_ONCE = 100
"""Resources that one look turns off; the next look goes on."""


class CreditRound:
    """Any number of processes may look at once: to be turned off twice is to be turned off."""

    def __init__(self, broker: Broker, database: Database) -> None:
        self._broker = broker
        self._database = database

    async def once(self) -> None:
        rows = await self._database.fetch(
            """
            SELECT r.resource_id, r.team_id
            FROM scheduler_api.resources_v1 r JOIN billing_api.spendable_v1 s USING (team_id)
            WHERE s.spendable_nanousd = 0 AND r.wanted = 'on' AND NOT r.pool AND r.deleted_at IS NULL
            ORDER BY r.resource_id LIMIT $1
            """,
            AT_ONCE,
        )
        for row in rows:
            await self._turn_off(row["team_id"], row["resource_id"])

    async def _turn_off(self, team_id: str, resource_id: str) -> None:
        """Ask the scheduler. Nobody reads its answer: whether the resource is on is seen at the next look."""
        command = TurnOffResource(
            command_id=new_id("cmd"),
            deadline_unix_ms=time.time_ns() // 1_000_000 + COMMAND_DEADLINE_MS,
            reply_queue=topology.reply_queue("billing").name,
            actor=ACTOR,
            team_id=team_id,
            resource_id=resource_id,
        )
        try:
            await self._broker.publish(topology.SCHEDULER_COMMANDS, command)
        except (PublishRefused, PublishUnknown, Unroutable) as error:
            log.warning("resource_not_turned_off", resource_id=resource_id, error=str(error))
        else:
            log.warning("resource_turned_off_without_credit", resource_id=resource_id, team_id=team_id)
