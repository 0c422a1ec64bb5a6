"""SQL of metrics: which minutes are marked, and what they come to anew, minute by minute and hour by hour.

Every function runs inside the caller's database transaction. A minute's rows are computed from its request records alone,
an hour's from its minutes alone, so doing it twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from shared.database import Connection
from shared.log_buckets import bucket_sql

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True, order=True)
class ResourceTime:
    """A resource's minute, or its hour."""

    resource_id: str
    start: datetime


async def take_marks(connection: Connection, limit: int) -> tuple[int, set[ResourceTime]]:
    """Take up to `limit` of the oldest marks away; return how many, and the minutes that they name."""
    rows = await connection.fetch(
        """
        DELETE FROM billing.histogram_marks WHERE mark_id IN
            (SELECT mark_id FROM billing.histogram_marks ORDER BY mark_id LIMIT $1)
        RETURNING resource_id, minute
        """,
        limit,
    )
    return len(rows), {ResourceTime(row["resource_id"], row["minute"]) for row in rows}


_MARKED = "unnest($1::text[], $2::timestamptz[]) AS marked (resource_id, start)"
_COUNTS = f"""
    INSERT INTO billing.minute_counts
    SELECT resource_id, marked.start, model_id, work_class, max(model_name), count(*),
           count(*) FILTER (WHERE outcome IN ('failed', 'expired')), count(*) FILTER (WHERE outcome = 'cancelled'),
           sum(prompt_tokens), sum(completion_tokens)
    FROM {_MARKED} JOIN billing.requests r USING (resource_id)
    WHERE r.finished_at >= marked.start AND r.finished_at < marked.start + interval '1 minute'
    GROUP BY resource_id, marked.start, model_id, work_class
"""
# Of a request that failed or was cut short, the times until its end say nothing of how fast answers are.
_HISTOGRAMS = f"""
    INSERT INTO billing.minute_histograms
    SELECT resource_id, start, model_id, work_class, measure, array_agg(bucket ORDER BY bucket),
           array_agg(durations ORDER BY bucket)
    FROM (
        SELECT resource_id, marked.start, model_id, work_class, measure, {bucket_sql("duration_ms")} AS bucket,
               count(*) AS durations
        FROM {_MARKED} JOIN billing.requests r USING (resource_id) CROSS JOIN LATERAL (VALUES
            ('response', CASE WHEN outcome = 'succeeded'
                THEN (extract(epoch FROM finished_at - accepted_at) * 1000)::float8 END),
            ('first_token', CASE WHEN outcome = 'succeeded'
                THEN (extract(epoch FROM first_token_at - accepted_at) * 1000)::float8 END),
            ('queue', queue_ms), ('swap', swap_ms)) AS measured (measure, duration_ms)
        WHERE r.finished_at >= marked.start AND r.finished_at < marked.start + interval '1 minute'
          AND duration_ms IS NOT NULL
        GROUP BY resource_id, marked.start, model_id, work_class, measure, bucket
    ) counted GROUP BY resource_id, start, model_id, work_class, measure
"""
# A request has the GPU for an hour at most (billing.gpu_time), so what ended later did not run in this minute.
_BUSY = f"""
    INSERT INTO billing.minute_busy
    SELECT resource_id, start, greatest(round(sum(extract(epoch FROM upper(span) - lower(span))) * 1000), 1)::bigint
    FROM (
        SELECT resource_id, marked.start, worker_id, range_agg(tstzrange(
                   greatest(r.finished_at - gpu, marked.start), least(r.finished_at, marked.start + interval '1 minute')
               )) AS spans
        FROM {_MARKED} JOIN billing.requests r USING (resource_id)
        CROSS JOIN LATERAL billing.gpu_time(r.swap_ms, r.prefill_ms, r.decode_ms) gpu
        CROSS JOIN LATERAL (
            SELECT e.payload ->> 'worker_id' AS worker_id FROM billing.usage_events e
            WHERE e.job_id = r.job_id AND e.event_type = 'usage.job_finished.v1'
              AND (e.payload ->> 'attempt')::int = r.attempt
            ORDER BY e.event_id LIMIT 1
        ) told
        WHERE r.finished_at > marked.start AND r.finished_at < marked.start + interval '61 minutes'
          AND r.finished_at - gpu < marked.start + interval '1 minute' AND gpu > interval '0'
        GROUP BY resource_id, marked.start, worker_id
    ) of_worker CROSS JOIN LATERAL unnest(spans) span GROUP BY resource_id, start
"""
_HOUR_COUNTS = f"""
    INSERT INTO billing.hour_counts
    SELECT resource_id, marked.start, model_id, work_class, max(model_name), sum(requests), sum(errors), sum(cancelled),
           sum(prompt_tokens), sum(completion_tokens)
    FROM {_MARKED} JOIN billing.minute_counts m USING (resource_id)
    WHERE m.minute >= marked.start AND m.minute < marked.start + interval '1 hour'
    GROUP BY resource_id, marked.start, model_id, work_class
"""
_HOUR_HISTOGRAMS = f"""
    INSERT INTO billing.hour_histograms
    SELECT resource_id, start, model_id, work_class, measure, array_agg(bucket ORDER BY bucket),
           array_agg(durations ORDER BY bucket)
    FROM (
        SELECT resource_id, marked.start, model_id, work_class, measure, bucket, sum(durations)::bigint AS durations
        FROM {_MARKED} JOIN billing.minute_histograms m USING (resource_id)
        CROSS JOIN LATERAL unnest(m.buckets, m.counts) AS counted (bucket, durations)
        WHERE m.minute >= marked.start AND m.minute < marked.start + interval '1 hour'
        GROUP BY resource_id, marked.start, model_id, work_class, measure, bucket
    ) merged GROUP BY resource_id, start, model_id, work_class, measure
"""
_HOUR_BUSY = f"""
    INSERT INTO billing.hour_busy
    SELECT resource_id, marked.start, sum(busy_ms)::bigint
    FROM {_MARKED} JOIN billing.minute_busy m USING (resource_id)
    WHERE m.minute >= marked.start AND m.minute < marked.start + interval '1 hour'
    GROUP BY resource_id, marked.start
"""
_MINUTE_TABLES = {
    "billing.minute_counts": _COUNTS,
    "billing.minute_histograms": _HISTOGRAMS,
    "billing.minute_busy": _BUSY,
}
_HOUR_TABLES = {
    "billing.hour_counts": _HOUR_COUNTS,
    "billing.hour_histograms": _HOUR_HISTOGRAMS,
    "billing.hour_busy": _HOUR_BUSY,
}


async def compute_minutes(connection: Connection, minutes: Sequence[ResourceTime]) -> None:
    """Put what these minutes' records come to in the place of what was there."""
    for table, insert in _MINUTE_TABLES.items():
        await _replace(connection, table, "minute", insert, minutes)


async def compute_hours(connection: Connection, hours: Sequence[ResourceTime]) -> None:
    """Put what these hours' minutes come to in the place of what was there."""
    for table, insert in _HOUR_TABLES.items():
        await _replace(connection, table, "hour", insert, hours)


async def _replace(
    connection: Connection, table: str, column: str, insert: str, times: Sequence[ResourceTime]
) -> None:
    arguments = [time.resource_id for time in times], [time.start for time in times]
    await connection.execute(
        f"DELETE FROM {table} t USING {_MARKED}"
        f" WHERE t.resource_id = marked.resource_id AND t.{column} = marked.start",
        *arguments,
    )
    await connection.execute(insert, *arguments)


async def delete_old(
    connection: Connection, minutes_before: datetime, hours_before: datetime, limit: int
) -> int:
    """Forget up to `limit` rows of each table; return the most that one had."""
    most = 0
    for tables, column, before in (
        (_MINUTE_TABLES, "minute", minutes_before),
        (_HOUR_TABLES, "hour", hours_before),
    ):
        for table in tables:
            deleted = await connection.fetch(
                f"DELETE FROM {table} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {table} WHERE {column} < $1 LIMIT $2))"
                " RETURNING 1",
                before,
                limit,
            )
            most = max(most, len(deleted))
    return most
