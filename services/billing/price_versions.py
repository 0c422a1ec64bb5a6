"""Sets and withdraws prices of tokens and rates of hours, each a version with a start.

Every function runs inside the caller's database transaction.
"""

from __future__ import annotations

from services.billing import rates_store, store
from services.billing.instants import to_unix_ms
from services.billing.pricing import Price, price_refusal
from services.billing.rates import Rate, rate_refusal
from shared.database import Connection
from shared.ids import new_id
from shared.messages import CommandResult, SetPrice, SetRate, WithdrawPrice

WITHDRAWABLE_MS = 5_000
"""A version that begins sooner counts as begun: a withdrawal must be known everywhere before it would have begun."""


def withdrawal_refusal(starts_unix_ms: int | None, now_unix_ms: int) -> tuple[str, str] | None:
    """Why a version cannot be withdrawn, as (code, message); None if it can. Pure.

    starts_unix_ms: None if there is no such version, or it was withdrawn already.
    """
    if starts_unix_ms is None:
        return "not_found", "there is no such version"
    if starts_unix_ms < now_unix_ms + WITHDRAWABLE_MS:
        return "price_in_force", "the version has begun: set another one that follows it"
    return None


async def database_now_unix_ms(connection: Connection) -> int:
    """The time by the one clock that all processes share."""
    return to_unix_ms(await connection.fetchval("SELECT clock_timestamp()"))


async def lock_prices(connection: Connection) -> None:
    """One change of prices or rates at a time: each is judged by what is there."""
    await store.lock_name(connection, "billing prices")


async def set_price(connection: Connection, command: SetPrice) -> CommandResult:
    """Add a version of a token price, or refuse."""
    await lock_prices(connection)
    versions = [
        price
        for price in await store.load_prices(connection, [command.model_type])
        if price.work_class == command.work_class
    ]
    refusal = price_refusal(command, versions, await database_now_unix_ms(connection))
    if refusal is not None:
        return store.refused(command, refusal)
    price = Price(
        price_id=new_id("price"),
        model_type=command.model_type,
        work_class=command.work_class,
        prompt_nanousd=command.prompt_nanousd,
        completion_nanousd=command.completion_nanousd,
        starts_unix_ms=command.starts_unix_ms,
    )
    await store.insert_price(connection, price, command.actor)
    return CommandResult(command_id=command.command_id, ok=True, body={"price_id": price.price_id})


async def set_rate(connection: Connection, command: SetRate) -> CommandResult:
    """Add a version of an option's hourly rate, or refuse."""
    await lock_prices(connection)
    await rates_store.adopt_first_rates(connection)
    versions = (await rates_store.load_rates(connection, [command.option_id])).get(command.option_id, [])
    refusal = rate_refusal(
        command.hourly_rate_nanousd,
        command.starts_unix_ms,
        versions,
        await database_now_unix_ms(connection),
    )
    if refusal is not None:
        return store.refused(command, refusal)
    rate = Rate(new_id("rate"), command.option_id, command.hourly_rate_nanousd, command.starts_unix_ms)
    await rates_store.insert_rate(connection, rate, command.actor)
    return CommandResult(command_id=command.command_id, ok=True, body={"rate_id": rate.rate_id})


async def withdraw_price(connection: Connection, command: WithdrawPrice) -> CommandResult:
    """Take back a version, of a price or of a rate, that has not begun."""
    await lock_prices(connection)
    found = await find_version(connection, command.version_id)
    refusal = withdrawal_refusal(None if found is None else found[1], await database_now_unix_ms(connection))
    if refusal is not None:
        return store.refused(command, refusal)
    await mark_withdrawn(connection, command.version_id, command.actor)
    return CommandResult(command_id=command.command_id, ok=True)


async def find_version(connection: Connection, version_id: str) -> tuple[str, int] | None:
    """The id and start of a price or rate that was not withdrawn."""
    row = await connection.fetchrow(
        """
        SELECT price_id AS version_id, starts_at FROM billing_api.prices_v1 WHERE price_id = $1
        UNION ALL SELECT rate_id, starts_at FROM billing_api.rates_v1 WHERE rate_id = $1
        """,
        version_id,
    )
    return None if row is None else (row["version_id"], to_unix_ms(row["starts_at"]))


async def mark_withdrawn(connection: Connection, version_id: str, actor: str) -> None:
    """Ids tell the tables apart; the database refuses a version that has begun."""
    for table, column in (("prices", "price_id"), ("rates", "rate_id")):
        await connection.execute(
            f"UPDATE billing.{table} SET withdrawn_at = now(), withdrawn_by = $2 WHERE {column} = $1",
            version_id,
            actor,
        )
