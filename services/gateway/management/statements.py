"""`/api/billing/statements`: a month's bill, its lines, and what stands behind each line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web

from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    TEAM_QUERY,
    ManagementDeps,
    Page,
    acting_team,
    answer,
    invalid_cursor,
    listing,
    not_found,
    page_of,
    query_of,
    timestamp,
)
from services.gateway.money import format_usd
from services.gateway.routes import MANAGE, RouteSpec, Schema
from services.gateway.statement import MONEY_IN, Line, LineKey, lines_of, read_line_id, statement_csv
from services.gateway.statement_views import StatementViews
from services.gateway.store import Row
from shared.calendar_month import CalendarMonth, read_month
from shared.inference.errors import ApiError, bad_request

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_HOUR = timedelta(hours=1)
FORMATS = ("json", "csv")

OPTIONAL_INTEGER: Schema = {"type": ["integer", "null"]}
LINE = schemas.obj(
    line_id=schemas.TEXT, kind=schemas.TEXT, text=schemas.TEXT, quantity=schemas.COUNT, unit=schemas.TEXT,
    prompt_tokens=OPTIONAL_INTEGER, completion_tokens=OPTIONAL_INTEGER, minutes=OPTIONAL_INTEGER,
    amount_nanousd=schemas.INTEGER, amount_usd=schemas.USD,
)  # fmt: skip
STATEMENT: Schema = {
    "type": "object",
    "properties": {
        "team": schemas.TEXT, "month": schemas.TEXT, "from": schemas.TIME, "to": schemas.TIME, "ended": schemas.FLAG,
        "lines": schemas.array(LINE), "charged_nanousd": schemas.INTEGER, "charged_usd": schemas.USD,
        "received_nanousd": schemas.INTEGER, "received_usd": schemas.USD, "total_nanousd": schemas.INTEGER,
        "total_usd": schemas.USD,
    },
    "required": [
        "team", "month", "from", "to", "ended", "lines", "charged_nanousd", "charged_usd", "received_nanousd",
        "received_usd", "total_nanousd", "total_usd",
    ],
    "additionalProperties": False,
}  # fmt: skip
INTERVAL = schemas.obj(started_at=schemas.TIME, proved_until=schemas.TIME)
BEHIND: Schema = {
    "oneOf": [
        schemas.obj(
            job_id=schemas.TEXT, request_id=schemas.TEXT, key_id=schemas.TEXT, model=schemas.TEXT,
            accepted_at=schemas.TIME, prompt_tokens=schemas.INTEGER, completion_tokens=schemas.INTEGER,
            amount_nanousd=schemas.INTEGER, amount_usd=schemas.USD,
        ),
        schemas.obj(
            hour=schemas.TIME, place=schemas.COUNT, minutes=schemas.COUNT, intervals=schemas.array(INTERVAL),
            amount_nanousd=schemas.INTEGER, amount_usd=schemas.USD,
        ),
        schemas.obj(
            transaction_id=schemas.TEXT, posted_at=schemas.TIME, text=schemas.TEXT, amount_nanousd=schemas.INTEGER,
            amount_usd=schemas.USD,
        ),
    ]
}  # fmt: skip


class Statements:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = StatementViews(deps.views.database)

    def routes(self) -> list[RouteSpec]:
        one = "/api/billing/statements/{month}"
        return [
            schemas.route(
                "GET", one, self.statement, MANAGE, "A month's bill (UTC), as JSON or CSV", answers={200: STATEMENT},
                query=TEAM_QUERY | {"format": {"type": "string", "enum": list(FORMATS), "default": "json"}},
            ),
            schemas.route(
                "GET", f"{one}/lines/{{line_id}}", self.line, MANAGE,
                "What stands behind a line: requests, hours with their intervals, or postings",
                answers={200: schemas.page(BEHIND)}, query=PAGE_QUERY | TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def statement(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        month = _month(request)
        form = query_of(request).get("format", "json")
        if form not in FORMATS:
            raise bad_request("invalid_value", f"format must be one of {', '.join(FORMATS)}.", "format")
        lines = lines_of(
            await self._views.token_lines(team.team_id, month),
            await self._views.minute_lines(team.team_id, month),
            await self._views.money_in_lines(team.team_id, month),
        )
        if form == "csv":
            name = f"statement-{team.slug}-{month.name}.csv"
            return web.Response(
                text=statement_csv(lines),
                content_type="text/csv",
                charset="utf-8",
                headers={"Content-Disposition": f'attachment; filename="{name}"'},
            )
        received = -sum(line.amount_nanousd for line in lines if line.kind in MONEY_IN)
        total = sum(line.amount_nanousd for line in lines)
        return answer(
            {
                "team": team.slug,
                "month": month.name,
                "from": timestamp(month.start),
                "to": timestamp(month.end),
                "ended": month.end <= datetime.now(UTC),
                "lines": [line_json(line) for line in lines],
                **_amount("charged", total + received),
                **_amount("received", received),
                **_amount("total", total),
            }
        )

    async def line(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        month, page = _month(request), page_of(request)
        key = read_line_id(request.match_info["line_id"])
        if key is None:
            raise not_found()
        if key.token is not None:
            return await self._jobs(team.team_id, month, key, page)
        if key.kind == "minutes":
            return await self._hours(team.team_id, month, key, page)
        rows = await self._views.money_in(team.team_id, month, key.kind, page.after, page.limit + 1)
        return listing(rows, page, _posting_json, lambda row: row["transaction_id"])

    async def _jobs(self, team_id: str, month: CalendarMonth, key: LineKey, page: Page) -> web.Response:
        corrections = key.kind == "token_corrections"
        assert key.token is not None
        rows = await self._views.jobs(
            team_id, month, key.token, corrections, read_moment_position(page.after), page.limit + 1
        )
        return listing(
            rows,
            page,
            lambda row: _job_json(row, corrections),
            lambda row: f"{(row['accepted_at'] - _EPOCH) // _MICROSECOND}:{row['job_id']}",
        )

    async def _hours(self, team_id: str, month: CalendarMonth, key: LineKey, page: Page) -> web.Response:
        position = read_moment_position(page.after)
        if position is not None and not (position[1].isdecimal() and len(position[1]) <= 4):
            raise invalid_cursor()
        after = None if position is None else (position[0], int(position[1]))
        rows = await self._views.hours(
            team_id, month, key.resource_id, key.rate_nanousd, after, page.limit + 1
        )
        shown = rows[: page.limit]
        intervals: list[Row] = []
        if shown:
            first, end = shown[0]["hour"], shown[-1]["hour"] + _HOUR
            intervals = list(
                await self._views.intervals(team_id, key.resource_id, key.rate_nanousd, first, end)
            )
        return listing(
            rows,
            page,
            lambda row: _hour_json(row, intervals),
            lambda row: f"{(row['hour'] - _EPOCH) // _MICROSECOND}:{row['place']}",
        )


def _month(request: web.Request) -> CalendarMonth:
    month = read_month(request.match_info["month"])
    if month is None:
        raise ApiError(400, "invalid_value", "The month must be such as 2026-11.", param="month")
    return month


def read_moment_position(after: str) -> tuple[datetime, str] | None:
    """Return the moment and the rest that a page begins behind. Pure; raises `ApiError` 400."""
    if not after:
        return None
    stamp, colon, rest = after.partition(":")
    if not colon or not stamp.isdecimal() or len(stamp) > 16:
        raise invalid_cursor()
    return _EPOCH + int(stamp) * _MICROSECOND, rest


def _amount(name: str, nanousd: int) -> dict[str, Any]:
    return {f"{name}_nanousd": nanousd, f"{name}_usd": format_usd(nanousd)}


def line_json(line: Line) -> dict[str, Any]:
    return {
        "line_id": line.line_id,
        "kind": line.kind,
        "text": line.text,
        "quantity": line.quantity,
        "unit": line.unit,
        "prompt_tokens": line.prompt_tokens,
        "completion_tokens": line.completion_tokens,
        "minutes": line.minutes,
        **_amount("amount", line.amount_nanousd),
    }


def _job_json(row: Row, corrections: bool) -> dict[str, Any]:
    """What the job was charged first; on a line of corrections, by how much that was corrected."""
    first = {
        "prompt_tokens": row["first_prompt_tokens"],
        "completion_tokens": row["first_completion_tokens"],
        "amount_nanousd": row["first_nanousd"],
    }
    shown = {name: row[name] - value for name, value in first.items()} if corrections else first
    return {
        "job_id": row["job_id"],
        "request_id": row["request_id"],
        "key_id": row["key_id"],
        "model": row["model_name"],
        "accepted_at": timestamp(row["accepted_at"]),
        "prompt_tokens": shown["prompt_tokens"],
        "completion_tokens": shown["completion_tokens"],
        **_amount("amount", shown["amount_nanousd"]),
    }


def _hour_json(row: Row, intervals: list[Row]) -> dict[str, Any]:
    """One place's hour, with the live intervals that its minutes are the union of."""
    start, end = row["hour"], row["hour"] + _HOUR
    return {
        "hour": timestamp(start),
        "place": row["place"],
        "minutes": row["minutes"],
        "intervals": [
            {
                "started_at": timestamp(each["started_at"]),
                "proved_until": timestamp(each["proved_until"]),
            }
            for each in intervals
            if each["place"] == row["place"] and each["proved_until"] > start and each["started_at"] < end
        ],
        **_amount("amount", row["posted_nanousd"]),
    }


def _posting_json(row: Row) -> dict[str, Any]:
    return {
        "transaction_id": row["transaction_id"],
        "posted_at": timestamp(row["created_at"]),
        "text": row["words"],
        **_amount("amount", -row["amount_nanousd"]),
    }
