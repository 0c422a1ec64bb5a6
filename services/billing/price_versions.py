"""Sets prices, each a version with a start, inside the caller's database transaction."""

from __future__ import annotations

from services.billing import store
from services.billing.instants import to_unix_ms
from services.billing.pricing import Price, price_refusal
from shared.database import Connection
from shared.ids import new_id
from shared.messages import CommandResult, SetPrice


async def set_price(connection: Connection, command: SetPrice) -> CommandResult:
    """Add a price version, or refuse."""
    await store.lock_name(connection, f"billing prices {command.model_type} {command.work_class}")
    versions = [
        price
        for price in await store.load_prices(connection, [command.model_type])
        if price.work_class == command.work_class
    ]
    now_unix_ms = to_unix_ms(await connection.fetchval("SELECT now()"))
    refusal = price_refusal(command, versions, now_unix_ms)
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
    await store.insert_price(connection, price)
    return CommandResult(command_id=command.command_id, ok=True, body={"price_id": price.price_id})
