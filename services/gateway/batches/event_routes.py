"""`/api/batches/events`: each state that the team's batches came to, in order, to be asked for again and again."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from services.gateway.batches.file_routes import FileDeps
from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    answer,
    invalid_cursor,
    not_found,
    page_of,
    path_id,
    query_of,
    timestamp,
    write_cursor,
)
from services.gateway.routes import INFERENCE, RouteSpec, principal_of

EVENT = schemas.obj(event_id=schemas.COUNT, batch_id=schemas.TEXT, state=schemas.TEXT, at=schemas.TIME)
MAX_DIGITS = 18


def routes(deps: FileDeps) -> list[RouteSpec]:
    handlers = _Handlers(deps)
    return [
        schemas.route(
            "GET", "/api/batches/events", handlers.of_team, INFERENCE,
            "The states that batches came to, oldest first; the last page's cursor goes on with what comes next",
            answers={200: schemas.page(EVENT)}, query=PAGE_QUERY,
        ),
        schemas.route(
            "GET", "/api/batches/{batch_id}/events", handlers.of_batch, INFERENCE, "The states that one batch came to",
            answers={200: schemas.page(EVENT)},
        ),
    ]  # fmt: skip


class _Handlers:
    def __init__(self, deps: FileDeps) -> None:
        self._deps = deps

    async def of_team(self, request: web.Request) -> web.Response:
        page = page_of(request)
        if page.after and not (page.after.isdecimal() and len(page.after) <= MAX_DIGITS):
            raise invalid_cursor()
        rows = await self._deps.tables.events(principal_of(request).team_id, int(page.after or 0), page.limit)
        # Also of the last page: whoever asks again with it gets what has come since.
        last = str(rows[-1]["event_id"]) if rows else page.after
        return answer(
            {"data": [_json(row) for row in rows], "next_cursor": write_cursor(last) if last else None}
        )

    async def of_batch(self, request: web.Request) -> web.Response:
        query_of(request)
        team_id, batch_id = principal_of(request).team_id, path_id(request, "batch_id")
        rows = await self._deps.tables.events_of(team_id, batch_id)
        if not rows:  # each batch has its first
            raise not_found()
        return answer({"data": [_json(row) for row in rows], "next_cursor": None})


def _json(row: Any) -> dict[str, Any]:
    return {
        "event_id": row["event_id"],
        "batch_id": row["batch_id"],
        "state": row["state"],
        "at": timestamp(row["at"]),
    }
