"""SQL of minutes: reads the scheduler's published intervals at billing's rates, keeps what was posted of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.billing import rates_store
from services.billing.instants import from_unix_us, to_unix_us
from services.billing.minutes import HourKey, LiveInterval, MinutePosting, PostedMinutes
from services.billing.rates import rate_pieces
from shared.database import Connection


async def last_posted_hour_us(connection: Connection) -> int | None:
    """The newest hour that anything was posted for; None before the first posting."""
    hour = await connection.fetchval("SELECT max(hour) FROM billing.minute_charges")
    return None if hour is None else to_unix_us(hour)


async def load_intervals(connection: Connection, first_us: int) -> list[LiveInterval]:
    """All live time that reaches beyond `first_us`, in pieces of one rate each.

    Pools are left out: the platform owns them, tokens pay for them.
    """
    rows = await connection.fetch(
        """
        SELECT i.resource_id, i.team_id, i.place, i.hourly_rate_nanousd, i.started_at, i.proved_until, r.option_id
        FROM scheduler_api.intervals_v1 i JOIN scheduler_api.resources_v1 r USING (resource_id)
        WHERE i.proved_until > $1 AND NOT i.pool
        """,
        from_unix_us(first_us),
    )
    rates = await rates_store.load_rates(connection, {row["option_id"] for row in rows})
    return [piece for row in rows for piece in rate_pieces(_interval(row), rates.get(row["option_id"], ()))]


def _interval(row: Any) -> LiveInterval:
    return LiveInterval(
        resource_id=row["resource_id"],
        team_id=row["team_id"],
        place=row["place"],
        hourly_rate_nanousd=row["hourly_rate_nanousd"],
        started_us=to_unix_us(row["started_at"]),
        proved_us=to_unix_us(row["proved_until"]),
    )


async def load_posted(connection: Connection, first_us: int) -> dict[HourKey, PostedMinutes]:
    """What was posted for the hours from `first_us` on."""
    rows = await connection.fetch(
        "SELECT * FROM billing.minute_charges WHERE hour >= $1", from_unix_us(first_us)
    )
    return {
        HourKey(
            row["resource_id"], row["place"], to_unix_us(row["hour"]), row["hourly_rate_nanousd"]
        ): PostedMinutes(row["team_id"], row["minutes"], row["posted_nanousd"], row["postings"])
        for row in rows
    }


async def save_posted(connection: Connection, postings: Sequence[MinutePosting]) -> None:
    """Remember what the ledger has now, in the transaction that posts it."""
    await connection.executemany(
        """
        INSERT INTO billing.minute_charges
            (resource_id, place, hour, hourly_rate_nanousd, team_id, minutes, posted_nanousd, postings)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
        ON CONFLICT (resource_id, place, hour, hourly_rate_nanousd) DO UPDATE
            SET minutes = EXCLUDED.minutes, posted_nanousd = EXCLUDED.posted_nanousd, postings = EXCLUDED.postings
        """,
        [
            (
                posting.key.resource_id,
                posting.key.place,
                from_unix_us(posting.key.hour_us),
                posting.key.hourly_rate_nanousd,
                posting.team_id,
                posting.minutes,
                posting.amount_nanousd,
                posting.posting_no,
            )
            for posting in postings
        ],
    )
