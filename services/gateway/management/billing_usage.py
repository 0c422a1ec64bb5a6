"""`/api/billing/usage` and the cost of requests on GPUs that are paid by the minute."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

from aiohttp import web

from services.gateway.billing_views import BillingViews, Bucket, Group
from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    TEAM_QUERY,
    ManagementDeps,
    acting_team,
    answer,
    invalid_cursor,
    not_found,
    page_of,
    path_id,
    query_of,
    read_time,
    timestamp,
    write_cursor,
)
from services.gateway.management.usage import RECORDS_KEPT_DAYS
from services.gateway.money import format_usd
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec, principal_of
from services.gateway.store import Row
from shared.inference.errors import bad_request

GROUPS = ("team", "key", "model", "resource")
BUCKETS = ("hour", "day")

_AMOUNTS = {
    "tokens_nanousd": schemas.INTEGER,
    "gpu_nanousd": schemas.INTEGER,
    "cost_nanousd": schemas.INTEGER,
}
USAGE_ROW = schemas.obj(
    start=schemas.TIME, group=schemas.OPTIONAL_TEXT, name=schemas.OPTIONAL_TEXT, requests=schemas.COUNT,
    prompt_tokens=schemas.COUNT, completion_tokens=schemas.COUNT, gpu_minutes=schemas.COUNT, gpu_ms=schemas.COUNT,
    **_AMOUNTS, cost_usd=schemas.USD,
)  # fmt: skip
SHARE = schemas.obj(
    job_id=schemas.TEXT, request_id=schemas.OPTIONAL_TEXT, key_id=schemas.TEXT, model=schemas.TEXT, gpu_ms=schemas.COUNT,
    cost_nanousd=schemas.COUNT, cost_usd=schemas.USD,
)  # fmt: skip
HOUR = schemas.obj(
    resource_id=schemas.TEXT, hour=schemas.TIME, cost_nanousd=schemas.COUNT, cost_usd=schemas.USD,
    idle_nanousd=schemas.COUNT, idle_usd=schemas.USD, data=schemas.array(SHARE), next_cursor=schemas.OPTIONAL_TEXT,
)  # fmt: skip


class BillingUsage:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = BillingViews(deps.views.database)

    def routes(self) -> list[RouteSpec]:
        return [
            schemas.route(
                "GET", "/api/billing/usage", self.usage, MANAGE,
                "Requests, tokens, GPU-minutes and cost by hour or day and group, oldest first",
                answers={200: schemas.page(USAGE_ROW)},
                query=PAGE_QUERY | TEAM_QUERY | {
                    "from": schemas.TIME,
                    "to": schemas.TIME,
                    "group_by": {"type": "string", "enum": list(GROUPS), "default": "model"},
                    "bucket": {"type": "string", "enum": list(BUCKETS), "default": "day"},
                },
            ),
            schemas.route(
                "GET", "/api/billing/resources/{resource_id}/hours/{hour}", self.hour, MANAGE,
                "What each request bore of a resource's hour, and what idle time cost",
                answers={200: HOUR}, query=PAGE_QUERY | TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def usage(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        query, page = query_of(request), page_of(request)
        start, end, group, bucket = usage_window(query, datetime.now(UTC))
        # A platform key that names no team sees all of them side by side.
        of_all = group == "team" and "team" not in query and PLATFORM in principal_of(request).scopes
        team_id = None if of_all else team.team_id
        after = read_usage_position(page.after)
        rows = await self._views.usage(team_id, start, end, group, bucket, after, page.limit + 1)
        shown = rows[: page.limit]
        more = len(rows) > page.limit
        return answer(
            {
                "data": [usage_json(row) for row in shown],
                "next_cursor": write_cursor(_position(shown[-1])) if more else None,
            }
        )

    async def hour(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        resource_id = path_id(request, "resource_id")
        hour = read_time(request.match_info["hour"], "hour")
        row = await self._views.hour_cost(team.team_id, resource_id, hour)
        if row is None:
            raise not_found()
        shares = await self._views.request_costs(team.team_id, resource_id, hour, page.after, page.limit + 1)
        shown = shares[: page.limit]
        more = len(shares) > page.limit
        return answer(
            {
                "resource_id": resource_id,
                "hour": timestamp(row["hour"]),
                "cost_nanousd": row["cost_nanousd"],
                "cost_usd": format_usd(row["cost_nanousd"]),
                "idle_nanousd": row["idle_nanousd"],
                "idle_usd": format_usd(row["idle_nanousd"]),
                "data": [share_json(share) for share in shown],
                "next_cursor": write_cursor(shown[-1]["job_id"]) if more else None,
            }
        )


def usage_window(query: dict[str, str], now: datetime) -> tuple[datetime, datetime, Group, Bucket]:
    """Return [from, to), the grouping and the bucket. Pure; raises `ApiError` 400. Default: the last 30 days.

    `from` is at most as old as request records are; `to` may lie ahead.
    """
    end = read_time(query["to"], "to") if "to" in query else now
    oldest = now - timedelta(days=RECORDS_KEPT_DAYS)
    start = read_time(query["from"], "from") if "from" in query else oldest
    # A minute of grace: clients compute "30 days ago" before they ask.
    if not oldest - timedelta(minutes=1) <= start < end:
        message = f"from must be before to, and within the last {RECORDS_KEPT_DAYS} days."
        raise bad_request("invalid_value", message, "from")
    group, bucket = query.get("group_by", "model"), query.get("bucket", "day")
    if group not in GROUPS:
        raise bad_request("invalid_value", f"group_by must be one of {', '.join(GROUPS)}.", "group_by")
    if bucket not in BUCKETS:
        raise bad_request("invalid_value", f"bucket must be one of {', '.join(BUCKETS)}.", "bucket")
    return start, end, cast(Group, group), cast(Bucket, bucket)


def _position(row: Row) -> str:
    return f"{int(row['bucket'].timestamp())}:{row['key']}"


def read_usage_position(after: str) -> tuple[datetime, str] | None:
    """Return the bucket and key that a page begins behind. Pure; raises `ApiError` 400."""
    if not after:
        return None
    stamp, colon, key = after.partition(":")
    if not colon or not stamp.isdecimal() or len(stamp) > 11:
        raise invalid_cursor()
    return datetime.fromtimestamp(int(stamp), UTC), key


def usage_json(row: Row) -> dict[str, Any]:
    cost = row["tokens_nanousd"] + row["gpu_nanousd"]
    return {
        "start": timestamp(row["bucket"]),
        "group": row["grouped"],
        "name": row["name"],
        **{
            name: row[name]
            for name in (
                "requests", "prompt_tokens", "completion_tokens", "gpu_minutes", "gpu_ms", "tokens_nanousd",
                "gpu_nanousd",
            )
        },
        "cost_nanousd": cost,
        "cost_usd": format_usd(cost),
    }  # fmt: skip


def share_json(row: Row) -> dict[str, Any]:
    return {
        "job_id": row["job_id"],
        "request_id": row["request_id"],
        "key_id": row["key_id"],
        "model": row["model_name"],
        "gpu_ms": row["gpu_ms"],
        "cost_nanousd": row["cost_nanousd"],
        "cost_usd": format_usd(row["cost_nanousd"]),
    }
