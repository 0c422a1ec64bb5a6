"""SELECTs behind statements: a month's lines, and the jobs, hours and postings that a line opens to."""

from __future__ import annotations

from datetime import datetime

import asyncpg

from shared.calendar_month import CalendarMonth
from shared.database import Database


class StatementViews:
    """What billing and the scheduler tell of a team's month. All amounts are integers in nano-USD."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def token_lines(self, team_id: str, month: CalendarMonth) -> list[asyncpg.Record]:
        """By type, class and price version: what was charged first, and by how much later facts corrected it."""
        return await self._database.fetch(
            """
            SELECT model_type, work_class, price_id, p.prompt_nanousd, p.completion_nanousd, lines.* FROM (
                SELECT price_id AS of_price, model_type AS of_type, work_class AS of_class, count(*) AS jobs,
                       sum(first_prompt_tokens)::bigint AS prompt_tokens,
                       sum(first_completion_tokens)::bigint AS completion_tokens,
                       sum(first_nanousd)::bigint AS first_nanousd,
                       count(*) FILTER (WHERE amount_nanousd <> first_nanousd) AS corrected_jobs,
                       sum(c.prompt_tokens - first_prompt_tokens)::bigint AS corrected_prompt_tokens,
                       sum(c.completion_tokens - first_completion_tokens)::bigint AS corrected_completion_tokens,
                       sum(amount_nanousd - first_nanousd)::bigint AS corrected_nanousd
                FROM billing_api.job_charges_v1 c WHERE team_id = $1 AND accepted_at >= $2 AND accepted_at < $3
                GROUP BY price_id, model_type, work_class
            ) lines JOIN billing_api.prices_v1 p ON p.price_id = of_price
            ORDER BY model_type, work_class, starts_at
            """,
            team_id,
            month.start,
            month.end,
        )

    async def minute_lines(self, team_id: str, month: CalendarMonth) -> list[asyncpg.Record]:
        """By resource and hourly rate."""
        return await self._database.fetch(
            """
            SELECT resource_id, hourly_rate_nanousd, sum(minutes)::bigint AS minutes,
                   sum(posted_nanousd)::bigint AS amount_nanousd,
                   (SELECT name FROM scheduler_api.resources_v1 r WHERE r.resource_id = m.resource_id) AS name
            FROM billing_api.minutes_v1 m WHERE team_id = $1 AND hour >= $2 AND hour < $3
            GROUP BY resource_id, hourly_rate_nanousd HAVING sum(posted_nanousd) <> 0 OR sum(minutes) <> 0
            ORDER BY resource_id, hourly_rate_nanousd
            """,
            team_id,
            month.start,
            month.end,
        )

    async def money_in_lines(self, team_id: str, month: CalendarMonth) -> list[asyncpg.Record]:
        """By kind: credits, payments, and what corrects them. The amount is what the team got."""
        return await self._database.fetch(
            """
            SELECT kind, count(*) AS postings, sum(amount_nanousd)::bigint AS amount_nanousd
            FROM billing_api.money_in_v1 WHERE team_id = $1 AND created_at >= $2 AND created_at < $3
            GROUP BY kind ORDER BY kind
            """,
            team_id,
            month.start,
            month.end,
        )

    async def jobs(
        self,
        team_id: str,
        month: CalendarMonth,
        line: tuple[str, str, str],
        corrected_only: bool,
        after: tuple[datetime, str] | None,
        limit: int,
    ) -> list[asyncpg.Record]:
        """Return the jobs of a token line (type, class, price), oldest first."""
        at, job_id = after or (None, "")
        return await self._database.fetch(
            """
            SELECT * FROM billing_api.job_charges_v1
            WHERE team_id = $1 AND accepted_at >= $2 AND accepted_at < $3
              AND (model_type, work_class, price_id) = ($4, $5, $6) AND (NOT $7 OR amount_nanousd <> first_nanousd)
              AND ($8::timestamptz IS NULL OR (accepted_at, job_id) > ($8, $9))
            ORDER BY accepted_at, job_id LIMIT $10
            """,
            team_id,
            month.start,
            month.end,
            *line,
            corrected_only,
            at,
            job_id,
            limit,
        )

    async def hours(
        self,
        team_id: str,
        month: CalendarMonth,
        resource_id: str,
        rate_nanousd: int,
        after: tuple[datetime, int] | None,
        limit: int,
    ) -> list[asyncpg.Record]:
        """Return what each place was charged by the hour, oldest first."""
        hour, place = after or (None, 0)
        return await self._database.fetch(
            """
            SELECT * FROM billing_api.minutes_v1
            WHERE team_id = $1 AND hour >= $2 AND hour < $3 AND resource_id = $4 AND hourly_rate_nanousd = $5
              AND ($6::timestamptz IS NULL OR (hour, place) > ($6, $7))
            ORDER BY hour, place LIMIT $8
            """,
            team_id,
            month.start,
            month.end,
            resource_id,
            rate_nanousd,
            hour,
            place,
            limit,
        )

    async def intervals(
        self, team_id: str, resource_id: str, rate_nanousd: int, first: datetime, end: datetime
    ) -> list[asyncpg.Record]:
        """Return the live intervals of the resource at this rate that reach into [first, end)."""
        return await self._database.fetch(
            """
            SELECT place, started_at, proved_until FROM scheduler_api.intervals_v1
            WHERE team_id = $1 AND resource_id = $2 AND hourly_rate_nanousd = $3 AND NOT pool
              AND proved_until > $4 AND started_at < $5
            ORDER BY started_at, place
            """,
            team_id,
            resource_id,
            rate_nanousd,
            first,
            end,
        )

    async def money_in(
        self, team_id: str, month: CalendarMonth, kind: str, after: str, limit: int
    ) -> list[asyncpg.Record]:
        """Return postings of one kind, by transaction id, which is by time."""
        return await self._database.fetch(
            """
            SELECT transaction_id, words, created_at, amount_nanousd FROM billing_api.money_in_v1
            WHERE team_id = $1 AND created_at >= $2 AND created_at < $3 AND kind = $4 AND transaction_id > $5
            ORDER BY transaction_id LIMIT $6
            """,
            team_id,
            month.start,
            month.end,
            kind,
            after,
            limit,
        )
