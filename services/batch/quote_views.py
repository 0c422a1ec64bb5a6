"""SELECTs behind a quote: prices and rates in force, what GPUs did, how long answers were, what a team may have."""

from __future__ import annotations

from typing import Any

from services.batch.quote import Answers, Option, TokenPrice
from services.batch.sizing import PROMPT_TOKEN_WEIGHT
from shared.database import Database

SEEN_BATCH_MS, SEEN_BUSY_MS = 20_000, 60_000
"""An hour in which GPUs ran batches, or anything, for less than this says little about what they can do."""
SEEN_REQUESTS = 5
"""Fewer answers than this say little about how long they are."""
LATELY = 1000
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_OPTIONS = """
    WITH hours AS (
        SELECT r.option_id, b.busy_ms, c.tokens, c.batch_tokens
        FROM scheduler_api.resources_v1 r
        JOIN billing_api.hour_busy_v1 b USING (resource_id)
        JOIN LATERAL (
            SELECT sum(completion_tokens + $3::float8 * prompt_tokens)::float8 AS tokens,
                   coalesce(sum(completion_tokens + $3::float8 * prompt_tokens) FILTER (WHERE work_class = 'batch'), 0)::float8
                       AS batch_tokens
            FROM billing_api.hour_counts_v1 c WHERE c.resource_id = b.resource_id AND c.hour = b.hour
        ) AS c ON c.tokens > 0
        WHERE r.model_type = $1 AND (r.team_id = $2 OR r.pool) AND b.hour > now() - interval '7 days'
    ), paces AS (
        SELECT option_id,
               sum(tokens) FILTER (WHERE batch_tokens >= 0.9 * tokens AND busy_ms >= $4) * 1000
                   / sum(busy_ms) FILTER (WHERE batch_tokens >= 0.9 * tokens AND busy_ms >= $4) AS batches,
               max(tokens * 1000 / busy_ms) FILTER (WHERE busy_ms >= $5) AS requests
        FROM hours GROUP BY option_id
    )
    SELECT o.option_id, o.name, o.device_kind, o.max_batch, o.max_context_tokens,
           coalesce((SELECT v.hourly_rate_nanousd FROM billing_api.rates_v1 v
                     WHERE v.option_id = o.option_id AND v.starts_at <= now() ORDER BY v.starts_at DESC LIMIT 1),
                    o.hourly_rate_nanousd) AS hourly_rate_nanousd,
           coalesce(p.batches, p.requests)::float8 AS tokens_per_s,
           CASE WHEN p.batches IS NOT NULL THEN 'batches' WHEN p.requests IS NOT NULL THEN 'requests' ELSE 'unknown' END
               AS pace_basis,
           s.start_s,
           (SELECT CASE WHEN count(*) > 0 THEN count(*) FILTER (WHERE is_free AND kind = o.device_kind) END
            FROM scheduler_api.devices_v1 WHERE reported_at > now() - interval '15 seconds')::int AS free_gpus
    FROM scheduler_api.options_v1 o
    LEFT JOIN paces p USING (option_id)
    LEFT JOIN scheduler_api.start_times_v1 s USING (option_id)
    WHERE o.model_type = $1 AND ($6::text IS NULL OR o.name = $6 OR o.option_id = $6)
    ORDER BY o.option_id
"""


class QuoteViews:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def options(self, team_id: str, model_type: str, name: str | None) -> list[Option]:
        """What GPUs of each option of the type did for this team, or on shared GPUs, in the last week."""
        rows = await self._database.fetch(
            _OPTIONS, model_type, team_id, PROMPT_TOKEN_WEIGHT, SEEN_BATCH_MS, SEEN_BUSY_MS, name
        )
        return [Option(**dict(row)) for row in rows]

    async def price(self, model_type: str) -> TokenPrice | None:
        row = await self._database.fetchrow(
            "SELECT price_id, prompt_nanousd, completion_nanousd FROM billing_api.prices_v1"
            " WHERE model_type = $1 AND work_class = 'batch' AND starts_at <= now() ORDER BY starts_at DESC LIMIT 1",
            model_type,
        )
        return None if row is None else TokenPrice(**dict(row))

    async def answers(self, team_id: str, model_id: str, endpoint: str) -> Answers:
        """How long the model's answers were for this team: others' are none of its business."""
        if endpoint == "/v1/embeddings":
            return Answers(basis="none")
        row = await self._database.fetchrow(
            "SELECT count(*) AS requests, avg(completion_tokens)::float8 AS mean FROM ("
            " SELECT completion_tokens FROM billing_api.requests_v1 WHERE team_id = $1 AND model_id = $2"
            " AND operation = $3 AND outcome = 'succeeded' AND accepted_at > now() - interval '30 days'"
            " ORDER BY accepted_at DESC LIMIT $4) AS lately",
            team_id,
            model_id,
            _OPERATIONS[endpoint],
            LATELY,
        )
        if row is None or row["requests"] < SEEN_REQUESTS:
            return Answers(basis="limit")
        return Answers(basis="mean", mean_tokens=row["mean"], requests=row["requests"])

    async def quota(self, team_id: str) -> int:
        """GPUs that the team may have at once."""
        row: Any = await self._database.fetchrow(
            "SELECT places FROM scheduler_api.quotas_v1 WHERE scope IN ($1, 'every_team')"
            " ORDER BY scope = 'every_team' LIMIT 1",
            team_id,
        )
        return 0 if row is None else int(row["places"])
