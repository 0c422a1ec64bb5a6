"""Computes a team's month again from raw usage events and state intervals alone, and compares it with the books.

`python -m services.billing.recompute --team TEAM --month YYYY-MM`. It reads with the auditor's rights, changes nothing,
prints every difference, and exits 1 if there is one, 2 if it cannot be done. A month that still runs may differ by
what is not posted yet: `--wait-s` looks again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import asyncpg

from services.billing.instants import to_unix_ms, to_unix_us
from services.billing.minutes import LiveInterval
from services.billing.pricing import Price
from services.billing.rates import rate_pieces
from services.billing.rates_store import load_rates
from services.billing.statement import MonthBill, Sums, TokenLine, bill_from_facts, differences
from shared.calendar_month import CalendarMonth, read_month
from shared.messages import UsageEvent, decoder
from shared.settings import SettingsError, env, load

ROLE = "roundhouse_audit"
SHOWN = 50
POLL_S = 1
EXIT_DIFFERENT = 1
EXIT_UNUSABLE = 2

Connection = Any  # an asyncpg connection; the stubs' generic cannot be subscripted at run time
_decode_fact = decoder(UsageEvent).decode


@dataclass(frozen=True, kw_only=True)
class RecomputeSettings:
    database_url: str = env("DATABASE_URL", secret=True)


@dataclass(frozen=True, slots=True)
class Comparison:
    computed: MonthBill
    found: list[str]


async def compare(url: str, team: str, month: CalendarMonth) -> Comparison:
    """Read everything as of one moment, and compare. Raises `ValueError` for a team that is not there."""
    connection = await asyncpg.connect(url, timeout=10)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute(f"SET LOCAL ROLE {ROLE}")
            team_id = await connection.fetchval(
                "SELECT team_id FROM gateway_api.teams_v1 WHERE slug = $1 OR team_id = $1", team
            )
            if team_id is None:
                raise ValueError(f"there is no team '{team}'")
            computed = bill_from_facts(
                month,
                _by_job(await _facts(connection, team_id, month)),
                await _intervals(connection, team_id, month),
                await _prices(connection),
            )
            ledger = await _ledger(connection, team_id, month, set(computed.jobs_nanousd))
            statement = await _statement(connection, team_id, month)
            return Comparison(computed, list(differences(computed, ledger, statement)))
    finally:
        await connection.close()


async def _facts(connection: Connection, team_id: str, month: CalendarMonth) -> list[Any]:
    return list(
        await connection.fetch(
            """
            SELECT job_id, payload FROM billing_api.usage_events_v1
            WHERE team_id = $1 AND (payload ->> 'accepted_unix_ms')::bigint >= $2
              AND (payload ->> 'accepted_unix_ms')::bigint < $3 ORDER BY job_id
            """,
            team_id,
            to_unix_ms(month.start),
            to_unix_ms(month.end),
        )
    )


def _by_job(rows: list[Any]) -> Iterator[tuple[str, list[UsageEvent]]]:
    job_id: str | None = None
    facts: list[UsageEvent] = []
    for row in rows:
        if row["job_id"] != job_id:
            if job_id is not None:
                yield job_id, facts
            job_id, facts = row["job_id"], []
        facts.append(_decode_fact(row["payload"]))
    if job_id is not None:
        yield job_id, facts


async def _intervals(connection: Connection, team_id: str, month: CalendarMonth) -> list[LiveInterval]:
    rows = await connection.fetch(
        "SELECT i.*, r.option_id FROM scheduler_api.intervals_v1 i JOIN scheduler_api.resources_v1 r USING (resource_id)"
        " WHERE i.team_id = $1 AND NOT i.pool AND i.proved_until > $2 AND i.started_at < $3",
        team_id,
        month.start,
        month.end,
    )
    rates = await load_rates(connection)
    return [
        piece
        for row in rows
        for piece in rate_pieces(
            LiveInterval(
                row["resource_id"],
                team_id,
                row["place"],
                row["hourly_rate_nanousd"],
                to_unix_us(row["started_at"]),
                to_unix_us(row["proved_until"]),
            ),
            rates.get(row["option_id"], ()),
        )
    ]


async def _prices(connection: Connection) -> list[Price]:
    rows = await connection.fetch("SELECT * FROM billing_api.prices_v1")
    return [
        Price(
            row["price_id"],
            row["model_type"],
            row["work_class"],
            row["prompt_nanousd"],
            row["completion_nanousd"],
            to_unix_ms(row["starts_at"]),
        )
        for row in rows
    ]


async def _ledger(
    connection: Connection, team_id: str, month: CalendarMonth, computed_jobs: set[str]
) -> MonthBill:
    """What the ledger's own rows come to.

    Jobs: those computed here, those that the statement has in the month, and those posted in it that nothing is known of.
    """
    jobs = await connection.fetch(
        """
        SELECT job_id, -sum(amount_nanousd)::bigint AS amount FROM billing_api.ledger_v1
        WHERE team_id = $1 AND account_id = 'team:' || $1 AND job_id IS NOT NULL AND (job_id = ANY($2::text[])
            OR job_id IN (SELECT job_id FROM billing_api.job_charges_v1
                          WHERE team_id = $1 AND accepted_at >= $3 AND accepted_at < $4)
            OR (created_at >= $3 AND created_at < $4
                AND NOT EXISTS (SELECT FROM billing_api.usage_events_v1 e WHERE e.job_id = ledger_v1.job_id)))
        GROUP BY job_id HAVING sum(amount_nanousd) <> 0
        """,
        team_id,
        sorted(computed_jobs),
        month.start,
        month.end,
    )
    hours = await connection.fetch(
        """
        SELECT resource_id, place, hour, -sum(amount_nanousd)::bigint AS amount FROM billing_api.ledger_v1
        WHERE team_id = $1 AND account_id = 'team:' || $1 AND hour >= $2 AND hour < $3
        GROUP BY resource_id, place, hour HAVING sum(amount_nanousd) <> 0
        """,
        team_id,
        month.start,
        month.end,
    )
    return MonthBill(
        jobs_nanousd={row["job_id"]: row["amount"] for row in jobs}, hours_nanousd=_hour_amounts(hours)
    )


async def _statement(connection: Connection, team_id: str, month: CalendarMonth) -> MonthBill:
    """What statements are told from."""
    jobs = await connection.fetch(
        "SELECT * FROM billing_api.job_charges_v1 WHERE team_id = $1 AND accepted_at >= $2 AND accepted_at < $3"
        " AND amount_nanousd <> 0",
        team_id,
        month.start,
        month.end,
    )
    lines: dict[TokenLine, Sums] = {}
    for row in jobs:
        sums = lines.setdefault(TokenLine(row["model_type"], row["work_class"], row["price_id"]), Sums())
        sums.prompt_tokens += row["prompt_tokens"]
        sums.completion_tokens += row["completion_tokens"]
        sums.amount_nanousd += row["amount_nanousd"]
    hours = await connection.fetch(
        """
        SELECT resource_id, place, hour, sum(posted_nanousd)::bigint AS amount FROM billing_api.minutes_v1
        WHERE team_id = $1 AND hour >= $2 AND hour < $3
        GROUP BY resource_id, place, hour HAVING sum(posted_nanousd) <> 0
        """,
        team_id,
        month.start,
        month.end,
    )
    return MonthBill({row["job_id"]: row["amount_nanousd"] for row in jobs}, lines, _hour_amounts(hours))


def _hour_amounts(rows: list[Any]) -> dict[tuple[str, int, int], int]:
    return {(row["resource_id"], row["place"], to_unix_us(row["hour"])): row["amount"] for row in rows}


async def _settled(url: str, team: str, month: CalendarMonth, wait_s: float) -> Comparison:
    deadline_s = time.monotonic() + wait_s
    while True:
        compared = await compare(url, team, month)
        if not compared.found or time.monotonic() >= deadline_s:
            return compared
        await asyncio.sleep(POLL_S)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m services.billing.recompute", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--team", required=True, help="slug or id")
    parser.add_argument("--month", required=True, metavar="YYYY-MM", help="in UTC")
    parser.add_argument(
        "--wait-s", type=int, default=0, help="look again until it agrees, for at most this long"
    )
    parsed = parser.parse_args(arguments)
    month = read_month(parsed.month)
    if month is None:
        parser.error("--month must be such as 2026-11")
    try:
        url = load(RecomputeSettings).database_url
        compared = asyncio.run(_settled(url, parsed.team, month, parsed.wait_s))
    except (OSError, ValueError, SettingsError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        print(f"recompute: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    bill = compared.computed
    print(
        f"{parsed.team} {month.name}: {bill.total_nanousd} nano-USD from {len(bill.jobs_nanousd)} charged jobs"
        f" and {len(bill.hours_nanousd)} hours of places; {len(compared.found)} differences"
    )
    for difference in compared.found[:SHOWN]:
        print(difference)
    if len(compared.found) > SHOWN:
        print(f"and {len(compared.found) - SHOWN} more")
    return EXIT_DIFFERENT if compared.found else 0


if __name__ == "__main__":
    sys.exit(main())
