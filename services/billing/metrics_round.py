"""By the clock: computes the metrics of marked minutes anew, and of their hours. Charges nothing."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from services.billing import metrics_store as metrics
from services.billing import store
from services.billing.metrics_store import ResourceTime
from services.billing.request_cost_store import RUNS_AT_MOST
from shared.database import Database

MARKS = 1000
"""What one transaction takes: each mark may be a minute whose records are read."""
TRANSACTIONS_A_ROUND = 100
"""A backlog (after an import, say) is worked off over several rounds."""
FORGOTTEN = 5000
MINUTES_KEPT_LONGER = timedelta(days=2)
"""Than request records, so that an hour that is computed anew has all of its minutes."""
HOURS_KEPT = timedelta(days=400)


class MetricsRound:
    def __init__(self, database: Database, request_retention_days: int) -> None:
        self._database = database
        self._retention = timedelta(days=request_retention_days)

    async def once(self) -> None:
        """Compute what is marked, oldest marks first, and forget what is old."""
        for _ in range(TRANSACTIONS_A_ROUND):
            if await self._compute_chunk() < MARKS:
                break
        while await self._delete_chunk() == FORGOTTEN:
            pass

    async def _compute_chunk(self) -> int:
        """One process at a time. What commits after a record was read has a mark that is still to come."""
        async with self._database.transaction() as connection:
            await store.lock_name(connection, "billing metrics")
            taken, marked = await metrics.take_marks(connection, MARKS)
            now: datetime = await connection.fetchval("SELECT now()")
            minutes = computable(marked, now, self._retention)
            if minutes:
                await metrics.compute_minutes(connection, minutes)
                await metrics.compute_hours(connection, hours_of(minutes))
        return taken

    async def _delete_chunk(self) -> int:
        async with self._database.transaction() as connection:
            now: datetime = await connection.fetchval("SELECT now()")
            return await metrics.delete_old(
                connection, now - self._retention - MINUTES_KEPT_LONGER, now - HOURS_KEPT, FORGOTTEN
            )


def computable(marked: Iterable[ResourceTime], now: datetime, retention: timedelta) -> list[ResourceTime]:
    """The minutes whose records are all still there, in order. Pure.

    Records are forgotten by the age of acceptance. A minute so old that some of its records may be gone keeps what it
    has: computed anew it would lose the others. A request may run for `RUNS_AT_MOST`; with a very short retention
    half of it has to do.
    """
    oldest = now - retention + min(RUNS_AT_MOST, retention // 2)
    return sorted(minute for minute in marked if minute.start >= oldest)


def hours_of(minutes: Iterable[ResourceTime]) -> list[ResourceTime]:
    """The hours that these minutes are in, in order. Pure."""
    return sorted(
        {ResourceTime(each.resource_id, each.start.astimezone(UTC).replace(minute=0)) for each in minutes}
    )
