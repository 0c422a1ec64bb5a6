"""Looks at all budgets by the clock: keeps alerts and tells of them, and turns off what spent budgets turn off.

Level-triggered: what was missed is done at the next look, and what is turned on again while its budget is spent goes
off again.
"""

from __future__ import annotations

import time
from datetime import timedelta

import structlog

from services.billing import budget_store
from services.billing.budget_rules import Alert, Budget, alerts_due, resources_to_turn_off, turn_off_id
from services.billing.instants import to_unix_ms
from shared import topology
from shared.broker import Broker
from shared.budgets.period import day_of
from shared.database import Database
from shared.ids import new_id
from shared.messages import BudgetAlerted, TurnOffResource
from shared.outcomes import PublishRefused, Unroutable

log = structlog.get_logger()

LATE_FACTS = timedelta(hours=1)
"""So long after a period's end facts of it are still looked at for alerts."""
ANNOUNCED_AT_ONCE = 100
COMMAND_DEADLINE_MS = 20_000


class BudgetRound:
    """Any number of processes may look at once."""

    def __init__(self, broker: Broker, database: Database) -> None:
        self._broker = broker
        self._database = database

    async def once(self) -> None:
        due, off, now_unix_ms = await self._look()
        if due:
            await self._keep(due)
        while await self._announce() == ANNOUNCED_AT_ONCE:
            pass
        for resource_id, budget in off:
            await self._turn_off(resource_id, budget, now_unix_ms)

    async def _look(self) -> tuple[list[Alert], list[tuple[str, Budget]], int]:
        async with self._database.transaction() as connection:
            now_unix_ms = to_unix_ms(await connection.fetchval("SELECT clock_timestamp()"))
            today = day_of(now_unix_ms)
            before = day_of(now_unix_ms - LATE_FACTS // timedelta(milliseconds=1))
            running = await budget_store.load_budgets(connection, today)
            ended = await budget_store.load_budgets(connection, before) if before != today else []
            on = await budget_store.resources_on(connection)
        due = [
            alert for budget, start, spent in ended + running for alert in alerts_due(budget, start, spent)
        ]
        off = resources_to_turn_off([(budget, spent) for budget, _, spent in running], on)
        return due, off, now_unix_ms

    async def _keep(self, due: list[Alert]) -> None:
        async with self._database.transaction() as connection:
            kept = await budget_store.insert_alerts(connection, [(new_id("alert"), alert) for alert in due])
        if kept:
            log.info("budget_alerts", count=kept)

    async def _announce(self) -> int:
        """Send the events of alerts that were not told; a crash in between tells one twice, under the same id."""
        async with self._database.transaction() as connection:
            rows = await budget_store.alerts_to_announce(connection, ANNOUNCED_AT_ONCE)
            for row in rows:
                await self._broker.send_event(BudgetAlerted(**dict(row)))
            await budget_store.mark_announced(connection, [row["alert_id"] for row in rows])
        return len(rows)

    async def _turn_off(self, resource_id: str, budget: Budget, now_unix_ms: int) -> None:
        """Ask the scheduler. Nobody reads its answer: whether the resource is on is seen at the next look."""
        command = TurnOffResource(
            command_id=turn_off_id(budget.budget_id, resource_id, now_unix_ms),
            deadline_unix_ms=time.time_ns() // 1_000_000 + COMMAND_DEADLINE_MS,
            reply_queue=topology.reply_queue("billing").name,
            actor=budget.budget_id,
            team_id=budget.team_id,
            resource_id=resource_id,
        )
        try:
            await self._broker.publish(topology.SCHEDULER_COMMANDS, command)
        except (PublishRefused, Unroutable) as error:
            log.warning("resource_not_turned_off", resource_id=resource_id, error=str(error))
        else:
            log.warning("resource_turned_off_by_budget", resource_id=resource_id, budget_id=budget.budget_id)
