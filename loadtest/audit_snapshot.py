"""What the audit looks at: the clients' log, and all of billing's tables at one moment, as plain values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import asyncpg
import msgspec

from services.billing.budget_spend import SpendKey
from services.billing.instants import to_unix_ms, to_unix_us
from services.billing.minutes import HourKey, LiveInterval, PostedMinutes
from services.billing.pricing import Price
from services.billing.rates import rate_pieces
from services.billing.rates_store import load_rates
from shared.messages import UsageEvent, decoder


class ClientRecord(msgspec.Struct, frozen=True):
    """One line of the clients' log: what one request looked like from outside."""

    request_id: str | None
    team: str
    model: str
    stream: bool
    started_unix_ms: int
    ended_unix_ms: int
    status: int | None
    outcome: Literal["answered", "error", "cut", "cancelled_by_client"]
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error_code: str | None = None
    killed_gateway: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger with its transaction."""

    transaction_id: str
    unique_key: str
    kind: str
    team_id: str
    job_id: str | None
    resource_id: str | None
    place: int | None
    hour_us: int | None
    account_id: str
    amount_nanousd: int


@dataclass(frozen=True, slots=True)
class Request:
    """The columns of a request record that the audit compares."""

    job_id: str
    request_id: str
    team_id: str
    billing_mode: str
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    charged_nanousd: int
    price_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All tables as of one moment."""

    now_us: int
    requests: Mapping[str, Request]
    facts: Mapping[str, Sequence[UsageEvent]]
    prices: Sequence[Price]
    entries: Sequence[Entry]
    intervals: Sequence[LiveInterval]
    posted_minutes: Mapping[HourKey, PostedMinutes]
    spend_days: Mapping[SpendKey, int]
    """Posted by day, as budgets are counted."""
    held_leases: Mapping[str, int]
    """Unix microseconds from when on a lease on a budget may hold nothing, by the ids of those that hold something."""
    teams: Mapping[str, str]
    """Team id by slug and by id."""


def read_client_log(path: Path) -> list[ClientRecord]:
    """Raises `ValueError` that names the line that is not a record."""
    decode = msgspec.json.Decoder(ClientRecord).decode
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return records


async def read_snapshot(url: str) -> Snapshot:
    """Read everything in one read-only transaction, with the rights of the auditor's role only."""
    connection = await asyncpg.connect(url, timeout=10)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute("SET LOCAL ROLE roundhouse_audit")
            return Snapshot(
                now_us=to_unix_us(await connection.fetchval("SELECT now()")),
                requests=await _requests(connection),
                facts=await _facts(connection),
                prices=await _prices(connection),
                entries=await _entries(connection),
                intervals=await _intervals(connection),
                posted_minutes=await _posted_minutes(connection),
                spend_days=await _spend_days(connection),
                held_leases=await _held_leases(connection),
                teams=await _teams(connection),
            )
    finally:
        await connection.close()


Connection = Any  # an asyncpg connection; the stubs' generic cannot be subscripted at run time


async def _requests(connection: Connection) -> dict[str, Request]:
    rows = await connection.fetch(
        "SELECT job_id, request_id, team_id, billing_mode, outcome, prompt_tokens, completion_tokens, "
        "charged_nanousd, price_id FROM billing_api.requests_v1"
    )
    return {row["job_id"]: Request(**row) for row in rows}


async def _facts(connection: Connection) -> dict[str, list[UsageEvent]]:
    decode = decoder(UsageEvent).decode
    facts: dict[str, list[UsageEvent]] = defaultdict(list)
    for row in await connection.fetch("SELECT job_id, payload FROM billing_api.usage_events_v1"):
        facts[row["job_id"]].append(decode(row["payload"]))
    return dict(facts)


async def _prices(connection: Connection) -> list[Price]:
    rows = await connection.fetch(
        "SELECT price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at FROM billing_api.prices_v1"
    )
    return [
        Price(
            price_id=row["price_id"],
            model_type=row["model_type"],
            work_class=row["work_class"],
            prompt_nanousd=row["prompt_nanousd"],
            completion_nanousd=row["completion_nanousd"],
            starts_unix_ms=to_unix_ms(row["starts_at"]),
        )
        for row in rows
    ]


async def _entries(connection: Connection) -> list[Entry]:
    rows = await connection.fetch(
        "SELECT transaction_id, unique_key, kind, team_id, job_id, resource_id, place, hour, account_id, amount_nanousd "
        "FROM billing_api.ledger_v1"
    )
    return [
        Entry(
            transaction_id=row["transaction_id"],
            unique_key=row["unique_key"],
            kind=row["kind"],
            team_id=row["team_id"],
            job_id=row["job_id"],
            resource_id=row["resource_id"],
            place=row["place"],
            hour_us=None if row["hour"] is None else to_unix_us(row["hour"]),
            account_id=row["account_id"],
            amount_nanousd=row["amount_nanousd"],
        )
        for row in rows
    ]


async def _intervals(connection: Connection) -> list[LiveInterval]:
    rows = await connection.fetch(
        "SELECT i.resource_id, i.team_id, i.place, i.hourly_rate_nanousd, i.started_at, i.proved_until, r.option_id "
        "FROM scheduler_api.intervals_v1 i JOIN scheduler_api.resources_v1 r USING (resource_id) WHERE NOT i.pool"
    )
    rates = await load_rates(connection)
    return [
        piece
        for row in rows
        for piece in rate_pieces(
            LiveInterval(
                resource_id=row["resource_id"],
                team_id=row["team_id"],
                place=row["place"],
                hourly_rate_nanousd=row["hourly_rate_nanousd"],
                started_us=to_unix_us(row["started_at"]),
                proved_us=to_unix_us(row["proved_until"]),
            ),
            rates.get(row["option_id"], ()),
        )
    ]


async def _posted_minutes(connection: Connection) -> dict[HourKey, PostedMinutes]:
    rows = await connection.fetch("SELECT * FROM billing_api.minutes_v1")
    return {
        HourKey(
            row["resource_id"], row["place"], to_unix_us(row["hour"]), row["hourly_rate_nanousd"]
        ): PostedMinutes(row["team_id"], row["minutes"], row["posted_nanousd"], row["postings"])
        for row in rows
    }


async def _spend_days(connection: Connection) -> dict[SpendKey, int]:
    rows = await connection.fetch(
        "SELECT team_id, scope, scope_id, day, posted_nanousd FROM billing_api.spend_days_v1"
    )
    return {
        SpendKey(row["team_id"], row["scope"], row["scope_id"], row["day"]): row["posted_nanousd"]
        for row in rows
    }


async def _held_leases(connection: Connection) -> dict[str, int]:
    rows = await connection.fetch("SELECT lease_id, horizon_at FROM billing_api.held_leases_v1")
    return {row["lease_id"]: to_unix_us(row["horizon_at"]) for row in rows}


async def _teams(connection: Connection) -> dict[str, str]:
    rows = await connection.fetch("SELECT team_id, slug FROM gateway_api.teams_v1")
    return {name: row["team_id"] for row in rows for name in (row["slug"], row["team_id"])}
