"""SQL of request costs: which hours are due, what ran in them, and what came out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from services.billing.instants import HOUR_US, from_unix_us, to_unix_us
from services.billing.minutes import LiveInterval
from services.billing.request_cost import GpuWork, HourShares
from shared.database import Connection

RUNS_AT_MOST = timedelta(hours=25)
"""From acceptance to the end; a line of a batch may wait for a day."""


@dataclass(frozen=True, slots=True)
class DueHour:
    """A resource's hour whose cost is to be shared out (again)."""

    resource_id: str
    team_id: str
    hour_us: int
    cost_nanousd: int


@dataclass(frozen=True, slots=True)
class Ran:
    """A request that ran in the hour, and whose it was."""

    work: GpuWork
    key_id: str
    model_name: str


async def due_hours(
    connection: Connection, since: datetime, first_after: timedelta, last_after: timedelta, limit: int
) -> list[DueHour]:
    """Hours since then, oldest first, that ended long enough ago.

    Each is shared out twice: `first_after` its end, and `last_after` it, when late facts have arrived; and again
    whenever the ledger's amount for it has changed.
    """
    rows = await connection.fetch(
        """
        SELECT m.resource_id, m.team_id, m.hour, m.cost_nanousd FROM (
            SELECT resource_id, team_id, hour, sum(posted_nanousd)::bigint AS cost_nanousd
            FROM billing.minute_charges WHERE hour >= $1 AND hour + interval '1 hour' + $2::interval <= now()
            GROUP BY resource_id, team_id, hour
        ) m LEFT JOIN billing.hour_costs c USING (resource_id, hour)
        WHERE c.hour IS NULL OR c.cost_nanousd <> m.cost_nanousd
           OR (c.shared_at < c.hour + interval '1 hour' + $3::interval
               AND now() >= c.hour + interval '1 hour' + $3::interval)
        ORDER BY m.hour, m.resource_id LIMIT $4
        """,
        since,
        first_after,
        last_after,
        limit,
    )
    return [
        DueHour(row["resource_id"], row["team_id"], to_unix_us(row["hour"]), row["cost_nanousd"])
        for row in rows
    ]


async def load_live(connection: Connection, due: DueHour) -> list[LiveInterval]:
    """The resource's intervals that reach into the hour."""
    rows = await connection.fetch(
        """
        SELECT place, hourly_rate_nanousd, started_at, proved_until FROM scheduler_api.intervals_v1
        WHERE resource_id = $1 AND proved_until > $2 AND started_at < $3
        """,
        due.resource_id,
        from_unix_us(due.hour_us),
        from_unix_us(due.hour_us + HOUR_US),
    )
    return [
        LiveInterval(
            due.resource_id,
            due.team_id,
            row["place"],
            row["hourly_rate_nanousd"],
            to_unix_us(row["started_at"]),
            to_unix_us(row["proved_until"]),
        )
        for row in rows
    ]


async def load_ran(connection: Connection, due: DueHour) -> list[Ran]:
    """Requests that had the GPU in the hour, by the fact of the attempt that ended each.

    Times become whole microseconds here, once. A request that no worker told of had no GPU time that is known.
    """
    hour = from_unix_us(due.hour_us)
    rows = await connection.fetch(
        """
        SELECT r.job_id, r.key_id, r.model_name, told.worker_id, told.ended_ms * 1000 AS ended_us,
               round((coalesce(r.swap_ms, 0) + coalesce(r.prefill_ms, 0) + coalesce(r.decode_ms, 0)) * 1000)::bigint
                   AS gpu_us
        FROM billing.requests r CROSS JOIN LATERAL (
            SELECT e.payload ->> 'worker_id' AS worker_id, (e.payload ->> 'finished_unix_ms')::bigint AS ended_ms
            FROM billing.usage_events e
            WHERE e.job_id = r.job_id AND e.event_type = 'usage.job_finished.v1'
              AND (e.payload ->> 'attempt')::int = r.attempt
            ORDER BY e.event_id LIMIT 1
        ) told
        WHERE r.resource_id = $1 AND r.billing_mode = 'resource' AND r.accepted_at > $2 AND r.accepted_at < $3
        """,
        due.resource_id,
        hour - RUNS_AT_MOST,
        hour + timedelta(hours=1),
    )
    return [
        Ran(
            GpuWork(row["job_id"], row["worker_id"], row["ended_us"] - row["gpu_us"], row["ended_us"]),
            row["key_id"],
            row["model_name"],
        )
        for row in rows
        if row["ended_us"] > due.hour_us and row["ended_us"] - row["gpu_us"] < due.hour_us + HOUR_US
    ]


async def save_shares(connection: Connection, due: DueHour, ran: list[Ran], shared: HourShares) -> None:
    """Put the hour's shares in the place of those that were there."""
    hour = from_unix_us(due.hour_us)
    await connection.execute(
        "DELETE FROM billing.hour_costs WHERE resource_id = $1 AND hour = $2", due.resource_id, hour
    )
    await connection.execute(
        "INSERT INTO billing.hour_costs VALUES ($1, $2, $3, $4, $5, now())",
        due.resource_id,
        hour,
        due.team_id,
        shared.cost_nanousd,
        shared.idle_nanousd,
    )
    of = {each.work.job_id: each for each in ran}
    job_ids = sorted(shared.shares)
    await connection.execute(
        """
        INSERT INTO billing.request_costs (resource_id, hour, team_id, job_id, key_id, model_name, gpu_us, cost_nanousd)
        SELECT $1, $2, $3, * FROM unnest($4::text[], $5::text[], $6::text[], $7::bigint[], $8::bigint[])
        """,
        due.resource_id,
        hour,
        due.team_id,
        job_ids,
        [of[job_id].key_id for job_id in job_ids],
        [of[job_id].model_name for job_id in job_ids],
        [shared.gpu_us[job_id] for job_id in job_ids],
        [shared.shares[job_id] for job_id in job_ids],
    )


async def delete_old(connection: Connection, before: datetime, limit: int) -> int:
    """Forget up to `limit` hours with their shares."""
    return len(
        await connection.fetch(
            """
            DELETE FROM billing.hour_costs WHERE (resource_id, hour) IN
                (SELECT resource_id, hour FROM billing.hour_costs WHERE hour < $1 ORDER BY hour LIMIT $2)
            RETURNING 1
            """,
            before,
            limit,
        )
    )
