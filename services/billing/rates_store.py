"""SQL of hourly rates. Every function runs inside the caller's database transaction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from services.billing.instants import from_unix_ms, to_unix_ms
from services.billing.rates import Rate
from shared.database import Connection


async def adopt_first_rates(connection: Connection) -> None:
    """Give each option that has no rate yet its first version: what it was made with, since it was made.

    Options are the scheduler's. Whoever needs rates looks first, so no message has to arrive for one to be there.
    """
    await connection.execute(
        """
        INSERT INTO billing.rates (rate_id, option_id, hourly_rate_nanousd, starts_at, actor)
        SELECT 'rate_' || md5(o.option_id), o.option_id, o.hourly_rate_nanousd, o.created_at, 'option'
        FROM scheduler_api.options_v1 o
        WHERE NOT EXISTS (SELECT FROM billing.rates r WHERE r.option_id = o.option_id)
        ORDER BY o.option_id ON CONFLICT DO NOTHING
        """
    )


async def load_rates(
    connection: Connection, option_ids: Iterable[str] | None = None
) -> dict[str, list[Rate]]:
    """All versions of these options (None: of all) that were not withdrawn, by option."""
    rows = await connection.fetch(
        "SELECT rate_id, option_id, hourly_rate_nanousd, starts_at FROM billing_api.rates_v1 "
        "WHERE $1::text[] IS NULL OR option_id = ANY($1::text[]) ORDER BY starts_at",
        None if option_ids is None else sorted(set(option_ids)),
    )
    rates: dict[str, list[Rate]] = defaultdict(list)
    for row in rows:
        rates[row["option_id"]].append(
            Rate(row["rate_id"], row["option_id"], row["hourly_rate_nanousd"], to_unix_ms(row["starts_at"]))
        )
    return dict(rates)


async def insert_rate(connection: Connection, rate: Rate, actor: str) -> None:
    await connection.execute(
        "INSERT INTO billing.rates (rate_id, option_id, hourly_rate_nanousd, starts_at, actor) "
        "VALUES ($1, $2, $3, $4, $5)",
        rate.rate_id,
        rate.option_id,
        rate.hourly_rate_nanousd,
        from_unix_ms(rate.starts_unix_ms),
        actor,
    )
