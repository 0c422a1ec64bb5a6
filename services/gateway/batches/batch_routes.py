"""`/v1/batches`: create, look, list, cancel, and results while it runs. What changes a batch is a command to its service."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from services.gateway.batches.file_routes import FileDeps, page_json, read_limit
from services.gateway.batches.shapes import BATCH, batch_json, create_batch_schema, list_of, parse_batch
from services.gateway.batches.tables import Tables
from services.gateway.commands import refusal
from services.gateway.edge import read_json
from services.gateway.management.acting import answer, not_found, path_id, query_of
from services.gateway.management.idempotency import command_envelope, idempotent
from services.gateway.paying import insufficient_credit
from services.gateway.routes import INFERENCE, MANAGE, RouteSpec, principal_of
from services.gateway.store import Store
from shared import topology
from shared.inference.batch_output import output_line
from shared.inference.errors import ApiError, must_not_retry
from shared.inference.principal import Principal
from shared.messages import CancelBatch, CommandResult, CreateBatch

PAGE, MAX_PAGE = 20, 100
RESULT_BUFFER_BYTES = 64 * 1024
_QUERY: dict[str, dict[str, Any]] = {
    "after": {"type": "string", "description": "The last id of the page before."},
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": PAGE},
}


def routes(deps: FileDeps, store: Store) -> list[RouteSpec]:
    handlers = _Handlers(deps)

    def spec(method: str, path: str, handler: Any, summary: str, **more: Any) -> RouteSpec:
        return RouteSpec(
            method=method, path=path, handler=handler, summary=summary, error_shape="openai", scope=INFERENCE,
            tag="batches", **more
        )  # fmt: skip

    return [
        spec("POST", "/v1/batches", idempotent(store)(handlers.create), "Run the lines of a file.",
             request_schema=create_batch_schema(), responses={200: BATCH}),
        spec("GET", "/v1/batches", handlers.list, "The team's batches, newest first.", query=_QUERY,
             responses={200: list_of(BATCH)}),
        spec("GET", "/v1/batches/{batch_id}", handlers.get, "One batch and how far it is.", responses={200: BATCH}),
        spec("POST", "/v1/batches/{batch_id}/cancel", handlers.cancel,
             "Stop a batch; what is done stays.", responses={200: BATCH}),
        spec("GET", "/v1/batches/{batch_id}/results", handlers.results,
             "The results so far, as lines of JSON in the input's order.", responses={200: None}),
    ]  # fmt: skip


async def require_own_resource(tables: Tables, principal: Principal) -> None:
    """Making and turning on resources takes the scope for it, and somebody who pays. Raises `ApiError`."""
    if MANAGE not in principal.scopes:
        raise ApiError(
            403, "insufficient_scope", "own_resource needs a key with the scope manage.", param="own_resource"
        )
    if await tables.spendable(principal.team_id) == 0:
        raise insufficient_credit()


class _Handlers:
    def __init__(self, deps: FileDeps) -> None:
        self._deps = deps

    async def create(self, request: web.Request) -> web.StreamResponse:
        wanted = parse_batch(await read_json(request))
        principal = principal_of(request)
        if wanted.own_resource is not None:
            await require_own_resource(self._deps.tables, principal)
        command = CreateBatch(
            **await command_envelope(request, self._deps.commands),
            team_id=principal.team_id,
            key_id=principal.key_id,
            input_file_id=wanted.input_file_id,
            endpoint=wanted.endpoint,
            completion_window=wanted.completion_window,
            completion_window_s=wanted.completion_window_s,
            metadata=dict(wanted.metadata),
            output_expires_after_s=wanted.output_expires_after_s,
            own_resource=wanted.own_resource,
        )
        result = await self._call(command)
        return await self._shown(principal.team_id, str(result.body["batch_id"]))

    async def list(self, request: web.Request) -> web.Response:
        query = query_of(request)
        limit = read_limit(query, PAGE, MAX_PAGE)
        rows = await self._deps.tables.batches(principal_of(request).team_id, query.get("after"), limit + 1)
        now_unix_s = time.time()
        return answer(page_json([batch_json(dict(row), now_unix_s) for row in rows], limit))

    async def get(self, request: web.Request) -> web.Response:
        return await self._shown(principal_of(request).team_id, path_id(request, "batch_id"))

    async def cancel(self, request: web.Request) -> web.Response:
        team_id, batch_id = principal_of(request).team_id, path_id(request, "batch_id")
        command = CancelBatch(
            **await command_envelope(request, self._deps.commands), team_id=team_id, batch_id=batch_id
        )
        await self._call(command)
        return await self._shown(team_id, batch_id)

    async def results(self, request: web.Request) -> web.StreamResponse:
        team_id, batch_id = principal_of(request).team_id, path_id(request, "batch_id")
        if await self._deps.tables.batch(team_id, batch_id) is None:
            raise not_found()
        response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
        await response.prepare(request)
        buffer = bytearray()
        async for row in self._deps.tables.results(team_id, batch_id):
            buffer += output_line(
                row["custom_id"], row["state"], row["request_id"], row["status_code"], row["response"]
            )
            buffer += b"\n"
            if len(buffer) > RESULT_BUFFER_BYTES:
                await response.write(bytes(buffer))
                buffer.clear()
        await response.write(bytes(buffer))
        await response.write_eof()
        return response

    async def _call(self, command: CreateBatch | CancelBatch) -> CommandResult:
        try:
            result = await self._deps.commands.call(topology.BATCH_COMMANDS, command)
        except ApiError as error:
            # Whether it was done is not known: a client that tries by itself could run everything twice.
            raise must_not_retry(error) from error
        if not result.ok:
            raise must_not_retry(refusal(result))
        return result

    async def _shown(self, team_id: str, batch_id: str) -> web.Response:
        row = await self._deps.tables.batch(team_id, batch_id)
        if row is None:
            raise not_found()
        return answer(batch_json(dict(row), time.time()))
