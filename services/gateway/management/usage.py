"""`/api/usage` and `/api/requests`: what was used, and what each request cost, as billing knows it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

from aiohttp import web

from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    TEAM_QUERY,
    ManagementDeps,
    acting_team,
    answer,
    invalid_cursor,
    listing,
    not_found,
    page_of,
    path_id,
    query_of,
    read_time,
    timestamp,
)
from services.gateway.money import format_usd
from services.gateway.routes import MANAGE, RouteSpec
from services.gateway.store import Row
from services.gateway.views import GroupBy
from shared.inference.errors import bad_request

RECORDS_KEPT_DAYS = 30
"""Billing deletes request records after this; sums over a longer time would silently miss what was charged."""
GROUPS = ("day", "model", "key", "resource")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


class Usage:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = deps.views

    def routes(self) -> list[RouteSpec]:
        return [
            schemas.route(
                "GET", "/api/usage", self.usage, MANAGE, "Tokens, minutes and what they cost",
                answers={200: schemas.USAGE},
                query=TEAM_QUERY | {
                    "from": schemas.TIME,
                    "to": schemas.TIME,
                    "group_by": {"type": "string", "enum": list(GROUPS), "default": "day"},
                },
            ),
            schemas.route(
                "GET", "/api/requests", self.requests, MANAGE, "Request records, newest first",
                answers={200: schemas.page(schemas.REQUEST)},
                query=PAGE_QUERY | TEAM_QUERY | {"model": schemas.TEXT, "resource_id": schemas.TEXT},
            ),
            schemas.route(
                "GET", "/api/requests/{request_id}", self.request, MANAGE, "One request: a job for each prompt",
                answers={200: schemas.REQUEST_JOBS}, query=TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def usage(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        start, end, group_by = usage_range(query_of(request), datetime.now(UTC))
        rows = await self._views.usage(team.team_id, start, end, group_by)
        balance = await self._views.balance_nanousd(team.team_id)
        data = [
            row
            | {
                "tokens_usd": format_usd(row["tokens_nanousd"]),
                "minutes_usd": format_usd(row["minutes_nanousd"]),
            }
            for row in rows
        ]
        return answer(
            {
                "from": timestamp(start),
                "to": timestamp(end),
                "group_by": group_by,
                "data": data,
                "balance_nanousd": balance,
                "balance_usd": format_usd(balance),
            }
        )

    async def requests(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        query = query_of(request)
        model = query.get("model")
        if model is not None and "/" not in model:
            model = f"{team.slug}/{model}"
        rows = await self._views.requests(
            team.team_id, read_position(page.after), page.limit + 1, model, query.get("resource_id")
        )
        return listing(rows, page, request_json, position_of)

    async def request(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        request_id = path_id(request, "request_id")
        rows = await self._views.jobs_of_request(team.team_id, request_id)
        if not rows:
            raise not_found()
        return answer({"request_id": request_id, "jobs": [request_json(row) for row in rows]})


def usage_range(query: dict[str, str], now: datetime) -> tuple[datetime, datetime, GroupBy]:
    """Return [from, to) and the grouping. Pure; raises `ApiError` 400. Default: the last 30 days by day."""
    end = read_time(query["to"], "to") if "to" in query else now
    start = read_time(query["from"], "from") if "from" in query else now - timedelta(days=RECORDS_KEPT_DAYS)
    # A minute of grace: clients compute "30 days ago" before they ask.
    if not now - timedelta(days=RECORDS_KEPT_DAYS, minutes=1) <= start < end:
        message = f"from must be before to, and within the last {RECORDS_KEPT_DAYS} days."
        raise bad_request("invalid_value", message, "from")
    group_by = query.get("group_by", "day")
    if group_by not in GROUPS:
        raise bad_request("invalid_value", f"group_by must be one of {', '.join(GROUPS)}.", "group_by")
    return start, end, cast(GroupBy, group_by)


def position_of(row: Row) -> str:
    """Return where a row stands in the list; microseconds, as PostgreSQL keeps them."""
    return f"{(row['accepted_at'] - _EPOCH) // MICROSECOND}:{row['job_id']}"


def read_position(after: str) -> tuple[datetime, str] | None:
    if not after:
        return None
    stamp, colon, job_id = after.partition(":")
    if not colon or not stamp.isdecimal() or len(stamp) > 16:
        raise invalid_cursor()
    return _EPOCH + int(stamp) * MICROSECOND, job_id


def request_json(row: Row) -> dict[str, Any]:
    return {
        "request_id": row["request_id"],
        "job_id": row["job_id"],
        "key_id": row["key_id"],
        "resource_id": row["resource_id"],
        "billing": row["billing_mode"],
        "work_class": row["work_class"],
        "operation": row["operation"],
        "model": row["model_name"],
        "model_type": row["model_type"],
        "revision": row["revision"],
        "outcome": row["outcome"],
        "error_code": row["error_code"],
        "attempts": row["attempt"],
        "prompt_tokens": row["prompt_tokens"],
        "completion_tokens": row["completion_tokens"],
        "charged_nanousd": row["charged_nanousd"],
        "charged_usd": format_usd(row["charged_nanousd"]),
        "queue_ms": row["queue_ms"],
        "swap_ms": row["swap_ms"],
        "prefill_ms": row["prefill_ms"],
        "decode_ms": row["decode_ms"],
        "accepted_at": timestamp(row["accepted_at"]),
        "first_token_at": timestamp(row["first_token_at"]),
        "finished_at": timestamp(row["finished_at"]),
    }
