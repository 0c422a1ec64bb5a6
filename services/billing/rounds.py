"""What billing does by the clock: post minutes, charge what had no price, check the ledger, forget old requests.

Each round may fail while the database is away and is simply done again; each may run in several processes at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import structlog

from services.billing import budget_store, ledger, minutes_store, rates_store, store
from services.billing.budget_spend import add_up, minutes_spend
from services.billing.instants import from_unix_us, to_unix_us
from services.billing.instruments import Instruments
from services.billing.intake import Intake
from services.billing.ledger import Charge
from services.billing.minutes import MinutePosting, billed_minutes, first_hour_us, postings_due
from shared.database import Connection, Database
from shared.outcomes import Unavailable

log = structlog.get_logger()

CHUNK = 500
"""Rows that one transaction of a sweep touches, so that it never holds locks for long."""
CHECKED_MS = 3_600_000
RESULT_RETENTION = timedelta(days=7)


async def repeat(
    name: str, interval_s: float, stopping: asyncio.Event, once: Callable[[], Awaitable[None]]
) -> None:
    """Run `once` now and then every `interval_s` until stopping; a database that is away is waited for."""
    while not stopping.is_set():
        try:
            await once()
        except Unavailable as error:
            log.warning("round_failed", round=name, reason=str(error))
        try:
            async with asyncio.timeout(interval_s):
                await stopping.wait()
        except TimeoutError:
            pass  # the interval is over


class MinutesRound:
    """Posts the minutes of all resources, up to what heartbeats have proved."""

    def __init__(self, database: Database, instruments: Instruments, lookback_h: int) -> None:
        self._database = database
        self._instruments = instruments
        self._lookback_h = lookback_h
        self._caught_up_us: int | None = None
        self._complete_at_s = time.monotonic()

    async def once(self) -> None:
        """Bring the ledger up to date."""
        try:
            while await self._post_chunk():
                pass
        finally:
            self._instruments.minutes_behind_s.set(time.monotonic() - self._complete_at_s)

    async def _post_chunk(self) -> bool:
        """Post the oldest `CHUNK` differences, oldest hour first; return whether there is more to post.

        Since the oldest hours go first, the last posted hour tells how far a pass has got, across a crash too.
        """
        async with self._database.transaction() as connection:
            # One process at a time, and everything is read after the lock is taken: what another process read before
            # it waited could be older than what is posted.
            await store.lock_name(connection, "billing minutes")
            await rates_store.adopt_first_rates(connection)
            now_us = to_unix_us(await connection.fetchval("SELECT clock_timestamp()"))
            if self._caught_up_us is None:
                self._caught_up_us = await minutes_store.last_posted_hour_us(connection)
            first_us = first_hour_us(now_us, self._caught_up_us, self._lookback_h)
            intervals = await minutes_store.load_intervals(connection, first_us)
            posted = await minutes_store.load_posted(connection, first_us)
            teams = {interval.resource_id: interval.team_id for interval in intervals}
            due = postings_due(billed_minutes(intervals, first_us), teams, posted)
            await _post(connection, due[:CHUNK])
        self._instruments.transactions.add(len(due[:CHUNK]), {"kind": "minutes"})
        if len(due) > CHUNK:
            return True
        self._caught_up_us = now_us
        self._complete_at_s = time.monotonic()
        return False


async def _post(connection: Connection, due: list[MinutePosting]) -> None:
    await ledger.post(connection, [minute_charge(posting) for posting in due])
    spends = [minutes_spend(p.team_id, p.key.resource_id, p.key.hour_us, p.difference_nanousd) for p in due]
    await budget_store.add_spend(connection, add_up(spends))
    await minutes_store.save_posted(connection, due)


def minute_charge(posting: MinutePosting) -> Charge:
    """The ledger transaction for a posting. Pure."""
    key = posting.key
    hour = from_unix_us(key.hour_us)
    name = f"minutes:{key.resource_id}:{key.place}:{hour:%Y-%m-%dT%HZ}:{key.hourly_rate_nanousd}"
    gives_back = posting.difference_nanousd < 0
    return Charge(
        unique_key=f"{name}:{posting.posting_no}",
        kind="correction" if gives_back else "minutes",
        team_id=posting.team_id,
        other_account=ledger.REVENUE_MINUTES,
        amount_nanousd=posting.difference_nanousd,
        words=f"place {key.place}, {hour:%Y-%m-%d %H}:00 UTC: {posting.minutes} minutes in all",
        resource_id=key.resource_id,
        place=key.place,
        hour=hour,
        corrects_key=f"{name}:1" if gives_back else None,
    )


class SweepRound:
    """The slow rounds, one after the other."""

    def __init__(
        self, database: Database, intake: Intake, instruments: Instruments, request_retention_days: int
    ) -> None:
        self._database = database
        self._intake = intake
        self._instruments = instruments
        self._retention = timedelta(days=request_retention_days)
        self._filled_until: str | None = ""

    async def once(self) -> None:
        await self.charge_unpriced()
        await self.fill_job_charges()
        await self.check_ledger()
        await self.delete_old()

    async def charge_unpriced(self) -> None:
        """Charge jobs that ended before their type had any price, now that it has one."""
        while await self._intake.charge_unpriced(CHUNK) == CHUNK:
            pass
        async with self._database.transaction() as connection:
            self._instruments.unpriced.set(await store.count_unpriced(connection))

    async def fill_job_charges(self) -> None:
        """Once after the start: tell what jobs were charged before that was kept beside the ledger."""
        while self._filled_until is not None:
            self._filled_until = await self._intake.fill_job_charges(self._filled_until, CHUNK)

    async def check_ledger(self) -> None:
        """Look for what the database should have made impossible."""
        since_unix_ms = time.time_ns() // 1_000_000 - CHECKED_MS
        async with self._database.transaction() as connection:
            unbalanced = await ledger.count_unbalanced(connection, since_unix_ms)
        self._instruments.unbalanced.set(unbalanced)
        if unbalanced:
            log.error("ledger_does_not_balance", transactions=unbalanced)

    async def delete_old(self) -> None:
        """Delete request records past their retention. Facts and ledger stay for good."""
        while True:
            async with self._database.transaction() as connection:
                now = await connection.fetchval("SELECT now()")
                deleted = await store.delete_old_requests(connection, now - self._retention, CHUNK)
                await store.delete_old_results(connection, now - RESULT_RETENTION)
            if deleted < CHUNK:
                return
