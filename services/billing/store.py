"""SQL of the raw facts, the request records, prices and answers to commands: the tables that billing owns.

Every function runs inside the caller's database transaction; none of them decides anything.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec
from msgspec.structs import replace

from services.billing.instants import from_unix_ms, to_unix_ms
from services.billing.pricing import Price
from shared.database import Connection
from shared.messages import Command, CommandResult, JobUsage, Timings, UsageEvent, decoder, encode, type_of

_decode_fact = decoder(UsageEvent).decode
_decode_result = decoder(CommandResult).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """A row of billing.requests; the fields are its columns."""

    job_id: str
    request_id: str
    team_id: str
    key_id: str
    resource_id: str
    billing_mode: str
    work_class: str
    operation: str
    model_type: str
    model_id: str
    model_name: str
    revision: int
    outcome: str
    error_code: str | None
    attempt: int
    prompt_tokens: int
    completion_tokens: int
    charged_nanousd: int
    price_id: str | None
    queue_ms: float | None
    swap_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None
    first_token_at: datetime | None
    accepted_at: datetime
    finished_at: datetime


_COLUMNS = [field.name for field in dataclasses.fields(RequestRow)]
_UPSERT_REQUESTS = (
    f"INSERT INTO billing.requests ({', '.join(_COLUMNS)}) "
    f"SELECT {', '.join(_COLUMNS)} FROM jsonb_populate_recordset(NULL::billing.requests, $1::jsonb) "
    f"ON CONFLICT (job_id) DO UPDATE SET "
    + ", ".join(f"{column} = EXCLUDED.{column}" for column in _COLUMNS if column != "job_id")
)


async def lock_jobs(connection: Connection, job_ids: Iterable[str]) -> None:
    """Make other transactions on these jobs wait until this one ends.

    Locks are taken in one order everywhere, and before any row is written, so that batches never deadlock.
    """
    await connection.execute(
        """
        SELECT pg_advisory_xact_lock(key) FROM (
            SELECT DISTINCT hashtextextended('billing job ' || job_id, 0) AS key FROM unnest($1::text[]) job_id
            ORDER BY key
        ) ordered
        """,
        list(job_ids),
    )


async def lock_name(connection: Connection, name: str) -> None:
    """Make other transactions that lock this name wait until this one ends."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", name)


async def insert_facts(connection: Connection, facts: Iterable[UsageEvent]) -> set[str]:
    """Keep the facts that are not known yet; return the event ids of those."""
    ordered = sorted({fact.event_id: fact for fact in facts}.values(), key=lambda fact: fact.event_id)
    rows = await connection.fetch(
        """
        INSERT INTO billing.usage_events (event_id, event_type, job_id, team_id, payload)
        SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::jsonb[])
        ON CONFLICT (event_id) DO NOTHING RETURNING event_id
        """,
        [fact.event_id for fact in ordered],
        [type_of(fact) for fact in ordered],
        [fact.job_id for fact in ordered],
        [fact.team_id for fact in ordered],
        [encode(fact).decode() for fact in ordered],
    )
    return {row["event_id"] for row in rows}


async def find_conflicts(connection: Connection, facts: Iterable[UsageEvent]) -> list[str]:
    """Event ids of those facts that are known with another substance: the first one stays, and somebody has a bug."""
    claimed = {fact.event_id: fact for fact in facts}
    rows = await connection.fetch(
        "SELECT event_id, payload FROM billing.usage_events WHERE event_id = ANY($1::text[])", list(claimed)
    )
    return [
        row["event_id"]
        for row in rows
        if substance(_decode_fact(row["payload"])) != substance(claimed[row["event_id"]])
    ]


def substance(fact: UsageEvent) -> UsageEvent:
    """The fact without what may rightly differ from one telling to the next. Pure.

    A finish that a worker died with is told again by another one, from what the owner knows: not who ran it, nor its
    times, nor whether prefill ran for an answer without a token.
    """
    if isinstance(fact, JobUsage):
        return replace(
            fact,
            worker_id="",
            prefill_ran=False,
            finished_unix_ms=0,
            first_token_unix_ms=None,
            timings=Timings(),
        )
    return replace(fact, voided_unix_ms=0)


async def load_facts(connection: Connection, job_ids: Sequence[str]) -> dict[str, list[UsageEvent]]:
    """All facts of these jobs, by job."""
    rows = await connection.fetch(
        "SELECT job_id, payload FROM billing.usage_events WHERE job_id = ANY($1::text[])", job_ids
    )
    facts: dict[str, list[UsageEvent]] = defaultdict(list)
    for row in rows:
        facts[row["job_id"]].append(_decode_fact(row["payload"]))
    return dict(facts)


async def load_prices(connection: Connection, model_types: Iterable[str]) -> list[Price]:
    """All price versions of these model types that were not withdrawn."""
    rows = await connection.fetch(
        "SELECT * FROM billing_api.prices_v1 WHERE model_type = ANY($1::text[])", sorted(set(model_types))
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


async def insert_price(connection: Connection, price: Price, actor: str) -> bool:
    """Add a version; False if that type and class have one that starts at the same moment."""
    return (
        await connection.fetchval(
            """
            INSERT INTO billing.prices
                (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at, actor)
            VALUES ($1, $2, $3, $4, $5, $6, $7)
            ON CONFLICT (model_type, work_class, starts_at) WHERE withdrawn_at IS NULL DO NOTHING RETURNING 1
            """,
            price.price_id,
            price.model_type,
            price.work_class,
            price.prompt_nanousd,
            price.completion_nanousd,
            from_unix_ms(price.starts_unix_ms),
            actor,
        )
        is not None
    )


async def upsert_requests(connection: Connection, rows: Sequence[RequestRow]) -> None:
    """Write what is now known of these jobs; each job once."""
    if rows:
        ordered = sorted(rows, key=lambda row: row.job_id)
        await connection.execute(_UPSERT_REQUESTS, msgspec.json.encode(ordered).decode())


async def chargeable_jobs(connection: Connection, limit: int) -> list[str]:
    """Requests that were settled without a price, though one is in force by now."""
    rows = await connection.fetch(
        """
        SELECT r.job_id FROM billing.requests r
        WHERE r.billing_mode = 'ppt' AND r.price_id IS NULL AND EXISTS (
            SELECT FROM billing_api.prices_v1 p
            WHERE p.model_type = r.model_type AND p.work_class = r.work_class AND p.starts_at <= r.accepted_at)
        ORDER BY r.job_id LIMIT $1
        """,
        limit,
    )
    return [row["job_id"] for row in rows]


async def count_unpriced(connection: Connection) -> int:
    """Requests with something to pay for and no price to pay it by."""
    return int(
        await connection.fetchval(
            """
            SELECT count(*) FROM billing.requests
            WHERE billing_mode = 'ppt' AND price_id IS NULL AND outcome IN ('succeeded', 'cancelled')
            """
        )
    )


async def delete_old_requests(connection: Connection, before: datetime, limit: int) -> int:
    """Delete up to `limit` request records of jobs accepted before then. Facts and ledger stay."""
    return len(
        await connection.fetch(
            """
            DELETE FROM billing.requests WHERE job_id IN
                (SELECT job_id FROM billing.requests WHERE accepted_at < $1 ORDER BY accepted_at LIMIT $2)
            RETURNING 1
            """,
            before,
            limit,
        )
    )


async def delete_old_results(connection: Connection, before: datetime) -> None:
    """Forget answers to commands that nobody can still repeat."""
    await connection.execute("DELETE FROM billing.command_results WHERE created_at < $1", before)


def refused(command: Command, refusal: tuple[str, str]) -> CommandResult:
    """The answer to a command that cannot be carried out, from its (code, message). Pure."""
    code, message = refusal
    return CommandResult(command_id=command.command_id, ok=False, code=code, message=message)


async def load_result(connection: Connection, command_id: str) -> CommandResult | None:
    """The answer that this command got before."""
    result = await connection.fetchval(
        "SELECT result FROM billing.command_results WHERE command_id = $1", command_id
    )
    return None if result is None else _decode_result(result)


async def insert_result(connection: Connection, result: CommandResult) -> None:
    await connection.execute(
        "INSERT INTO billing.command_results (command_id, result) VALUES ($1, $2::jsonb)",
        result.command_id,
        encode(result).decode(),
    )
