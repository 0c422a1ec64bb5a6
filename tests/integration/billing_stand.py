"""What the integration tests of billing share: a database with a price, billing's objects, and a look at the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg

from services.billing.__main__ import ROLE
from services.billing.commands import CommandHandler
from services.billing.handlers import EventHandler
from services.billing.instruments import Instruments
from services.billing.intake import Arrival, Intake
from services.billing.payments_store import PaymentIntake
from shared import topology
from shared.broker import Broker
from shared.database import Database
from shared.messages import BillingCommand, UsageEvent
from tests.conftest import Vhost

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CHARGE_NANOUSD = 10 * 20 + 20 * 60
"""What `make_usage()` costs at `insert_price`'s price."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Billing's intake under its own role, and the administrator's connection to look at what it did."""

    admin: asyncpg.Connection[asyncpg.Record]
    database: Database
    intake: Intake
    instruments: Instruments

    async def record(self, *facts: UsageEvent) -> None:
        await self.intake.record([Arrival(fact, None) for fact in facts])


@asynccontextmanager
async def open_stand(database_url: str, *, priced: bool = True) -> AsyncIterator[Stand]:
    async with AsyncExitStack() as stack:
        admin = await asyncpg.connect(database_url)
        stack.push_async_callback(admin.close)
        if priced:
            await insert_price(admin)
        database = await Database.open(database_url, ROLE, stack, size=4)
        instruments = Instruments()
        yield Stand(admin, database, Intake(database, instruments), instruments)


async def insert_price(admin: asyncpg.Connection[asyncpg.Record]) -> None:
    """20 nano-USD for a prompt token and 60 for a completion token, since ever."""
    await admin.execute(
        "INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at) "
        "VALUES ('price_1', 'smollm2-135m', 'live', 20, 60, $1)",
        EPOCH,
    )


async def job_charges(admin: asyncpg.Connection[asyncpg.Record]) -> dict[str, tuple[int, int]]:
    """Net amount and number of transactions by job."""
    rows = await admin.fetch(
        "SELECT job_id, -sum(amount_nanousd)::bigint AS amount, count(*) AS transactions FROM billing_api.ledger_v1 "
        "WHERE account_id LIKE 'team:%' AND job_id IS NOT NULL GROUP BY job_id"
    )
    return {row["job_id"]: (row["amount"], row["transactions"]) for row in rows}


async def insert_interval(
    admin: asyncpg.Connection[asyncpg.Record],
    incarnation: str,
    started_at: datetime,
    proved_until: datetime,
    **fields: Any,
) -> None:
    """A state interval of the scheduler's, with the resource that it belongs to."""
    values = {
        "resource_id": "res_a",
        "place": 0,
        "pool": False,
        "ended": False,
        **fields,
    }
    await admin.execute(
        "INSERT INTO scheduler.performance_options VALUES "
        "('opt_a', 'smollm2-135m', 'bf16', 'cpu', 'bf16', 8, 2048, 4096, 60000000000) ON CONFLICT DO NOTHING"
    )
    await admin.execute(
        "INSERT INTO scheduler.resources (resource_id, team_id, name, model_type, option_id, pool, fixed_count) "
        "VALUES ($1, 'team_a', $1, $1, 'opt_a', $2, 1) ON CONFLICT DO NOTHING",
        values["resource_id"],
        values["pool"],
    )
    await admin.execute(
        "INSERT INTO scheduler.state_intervals VALUES ($1, $2, 'team_a', $3, $4, 60000000000, $5, $6, $7)",
        incarnation,
        values["resource_id"],
        values["place"],
        values["pool"],
        started_at,
        proved_until,
        proved_until if values["ended"] else None,
    )


async def insert_rate(
    admin: asyncpg.Connection[asyncpg.Record], rate_nanousd: int, starts_at: datetime
) -> None:
    """A version of the hourly rate of `insert_interval`'s option."""
    await admin.execute(
        "INSERT INTO billing.rates (rate_id, option_id, hourly_rate_nanousd, starts_at, actor) "
        "VALUES ($1, 'opt_a', $2, $3, 'test')",
        f"rate_{rate_nanousd}",
        rate_nanousd,
        starts_at,
    )


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 40.0) -> None:
    """Wait until `condition` holds; a test that waits in vain fails here."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running_commands(vhost: Vhost, stand: Stand) -> AsyncIterator[None]:
    """Billing's half of commands, as the service runs it."""
    async with AsyncExitStack() as stack:
        broker = await Broker.open(vhost.amqp_url, "billing-test", stack)
        handler = CommandHandler(broker, stand.database)
        task = asyncio.create_task(
            broker.consume(topology.BILLING_COMMANDS, BillingCommand, handler.on_command)
        )
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def running_events(broker: Broker, stand: Stand) -> AsyncIterator[EventHandler]:
    handler = EventHandler(
        broker, stand.intake, PaymentIntake(stand.database, stand.instruments), stand.instruments
    )
    task = asyncio.create_task(handler.run(asyncio.Event()))
    try:
        yield handler
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
