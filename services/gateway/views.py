"""SELECTs on other services' views: resources and options of the scheduler, prices and usage of billing.

Nothing here writes: what another service owns is changed by a command (`commands.py`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import asyncpg

from services.gateway.paying import Purse
from shared.database import Database
from shared.inference.principal import ResourceView
from shared.outcomes import Unavailable

GroupBy = Literal["day", "model", "key", "resource"]

_REQUEST_GROUP: dict[str, str] = {
    "day": "to_char(accepted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    "model": "model_name",
    "key": "key_id",
    "resource": "resource_id",
}
# Minutes belong to a resource, not to one model or key of it: there they are one group of their own, without a name.
_MINUTE_GROUP: dict[str, str] = {
    "day": "to_char(hour AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    "model": "NULL::text",
    "key": "NULL::text",
    "resource": "resource_id",
}


# An option that was made a moment ago has no version in billing yet: it costs what it was made with.
_RATE_IN_FORCE = """coalesce(
    (SELECT v.hourly_rate_nanousd FROM billing_api.rates_v1 v
     WHERE v.option_id = {0}.option_id AND v.starts_at <= now() ORDER BY v.starts_at DESC LIMIT 1),
    {0}.hourly_rate_nanousd) AS rate_in_force_nanousd"""


SEEN_BUSY_MS = 600_000
"""An hour in which GPUs were busy for less than this says little about what they can do."""


class Views:
    """What the gateway may read of other services."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def database(self) -> Database:
        """For readers of views that have a module of their own."""
        return self._database

    # ---- scheduler

    async def route_resources(self) -> list[ResourceView]:
        """Return the resources of all teams that take the requests of their type, as routing sees them."""
        rows = await self._database.fetch(
            "SELECT resource_id, team_id, model_type, pool, wanted, state, live_count, max_context_tokens, reason,"
            " extract(epoch FROM expected_live_at)::float8 AS expected_live_unix_s,"
            " extract(epoch FROM created_at)::float8 AS created_unix_s,"
            " when_asleep = 'wake' AND min_now = 0 AND max_now > 0 AS wakes"
            " FROM scheduler_api.resources_v1 JOIN scheduler_api.scaling_v1 USING (resource_id)"
            " JOIN scheduler_api.holds_v1 USING (resource_id)"
            " WHERE deleted_at IS NULL AND takes_traffic"
        )
        return [ResourceView(**dict(row)) for row in rows]

    async def resources(self, team_id: str, after: str, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(
            f"SELECT r.*, s.*, {_RATE_IN_FORCE.format('r')} FROM scheduler_api.resources_v1 r"
            " JOIN scheduler_api.scaling_v1 s USING (resource_id)"
            " WHERE team_id = $1 AND resource_id > $2 AND deleted_at IS NULL ORDER BY r.resource_id LIMIT $3",
            team_id,
            after,
            limit,
        )

    async def resource(self, team_id: str, resource_id: str) -> asyncpg.Record | None:
        return await self._database.fetchrow(
            f"SELECT r.*, s.*, {_RATE_IN_FORCE.format('r')} FROM scheduler_api.resources_v1 r"
            " JOIN scheduler_api.scaling_v1 s USING (resource_id)"
            " WHERE team_id = $1 AND resource_id = $2 AND deleted_at IS NULL",
            team_id,
            resource_id,
        )

    async def quota(self, team_id: str) -> asyncpg.Record:
        """Return the team's quota: places, taken ones, and whether it is its own."""
        row = await self._database.fetchrow(
            "SELECT q.places, q.scope = $1 AS own, (SELECT count(*) FROM scheduler_api.places_v1"
            " JOIN scheduler_api.resources_v1 USING (resource_id) WHERE team_id = $1)::int AS taken"
            " FROM scheduler_api.quotas_v1 q WHERE q.scope IN ($1, 'every_team')"
            " ORDER BY q.scope = 'every_team' LIMIT 1",
            team_id,
        )
        if row is None:
            raise Unavailable("the scheduler has no quotas")
        return row

    async def may_use_resource(self, team_id: str, resource_id: str) -> bool:
        """Whether it is the team's own resource, or a shared pool."""
        row = await self._database.fetchrow(
            "SELECT FROM scheduler_api.resources_v1"
            " WHERE resource_id = $2 AND deleted_at IS NULL AND (team_id = $1 OR pool)",
            team_id,
            resource_id,
        )
        return row is not None

    async def places(self, resource_ids: list[str]) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT * FROM scheduler_api.places_v1 WHERE resource_id = ANY($1) ORDER BY resource_id, place",
            resource_ids,
        )

    async def worker_models(self, resource_id: str, model_ids: list[str]) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT * FROM scheduler_api.worker_models_v1 WHERE resource_id = $1 AND model_id = ANY($2)"
            " ORDER BY model_id, place, revision",
            resource_id,
            model_ids,
        )

    async def model_pins(self, resource_id: str) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT model_id, copies, pinned_at FROM scheduler_api.model_pins_v1 WHERE resource_id = $1",
            resource_id,
        )

    async def decisions(self, resource_id: str, before: int, limit: int) -> list[asyncpg.Record]:
        """Return the newest decisions with an id below `before`."""
        return await self._database.fetch(
            "SELECT decision_id, decided_at, action, words FROM scheduler_api.decisions_v1"
            " WHERE resource_id = $1 AND decision_id < $2 ORDER BY decision_id DESC LIMIT $3",
            resource_id,
            before,
            limit,
        )

    async def model_alarms(self, resource_id: str, limit: int) -> list[asyncpg.Record]:
        """Return the newest."""
        return await self._database.fetch(
            "SELECT * FROM scheduler_api.model_alarms_v1 WHERE resource_id = $1"
            " ORDER BY found_at DESC, event_id LIMIT $2",
            resource_id,
            limit,
        )

    async def options(
        self, team_id: str, model_type: str | None, after: str, limit: int
    ) -> list[asyncpg.Record]:
        """Return options with what one GPU did for the team (or on shared GPUs), and how many are free.

        What a GPU did: requests in a minute of being busy, in the best hour of the last week. Free: by reports of the
        last seconds; NULL where no node reports, since other launchers know what they have and do not tell.
        """
        return await self._database.fetch(
            f"""
            SELECT o.*, {_RATE_IN_FORCE.format("o")}, (
                SELECT max(c.requests * 60000.0 / b.busy_ms)::float8
                FROM scheduler_api.resources_v1 r JOIN billing_api.hour_busy_v1 b USING (resource_id) JOIN LATERAL (
                    SELECT sum(requests) AS requests FROM billing_api.hour_counts_v1 c
                    WHERE c.resource_id = b.resource_id AND c.hour = b.hour
                ) c ON true
                WHERE r.option_id = o.option_id AND (r.team_id = $2 OR r.pool)
                  AND b.hour > now() - interval '7 days' AND b.busy_ms >= {SEEN_BUSY_MS}
            ) AS measured_rpm_per_gpu, (
                SELECT CASE WHEN count(*) > 0 THEN count(*) FILTER (WHERE is_free AND kind = o.device_kind) END
                FROM scheduler_api.devices_v1 WHERE reported_at > now() - interval '15 seconds'
            ) AS free_gpus
            FROM scheduler_api.options_v1 o
            WHERE ($1::text IS NULL OR model_type = $1) AND option_id > $3 ORDER BY option_id LIMIT $4
            """,
            model_type,
            team_id,
            after,
            limit,
        )

    async def option(self, model_type: str, name_or_id: str) -> asyncpg.Record | None:
        return await self._database.fetchrow(
            f"SELECT o.*, {_RATE_IN_FORCE.format('o')} FROM scheduler_api.options_v1 o"
            " WHERE model_type = $1 AND (name = $2 OR option_id = $2)",
            model_type,
            name_or_id,
        )

    # ---- billing

    async def prices(self, model_type: str | None, after: str, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT * FROM billing_api.prices_v1"
            " WHERE ($1::text IS NULL OR model_type = $1) AND price_id > $2 ORDER BY price_id LIMIT $3",
            model_type,
            after,
            limit,
        )

    async def price_at(self, model_type: str, work_class: str, at: datetime) -> asyncpg.Record | None:
        """Return the version that holds then (`holds`); if none does, one that lies ahead; None if there is none."""
        return await self._database.fetchrow(
            "SELECT *, starts_at <= $3 AS holds FROM billing_api.prices_v1 WHERE model_type = $1 AND work_class = $2"
            " ORDER BY holds DESC, starts_at DESC LIMIT 1",
            model_type,
            work_class,
            at,
        )

    async def rates(self, option_id: str | None, after: str, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT * FROM billing_api.rates_v1"
            " WHERE ($1::text IS NULL OR option_id = $1) AND rate_id > $2 ORDER BY rate_id LIMIT $3",
            option_id,
            after,
            limit,
        )

    async def rate_at(self, option_id: str, at: datetime) -> asyncpg.Record | None:
        """Return the version that holds then; None before the option has one."""
        return await self._database.fetchrow(
            "SELECT * FROM billing_api.rates_v1 WHERE option_id = $1 AND starts_at <= $2"
            " ORDER BY starts_at DESC LIMIT 1",
            option_id,
            at,
        )

    async def deposits(self, team_id: str, after: str, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT * FROM billing_api.deposits_v1 WHERE team_id = $1 AND transaction_id > $2"
            " ORDER BY transaction_id LIMIT $3",
            team_id,
            after,
            limit,
        )

    async def purse(self) -> Purse:
        """Return what has a price now, and who may spend nothing."""
        priced = await self._database.fetch(
            "SELECT DISTINCT model_type FROM billing_api.prices_v1 WHERE work_class = 'live' AND starts_at <= now()"
        )
        spent = await self._database.fetch(
            "SELECT team_id FROM billing_api.spendable_v1 WHERE spendable_nanousd = 0"
        )
        return Purse(frozenset(row[0] for row in priced), frozenset(row[0] for row in spent))

    async def account(self, team_id: str) -> dict[str, Any]:
        """Return how a team pays and what it has; one that nothing was said of pays later, without a limit."""
        row = await self._database.fetchrow(
            "SELECT pays, credit_limit_nanousd, balance_nanousd, spendable_nanousd FROM billing_api.spendable_v1"
            " WHERE team_id = $1",
            team_id,
        )
        if row is not None:
            return dict(row)
        return {
            "pays": "postpaid",
            "credit_limit_nanousd": None,
            "balance_nanousd": await self.balance_nanousd(team_id),
            "spendable_nanousd": None,
        }

    async def budgets(self, team_id: str, after: str, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT * FROM billing_api.budgets_v1 WHERE team_id = $1 AND budget_id > $2 ORDER BY budget_id LIMIT $3",
            team_id,
            after,
            limit,
        )

    async def budget(self, team_id: str, budget_id: str) -> asyncpg.Record | None:
        return await self._database.fetchrow(
            "SELECT * FROM billing_api.budgets_v1 WHERE team_id = $1 AND budget_id = $2", team_id, budget_id
        )

    async def alerts(
        self, team_id: str, before: str, limit: int, budget_id: str | None
    ) -> list[asyncpg.Record]:
        """Return alerts, newest first, that are older than the alert `before` (empty: from the newest on)."""
        return await self._database.fetch(
            "SELECT * FROM billing_api.alerts_v1 WHERE team_id = $1 AND ($2 = '' OR alert_id < $2)"
            " AND ($3::text IS NULL OR budget_id = $3) ORDER BY alert_id DESC LIMIT $4",
            team_id,
            before,
            budget_id,
            limit,
        )

    async def balance_nanousd(self, team_id: str) -> int:
        row = await self._database.fetchrow(
            "SELECT balance_nanousd FROM billing_api.balances_v1 WHERE team_id = $1", team_id
        )
        return 0 if row is None else int(row["balance_nanousd"])

    async def usage(
        self, team_id: str, start: datetime, end: datetime, group_by: GroupBy
    ) -> list[dict[str, Any]]:
        """Return requests, tokens and minutes of [start, end) by group; the group without a name comes last."""
        # The expressions are the constants above, chosen by a checked key: nothing of the request is in the text.
        sql = f"""
            SELECT "group", sum(requests)::bigint AS requests, sum(prompt_tokens)::bigint AS prompt_tokens,
                   sum(completion_tokens)::bigint AS completion_tokens,
                   sum(tokens_nanousd)::bigint AS tokens_nanousd,
                   sum(minutes)::bigint AS minutes, sum(minutes_nanousd)::bigint AS minutes_nanousd
            FROM (
                SELECT {_REQUEST_GROUP[group_by]} AS "group", 1 AS requests, prompt_tokens, completion_tokens,
                       charged_nanousd AS tokens_nanousd, 0 AS minutes, 0 AS minutes_nanousd
                FROM billing_api.requests_v1 WHERE team_id = $1 AND accepted_at >= $2 AND accepted_at < $3
                UNION ALL
                SELECT {_MINUTE_GROUP[group_by]}, 0, 0, 0, 0, minutes, posted_nanousd
                FROM billing_api.minutes_v1 WHERE team_id = $1 AND hour >= $2 AND hour < $3
            ) AS facts
            GROUP BY "group" ORDER BY "group" NULLS LAST LIMIT 1000
        """
        return [dict(row) for row in await self._database.fetch(sql, team_id, start, end)]

    async def requests(
        self,
        team_id: str,
        before: tuple[datetime, str] | None,
        limit: int,
        model: str | None,
        resource_id: str | None,
    ) -> list[asyncpg.Record]:
        """Return request records, newest first, that are older than `before` (accepted_at, job_id)."""
        at, job_id = before or (None, None)
        return await self._database.fetch(
            "SELECT * FROM billing_api.requests_v1 WHERE team_id = $1"
            " AND ($2::timestamptz IS NULL OR (accepted_at, job_id) < ($2, $3))"
            " AND ($4::text IS NULL OR model_name = $4) AND ($5::text IS NULL OR resource_id = $5)"
            " ORDER BY accepted_at DESC, job_id DESC LIMIT $6",
            team_id,
            at,
            job_id,
            model,
            resource_id,
            limit,
        )

    async def jobs_of_request(self, team_id: str, request_id: str) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT * FROM billing_api.requests_v1 WHERE team_id = $1 AND request_id = $2 ORDER BY job_id LIMIT 100",
            team_id,
            request_id,
        )
