"""SELECTs behind `/api/billing`: usage by hour and group, and what requests cost on GPUs paid by the minute.

All of it is read from views that other services publish. Texts of SQL are constants; a checked word chooses among them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import asyncpg

from shared.database import Database

Group = Literal["team", "key", "model", "resource"]
Bucket = Literal["hour", "day"]

_COLUMN: dict[Group, str] = {
    "team": "team_id",
    "key": "key_id",
    "model": "model_name",
    "resource": "resource_id",
}
_NAME: dict[Group, str] = {
    "team": "(SELECT t.slug FROM gateway.teams t WHERE t.team_id = grouped)",
    "key": "(SELECT k.name FROM gateway.api_keys k WHERE k.key_id = grouped)",
    "model": "grouped",
    "resource": "(SELECT r.name FROM scheduler_api.resources_v1 r WHERE r.resource_id = grouped)",
}


class BillingViews:
    """What the gateway tells of bills."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def usage(
        self,
        team_id: str | None,
        start: datetime,
        end: datetime,
        group: Group,
        bucket: Bucket,
        after: tuple[datetime, str] | None,
        limit: int,
    ) -> list[asyncpg.Record]:
        """Return usage of [start, end) by bucket and group, from behind the position `after` (bucket, key) on.

        team_id: None for all teams. Minutes are a resource's, not a key's or a model's: of these a group gets the
        shares of its requests; what was idle, or is not shared out yet, is in the group without a name.
        """
        column = _COLUMN[group]
        of_minutes = column if group in ("team", "resource") else "NULL::text"
        shares = (
            f"SELECT hour, {column}, 0, 0, 0, 0, 0, 0, gpu_us FROM billing_api.request_costs_v1"
            " WHERE {window}"
            if group in ("team", "resource")
            else (
                f"SELECT hour, {column}, 0, 0, 0, 0, 0, cost_nanousd, gpu_us FROM billing_api.request_costs_v1"
                " WHERE {window} UNION ALL SELECT hour, NULL, 0, 0, 0, 0, 0, -cost_nanousd, 0"
                " FROM billing_api.request_costs_v1 WHERE {window}"
            )
        )
        window = "($1::text IS NULL OR team_id = $1) AND {at} >= $2 AND {at} < $3"
        sql = f"""
            SELECT *, {_NAME[group]} AS name FROM (
                SELECT bucket, grouped, coalesce(encode(convert_to(grouped, 'UTF8'), 'hex'), 'z') AS key,
                       sum(requests)::bigint AS requests, sum(prompt_tokens)::bigint AS prompt_tokens,
                       sum(completion_tokens)::bigint AS completion_tokens,
                       sum(tokens_nanousd)::bigint AS tokens_nanousd, sum(minutes)::bigint AS gpu_minutes,
                       sum(gpu_nanousd)::bigint AS gpu_nanousd, (sum(gpu_us) / 1000)::bigint AS gpu_ms
                FROM (
                    SELECT date_trunc('{bucket}', at, 'UTC') AS bucket, facts.* FROM (
                        SELECT accepted_at, {column}, 1, prompt_tokens, completion_tokens, charged_nanousd, 0, 0, 0
                        FROM billing_api.requests_v1 WHERE {window.format(at="accepted_at")}
                        UNION ALL
                        SELECT hour, {of_minutes}, 0, 0, 0, 0, minutes, posted_nanousd, 0
                        FROM billing_api.minutes_v1 WHERE {window.format(at="hour")}
                        UNION ALL {shares.format(window=window.format(at="hour"))}
                    ) facts (at, grouped, requests, prompt_tokens, completion_tokens, tokens_nanousd, minutes,
                             gpu_nanousd, gpu_us)
                ) dated GROUP BY bucket, grouped
            ) summed
            WHERE $4::timestamptz IS NULL OR (bucket, key COLLATE "C") > ($4, $5 COLLATE "C")
            ORDER BY bucket, key COLLATE "C" LIMIT $6
        """
        at, key = after or (None, "")
        # What lies before the position's bucket is on earlier pages: it need not be summed again.
        first = start if at is None else max(start, at)
        return await self._database.fetch(sql, team_id, first, end, at, key, limit)

    async def hour_cost(self, team_id: str, resource_id: str, hour: datetime) -> asyncpg.Record | None:
        return await self._database.fetchrow(
            "SELECT * FROM billing_api.hour_costs_v1 WHERE team_id = $1 AND resource_id = $2 AND hour = $3",
            team_id,
            resource_id,
            hour,
        )

    async def advice(self, team_id: str) -> asyncpg.Record | None:
        """The adviser's last answer for the team."""
        return await self._database.fetchrow(
            "SELECT document, computed_at FROM billing_api.advice_v1 WHERE team_id = $1", team_id
        )

    async def request_costs(
        self, team_id: str, resource_id: str, hour: datetime, after: str, limit: int
    ) -> list[asyncpg.Record]:
        """Return what each request bore of the hour, by job id."""
        return await self._database.fetch(
            "SELECT c.job_id, r.request_id, c.key_id, c.model_name, c.gpu_us / 1000 AS gpu_ms, c.cost_nanousd"
            " FROM billing_api.request_costs_v1 c LEFT JOIN billing_api.requests_v1 r USING (job_id)"
            " WHERE c.team_id = $1 AND c.resource_id = $2 AND c.hour = $3 AND c.job_id > $4"
            " ORDER BY c.job_id LIMIT $5",
            team_id,
            resource_id,
            hour,
            after,
            limit,
        )
