"""`/api/batches/schedules`: batches that come again and again. The batch service owns them; writes are commands to it."""

from __future__ import annotations

import json
from typing import Annotated, Any

from aiohttp import web
from msgspec import Meta

from services.gateway.batches.batch_routes import require_own_resource
from services.gateway.batches.file_routes import FileDeps
from services.gateway.batches.shapes import parse_batch
from services.gateway.commands import refusal
from services.gateway.edge import read_json
from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    answer,
    listing,
    not_found,
    page_of,
    path_id,
    query_of,
    timestamp,
)
from services.gateway.management.bodies import Body, Title, parse
from services.gateway.management.idempotency import command_envelope, idempotent
from services.gateway.routes import INFERENCE, RouteSpec, principal_of
from services.gateway.store import Row, Store
from shared import topology
from shared.messages import BatchTemplate, ChangeSchedule, CommandResult, CreateSchedule, DeleteSchedule

_RUN = schemas.obj(
    due_at=schemas.TIME, batch_id=schemas.OPTIONAL_TEXT, problem=schemas.OPTIONAL_TEXT, made_at=schemas.TIME
)
_SCHEDULE_FIELDS = {
    "schedule_id": schemas.TEXT, "name": schemas.TEXT, "cron": schemas.TEXT, "time_zone": schemas.TEXT,
    "batch": {"type": "object"}, "paused": schemas.FLAG, "next_at": schemas.OPTIONAL_TIME, "created_at": schemas.TIME,
}  # fmt: skip
SCHEDULE = schemas.obj(**_SCHEDULE_FIELDS)
SCHEDULE_WITH_RUNS = schemas.obj(**_SCHEDULE_FIELDS, runs=schemas.array(_RUN))


class AddSchedule(Body):
    name: Title
    cron: Annotated[
        str, Meta(min_length=9, max_length=100, description="Minute, hour, day of month, month, day of week.")
    ]
    batch: Annotated[
        dict[str, Any], Meta(description="The body that would make such a batch by `POST /v1/batches`.")
    ]
    time_zone: Annotated[str, Meta(min_length=1, max_length=64)] = "UTC"


class PauseSchedule(Body):
    paused: bool


def routes(deps: FileDeps, store: Store) -> list[RouteSpec]:
    handlers = _Handlers(deps)
    one = "/api/batches/schedules/{schedule_id}"
    return [
        schemas.route(
            "POST", "/api/batches/schedules", idempotent(store)(handlers.create), INFERENCE,
            "Make a batch at certain times, again and again", AddSchedule, {201: SCHEDULE_WITH_RUNS},
        ),
        schemas.route(
            "GET", "/api/batches/schedules", handlers.list_page, INFERENCE, "List the team's schedules",
            answers={200: schemas.page(SCHEDULE)}, query=PAGE_QUERY,
        ),
        schemas.route(
            "GET", one, handlers.get, INFERENCE, "One schedule and its latest batches",
            answers={200: SCHEDULE_WITH_RUNS},
        ),
        schemas.route(
            "PATCH", one, handlers.pause, INFERENCE, "Pause a schedule, or let it go on", PauseSchedule,
            {200: SCHEDULE_WITH_RUNS},
        ),
        schemas.route(
            "DELETE", one, handlers.delete, INFERENCE, "End a schedule; its batches stay", answers={204: None}
        ),
    ]  # fmt: skip


class _Handlers:
    def __init__(self, deps: FileDeps) -> None:
        self._deps = deps

    async def create(self, request: web.Request) -> web.Response:
        query_of(request)
        body = parse(await read_json(request), AddSchedule)
        wanted = parse_batch(body.batch)
        principal = principal_of(request)
        if wanted.own_resource is not None:
            await require_own_resource(self._deps.tables, principal)
        command = CreateSchedule(
            **await command_envelope(request, self._deps.commands),
            team_id=principal.team_id,
            key_id=principal.key_id,
            name=body.name,
            cron=body.cron,
            time_zone=body.time_zone,
            batch=BatchTemplate(
                input_file_id=wanted.input_file_id,
                endpoint=wanted.endpoint,
                completion_window=wanted.completion_window,
                completion_window_s=wanted.completion_window_s,
                metadata=dict(wanted.metadata),
                output_expires_after_s=wanted.output_expires_after_s,
                own_resource=wanted.own_resource,
            ),
        )
        result = await self._call(command)
        return await self._shown(principal.team_id, str(result.body["schedule_id"]), 201)

    async def list_page(self, request: web.Request) -> web.Response:
        page = page_of(request)
        rows = await self._deps.tables.schedules(principal_of(request).team_id, page.after, page.limit + 1)
        return listing(rows, page, schedule_json, lambda row: row["schedule_id"])

    async def get(self, request: web.Request) -> web.Response:
        query_of(request)
        return await self._shown(principal_of(request).team_id, path_id(request, "schedule_id"), 200)

    async def pause(self, request: web.Request) -> web.Response:
        query_of(request)
        team_id, schedule_id = principal_of(request).team_id, path_id(request, "schedule_id")
        body = parse(await read_json(request), PauseSchedule)
        envelope = await command_envelope(request, self._deps.commands)
        await self._call(
            ChangeSchedule(**envelope, team_id=team_id, schedule_id=schedule_id, paused=body.paused)
        )
        return await self._shown(team_id, schedule_id, 200)

    async def delete(self, request: web.Request) -> web.Response:
        query_of(request)
        team_id, schedule_id = principal_of(request).team_id, path_id(request, "schedule_id")
        envelope = await command_envelope(request, self._deps.commands)
        await self._call(DeleteSchedule(**envelope, team_id=team_id, schedule_id=schedule_id))
        return web.Response(status=204)

    async def _call(self, command: CreateSchedule | ChangeSchedule | DeleteSchedule) -> CommandResult:
        result = await self._deps.commands.call(topology.BATCH_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        return result

    async def _shown(self, team_id: str, schedule_id: str, status: int) -> web.Response:
        row = await self._deps.tables.schedule(team_id, schedule_id)
        if row is None:
            raise not_found()
        runs = await self._deps.tables.schedule_runs(team_id, schedule_id)
        return answer(schedule_json(row) | {"runs": [_run_json(run) for run in runs]}, status)


def schedule_json(row: Row) -> dict[str, Any]:
    return {
        "schedule_id": row["schedule_id"],
        "name": row["name"],
        "cron": row["cron"],
        "time_zone": row["time_zone"],
        "batch": json.loads(row["batch"]),
        "paused": row["paused"],
        "next_at": None if row["paused"] else timestamp(row["next_at"]),
        "created_at": timestamp(row["created_at"]),
    }


def _run_json(row: Row) -> dict[str, Any]:
    return {
        "due_at": timestamp(row["due_at"]),
        "batch_id": row["batch_id"],
        "problem": row["problem"],
        "made_at": timestamp(row["made_at"]),
    }
