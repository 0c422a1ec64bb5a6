"""SELECTs behind a resource's metrics: counts and histograms of billing, live GPUs of the scheduler.

All of it is read from views that other services publish. Texts of SQL are constants; a checked word chooses among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import asyncpg

from shared.database import Database

Grain = Literal["minute", "hour"]
TIMEOUT_S = 10.0
"""The longest window reads some hundred thousand counts."""
_EPOCH = "timestamptz '2000-01-01 00:00:00+00'"


@dataclass(frozen=True, slots=True)
class Window:
    """[start, end) in steps of `step`, all of them whole; rows of `grain` are read for it."""

    start: datetime
    end: datetime
    step: timedelta
    grain: Grain


class MetricViews:
    """What the gateway tells of how requests went."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def counts(
        self, resource_id: str, window: Window, models: list[str] | None
    ) -> list[asyncpg.Record]:
        """Return requests and tokens by step; a step without any is left out. `models`: names or ids."""
        return await self._database.fetch(
            f"""
            SELECT date_bin($4::interval, {window.grain}, {_EPOCH}) AS start, sum(requests)::bigint AS requests,
                   sum(errors)::bigint AS errors, sum(cancelled)::bigint AS cancelled,
                   sum(prompt_tokens)::bigint AS prompt_tokens, sum(completion_tokens)::bigint AS completion_tokens
            FROM billing_api.{window.grain}_counts_v1
            WHERE resource_id = $1 AND {window.grain} >= $2 AND {window.grain} < $3
              AND ($5::text[] IS NULL OR model_id = ANY($5) OR model_name = ANY($5))
            GROUP BY 1
            """,
            *(resource_id, window.start, window.end, window.step, models),
            timeout_s=TIMEOUT_S,
        )

    async def histograms(
        self, resource_id: str, window: Window, models: list[str] | None
    ) -> list[asyncpg.Record]:
        """Return the counts of each step and measure, merged, as two arrays."""
        return await self._database.fetch(
            f"""
            SELECT start, measure, array_agg(bucket) AS buckets, array_agg(durations) AS counts FROM (
                SELECT date_bin($4::interval, {window.grain}, {_EPOCH}) AS start, measure, bucket,
                       sum(durations)::bigint AS durations
                FROM billing_api.{window.grain}_histograms_v1 h
                CROSS JOIN LATERAL unnest(h.buckets, h.counts) AS counted (bucket, durations)
                WHERE resource_id = $1 AND {window.grain} >= $2 AND {window.grain} < $3
                  AND ($5::text[] IS NULL OR model_id IN (
                      SELECT model_id FROM billing_api.{window.grain}_counts_v1
                      WHERE resource_id = $1 AND {window.grain} >= $2 AND {window.grain} < $3
                        AND (model_id = ANY($5) OR model_name = ANY($5))))
                GROUP BY 1, 2, 3
            ) merged GROUP BY start, measure
            """,
            *(resource_id, window.start, window.end, window.step, models),
            timeout_s=TIMEOUT_S,
        )

    async def busy(self, resource_id: str, window: Window) -> list[asyncpg.Record]:
        """Return for how long workers ran anything, by step."""
        return await self._database.fetch(
            f"""
            SELECT date_bin($4::interval, {window.grain}, {_EPOCH}) AS start, sum(busy_ms)::bigint AS busy_ms
            FROM billing_api.{window.grain}_busy_v1
            WHERE resource_id = $1 AND {window.grain} >= $2 AND {window.grain} < $3 GROUP BY 1
            """,
            *(resource_id, window.start, window.end, window.step),
            timeout_s=TIMEOUT_S,
        )

    async def live(self, resource_id: str, window: Window) -> list[asyncpg.Record]:
        """Return how long GPUs were live, summed over places, by step."""
        return await self._database.fetch(
            """
            SELECT step.start, round(1000 * sum(extract(epoch FROM
                       least(i.proved_until, step.start + $4::interval) - greatest(i.started_at, step.start)
                   )))::bigint AS live_ms
            FROM generate_series($2::timestamptz, $3::timestamptz - $4::interval, $4::interval) AS step (start)
            JOIN scheduler_api.intervals_v1 i
              ON i.resource_id = $1 AND i.started_at < step.start + $4::interval AND i.proved_until > step.start
             AND i.proved_until > $2 AND i.started_at < $3
            GROUP BY step.start
            """,
            *(resource_id, window.start, window.end, window.step),
            timeout_s=TIMEOUT_S,
        )
