"""Answers gateways that ask for a slice of a budget, and lets go of slices that nobody can use any more."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta

import structlog

from services.billing import budget_store, store
from services.billing.budget_account import Grant, close, grant, may_write_off, write_off
from services.billing.instants import from_unix_ms, to_unix_ms
from shared import topology
from shared.broker import Broker, Delivery
from shared.budgets.period import Period, credit_team, day_of, period_start
from shared.database import Connection, Database
from shared.messages import AskBudget, BudgetLeased
from shared.outcomes import Done, Dropped, Outcome, Rejected, Unavailable

log = structlog.get_logger()

LEASE_MS = 10_000
"""A gateway spends a slice for so long: what it leaves over is back with the others after that."""
LEASE_MARGIN_MS = 5_000
FACTS_GRACE_MS = 60_000
"""A worker may tell billing of a job so long after the job's deadline."""
MAX_JOB_DEADLINE_S = 24 * 3600
MAX_NEEDS = 256
MAX_AMOUNT_NANOUSD = 2**62
SETTLED_AFTER_MS = 30_000
"""Facts that were taken from the queue are settled, or back in it, by then."""
CHUNK = 500
KEEP_LEASES = timedelta(minutes=10)
"""Far longer than an ask is repeated: what holds nothing is kept only to answer it as before."""


class LeaseHandler:
    """Any number of processes may answer at once: a budget is locked while a slice is cut off it."""

    def __init__(self, broker: Broker, database: Database) -> None:
        self._broker = broker
        self._database = database

    async def on_ask(self, delivery: Delivery) -> Outcome:
        """Cut a slice, or say what does not fit. While the database is away nobody is answered, and the asker asks again."""
        ask: AskBudget = delivery.message
        if (reason := ask_refusal(ask)) is not None:
            return Rejected(reason)
        if ask.deadline_unix_ms < time.time_ns() // 1_000_000:
            return Dropped("nobody waits for this slice any more")
        try:
            async with self._database.transaction() as connection:
                answer = await _answer(connection, ask)
            await self._broker.send(ask.reply_queue, answer)
        except Unavailable as error:
            return Dropped(str(error))
        return Done()


def ask_refusal(ask: AskBudget) -> str | None:
    """Why this is nothing that a gateway asks; None if it may be. Pure."""
    amounts = [
        ask.wanted_nanousd,
        ask.unit_nanousd,
        *ask.needs_nanousd,
        *(c.spent_nanousd for c in ask.closed),
    ]
    if not all(0 <= amount <= MAX_AMOUNT_NANOUSD for amount in amounts):
        return "an amount is out of range"
    if len(ask.needs_nanousd) > MAX_NEEDS:
        return f"more than {MAX_NEEDS} needs"
    if not 0 <= ask.job_deadline_s <= MAX_JOB_DEADLINE_S:
        return "job_deadline_s is out of range"
    return None


async def _answer(connection: Connection, ask: AskBudget) -> BudgetLeased:
    team_id = credit_team(ask.budget_id)
    budget = None if team_id is not None else await budget_store.lock_budget(connection, ask.budget_id)
    if team_id is not None:
        await store.lock_name(connection, f"billing credit {team_id}")
    closed = await _close(connection, ask)
    now_unix_ms = to_unix_ms(await connection.fetchval("SELECT clock_timestamp()"))
    job_ms = ask.job_deadline_s * 1000
    horizon_at = from_unix_ms(now_unix_ms + LEASE_MS + LEASE_MARGIN_MS + job_ms + FACTS_GRACE_MS)
    given = await budget_store.load_grant(connection, ask.lease_id)
    wants_some = bool(ask.needs_nanousd or ask.wanted_nanousd)
    account = None
    if team_id is not None and is_running("ever", ask, now_unix_ms):
        account = await budget_store.load_credit_account(connection, team_id)
    elif budget is not None and is_running(budget.period, ask, now_unix_ms):
        account = await budget_store.load_account(connection, budget, ask.period_start)
    if given is None and account is not None and wants_some:
        given = grant(account, ask.needs_nanousd, ask.wanted_nanousd, ask.unit_nanousd)
        await budget_store.insert_lease(
            connection, ask.lease_id, ask.budget_id, ask.period_start, ask.gateway_id, given, horizon_at
        )
    # A budget that is gone, or a clock that is days off, grants nothing, and says so.
    given = given or Grant(0, tuple(range(len(ask.needs_nanousd))), MAX_AMOUNT_NANOUSD)
    return BudgetLeased(
        lease_id=ask.lease_id,
        budget_id=ask.budget_id,
        period_start=ask.period_start,
        granted_nanousd=given.granted_nanousd,
        valid_ms=LEASE_MS,
        refused=list(given.refused),
        unposted_nanousd=given.unposted_nanousd,
        closed=closed,
    )


def is_running(period: Period, ask: AskBudget, now_unix_ms: int) -> bool:
    """Whether the period is one of yesterday, today or tomorrow (UTC): clocks differ, and requests take a moment. Pure."""
    today = day_of(now_unix_ms)
    return any(ask.period_start == period_start(period, today + timedelta(days=by)) for by in (-1, 0, 1))


async def _close(connection: Connection, ask: AskBudget) -> list[str]:
    """Record what the gateway closes; return what needs not be told again. A lease that was never made never will be."""
    leases = await budget_store.lock_leases(connection, [each.lease_id for each in ask.closed])
    changed = {}
    for each in ask.closed:
        lease = leases.get(each.lease_id)
        if lease is None:
            # Its ask may still be on the way: it meets a lease of nothing.
            await budget_store.insert_lease(
                connection,
                each.lease_id,
                ask.budget_id,
                ask.period_start,
                ask.gateway_id,
                Grant(0, (), 0),
                from_unix_ms(0),
                closed=True,
            )
            continue
        try:
            changed[each.lease_id] = close(lease, each.spent_nanousd)
        except ValueError as error:
            log.error(
                "lease_close_refused", lease_id=each.lease_id, gateway_id=ask.gateway_id, error=str(error)
            )
    await budget_store.save_leases(connection, changed)
    return [each.lease_id for each in ask.closed]


class LeaseRound:
    """Writes off what lost leases hold, once all facts are read, and forgets leases that are over."""

    def __init__(self, broker: Broker, database: Database) -> None:
        self._broker = broker
        self._database = database
        self._seen_empty: deque[int] = deque(maxlen=100)

    async def once(self) -> None:
        try:
            await self._look()
            read_until_unix_ms = facts_read_until(list(self._seen_empty), time.time_ns() // 1_000_000)
            async with self._database.transaction() as connection:
                await _write_off(connection, read_until_unix_ms)
                deleted = await budget_store.delete_old_leases(connection, KEEP_LEASES, CHUNK)
            while deleted == CHUNK:
                async with self._database.transaction() as connection:
                    deleted = await budget_store.delete_old_leases(connection, KEEP_LEASES, CHUNK)
        except Unavailable:
            # Facts that a process holds meanwhile are in no queue: what was seen before says nothing.
            self._seen_empty.clear()
            raise

    async def _look(self) -> None:
        seen_unix_ms = time.time_ns() // 1_000_000
        if await self._broker.depth(topology.BILLING_EVENTS) == 0:
            self._seen_empty.append(seen_unix_ms)


def facts_read_until(seen_empty_unix_ms: list[int], now_unix_ms: int) -> int:
    """Every fact that was published before this moment is settled; 0 if nothing is known. Pure.

    The queue was seen empty then, and what consumers had taken from it has had its time since.
    """
    settled = [seen for seen in seen_empty_unix_ms if seen + SETTLED_AFTER_MS <= now_unix_ms]
    return max(settled, default=0)


async def _write_off(connection: Connection, read_until_unix_ms: int) -> None:
    ids = await budget_store.holding_leases(connection, read_until_unix_ms, CHUNK)
    if not ids:
        return
    lost = {
        lease_id: write_off(lease)
        for lease_id, lease in (await budget_store.lock_leases(connection, ids)).items()
        if may_write_off(lease, read_until_unix_ms)
    }
    await budget_store.save_leases(connection, lost)
    log.warning("budget_leases_written_off", count=len(lost))
