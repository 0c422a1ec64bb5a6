"""By the clock: shares out the cost of each hour of a resource to the requests that ran in it. Charges nothing."""

from __future__ import annotations

from datetime import timedelta

from services.billing import request_cost_store as hours
from services.billing import store
from services.billing.request_cost import share_hour
from shared.database import Database

FIRST_AFTER = timedelta(minutes=10)
"""From an hour's end: its last minutes are proved and its last requests are told of, as a rule."""
LAST_AFTER = timedelta(hours=3)
"""When the ledger looks at the hour no more, unless billing was away."""
CHUNK = 20


class RequestCostRound:
    def __init__(self, database: Database, request_retention_days: int) -> None:
        self._database = database
        self._retention = timedelta(days=request_retention_days)

    async def once(self) -> None:
        """Share out all hours that are due, and forget those whose requests are forgotten."""
        while await self._share_chunk() == CHUNK:
            pass
        while await self._delete_chunk() == CHUNK:
            pass

    async def _share_chunk(self) -> int:
        """Each hour in a transaction of its own; one process at a time."""
        async with self._database.transaction() as connection:
            now = await connection.fetchval("SELECT now()")
            due = await hours.due_hours(
                connection, now - self._retention + hours.RUNS_AT_MOST, FIRST_AFTER, LAST_AFTER, CHUNK
            )
        for hour in due:
            async with self._database.transaction() as connection:
                await store.lock_name(connection, "billing request costs")
                ran = await hours.load_ran(connection, hour)
                live = await hours.load_live(connection, hour)
                shared = share_hour(hour.cost_nanousd, hour.hour_us, live, [each.work for each in ran])
                await hours.save_shares(connection, hour, ran, shared)
        return len(due)

    async def _delete_chunk(self) -> int:
        async with self._database.transaction() as connection:
            now = await connection.fetchval("SELECT now()")
            return await hours.delete_old(connection, now - self._retention, CHUNK)
