"""SQL of the adviser: what a team's days held, and the answer that is kept for it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from services.billing.adviser import Minute, Seen
from services.billing.instants import to_unix_us
from shared.database import Connection


@dataclass(frozen=True, slots=True)
class IdleResource:
    """GPUs that were paid for, and that nobody asked anything."""

    resource_id: str
    name: str | None
    minutes: int
    cost_nanousd: int


async def teams_seen(connection: Connection, first: datetime, end: datetime) -> list[str]:
    """Teams that asked or paid for anything in [first, end)."""
    rows = await connection.fetch(
        """
        SELECT team_id FROM billing.requests WHERE accepted_at >= $1 AND accepted_at < $2
        UNION SELECT team_id FROM billing.minute_charges WHERE hour >= $1 AND hour < $2 ORDER BY team_id
        """,
        first,
        end,
    )
    return [row["team_id"] for row in rows]


async def load_minutes(
    connection: Connection, team_id: str, first: datetime, end: datetime
) -> dict[str, list[Minute]]:
    """By model type: requests that got an answer or a part of one, whichever way they were paid."""
    rows = await connection.fetch(
        """
        SELECT model_type, work_class, date_trunc('minute', accepted_at) AS minute, count(*) AS requests,
               sum(prompt_tokens)::bigint AS prompt_tokens, sum(completion_tokens)::bigint AS completion_tokens
        FROM billing.requests
        WHERE team_id = $1 AND accepted_at >= $2 AND accepted_at < $3
          AND (outcome = 'succeeded' OR (outcome = 'cancelled' AND completion_tokens > 0))
        GROUP BY model_type, work_class, minute ORDER BY minute
        """,
        team_id,
        first,
        end,
    )
    minutes: dict[str, list[Minute]] = {}
    for row in rows:
        minutes.setdefault(row["model_type"], []).append(
            Minute(
                to_unix_us(row["minute"]),
                row["work_class"],
                row["requests"],
                row["prompt_tokens"],
                row["completion_tokens"],
            )
        )
    return minutes


async def load_seen(
    connection: Connection, team_id: str, model_type: str, first: datetime, end: datetime
) -> Seen:
    """What GPUs did for this team's own requests. Times become whole microseconds here, once.

    The best minute is looked for among the twenty in which most requests were finished.
    """
    row = await connection.fetchrow(
        """
        WITH ran AS (
            SELECT resource_id, finished_at, coalesce(swap_ms, 0) + coalesce(prefill_ms, 0) + coalesce(decode_ms, 0) AS ms
            FROM billing.requests
            WHERE team_id = $1 AND model_type = $2 AND accepted_at >= $3 AND accepted_at < $4
              AND outcome = 'succeeded' AND decode_ms IS NOT NULL
        ), busiest AS (
            SELECT resource_id, date_trunc('minute', finished_at) AS minute, count(*) AS finished
            FROM ran GROUP BY 1, 2 ORDER BY finished DESC LIMIT 20
        )
        SELECT (SELECT count(*) FROM ran) AS requests,
               (SELECT coalesce(round(sum(ms) * 1000), 0)::bigint FROM ran) AS gpu_us,
               (SELECT coalesce(max(1000 * b.finished / live.gpus), 0)::bigint FROM busiest b CROSS JOIN LATERAL (
                    SELECT count(DISTINCT i.place) AS gpus FROM scheduler_api.intervals_v1 i
                    WHERE i.resource_id = b.resource_id AND i.proved_until > b.minute
                      AND i.started_at < b.minute + interval '1 minute'
                ) live WHERE live.gpus > 0) AS best_minute_milli
        """,
        team_id,
        model_type,
        first,
        end,
    )
    assert row is not None  # a SELECT without FROM
    return Seen(row["requests"], row["gpu_us"], row["best_minute_milli"])


async def load_paid(connection: Connection, team_id: str, first: datetime, end: datetime) -> dict[str, int]:
    """By model type: what the ledger has for these days, by the token and by the minute."""
    rows = await connection.fetch(
        """
        SELECT model_type, sum(amount)::bigint AS amount FROM (
            SELECT model_type, amount_nanousd AS amount FROM billing.job_charges
            WHERE team_id = $1 AND accepted_at >= $2 AND accepted_at < $3
            UNION ALL
            SELECT r.model_type, m.posted_nanousd FROM billing.minute_charges m
            JOIN scheduler_api.resources_v1 r USING (resource_id)
            WHERE m.team_id = $1 AND m.hour >= $2 AND m.hour < $3
        ) paid GROUP BY model_type
        """,
        team_id,
        first,
        end,
    )
    return {row["model_type"]: row["amount"] for row in rows}


async def hourly_rate_nanousd(connection: Connection, team_id: str, model_type: str) -> int | None:
    """The rate in force of the team's first resource of the type, else of the type's cheapest option; None without one."""
    rate: int | None = await connection.fetchval(
        """
        WITH now_in_force AS (
            SELECT o.option_id, coalesce(
                (SELECT v.hourly_rate_nanousd FROM billing_api.rates_v1 v
                 WHERE v.option_id = o.option_id AND v.starts_at <= now() ORDER BY v.starts_at DESC LIMIT 1),
                o.hourly_rate_nanousd) AS hourly_rate_nanousd
            FROM scheduler_api.options_v1 o WHERE o.model_type = $2)
        SELECT coalesce(
            (SELECT f.hourly_rate_nanousd FROM scheduler_api.resources_v1 r JOIN now_in_force f USING (option_id)
             WHERE r.team_id = $1 AND r.model_type = $2 AND r.deleted_at IS NULL AND NOT r.pool
             ORDER BY r.created_at LIMIT 1),
            (SELECT min(hourly_rate_nanousd) FROM now_in_force))
        """,
        team_id,
        model_type,
    )
    return rate


async def load_idle(
    connection: Connection, team_id: str, first: datetime, end: datetime
) -> list[IdleResource]:
    """Resources with billed minutes and not one request, the dearest first."""
    rows = await connection.fetch(
        """
        SELECT m.resource_id, sum(m.minutes)::bigint AS minutes, sum(m.posted_nanousd)::bigint AS cost_nanousd,
               (SELECT name FROM scheduler_api.resources_v1 r WHERE r.resource_id = m.resource_id) AS name
        FROM billing.minute_charges m WHERE m.team_id = $1 AND m.hour >= $2 AND m.hour < $3
          AND NOT EXISTS (SELECT FROM billing.requests q
                          WHERE q.resource_id = m.resource_id AND q.accepted_at >= $2 AND q.accepted_at < $3)
        GROUP BY m.resource_id HAVING sum(m.minutes) > 0 ORDER BY cost_nanousd DESC, m.resource_id LIMIT 100
        """,
        team_id,
        first,
        end,
    )
    return [
        IdleResource(row["resource_id"], row["name"], row["minutes"], row["cost_nanousd"]) for row in rows
    ]


async def save_advice(connection: Connection, team_id: str, document: str) -> None:
    """Keep the answer in the place of the last one."""
    await connection.execute(
        """
        INSERT INTO billing.advice (team_id, document) VALUES ($1, $2::jsonb)
        ON CONFLICT (team_id) DO UPDATE SET document = EXCLUDED.document, computed_at = now()
        """,
        team_id,
        document,
    )
