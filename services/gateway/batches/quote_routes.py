"""`/api/batches/quote`: what a file's lines would take and cost. The batch service counts; this waits for it a while."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated, Any, Literal

from aiohttp import web
from msgspec import Meta

from services.gateway.batches.file_routes import FileDeps
from services.gateway.batches.shapes import read_window
from services.gateway.commands import refusal
from services.gateway.edge import read_json
from services.gateway.management import schemas
from services.gateway.management.acting import answer, not_found, path_id, query_of, timestamp
from services.gateway.management.bodies import Body, OptionName, parse
from services.gateway.management.idempotency import command_envelope, idempotent
from services.gateway.routes import INFERENCE, RouteSpec, principal_of
from services.gateway.store import Row, Store
from shared import topology
from shared.inference.errors import ApiError
from shared.messages import QuoteBatch

WAIT_S, LOOK_S = 20.0, 0.2
"""A count that takes longer is looked at again by its id."""

_OFFER = schemas.obj(
    gpus=schemas.COUNT, finish_s=schemas.OPTIONAL_COUNT, minutes=schemas.OPTIONAL_COUNT,
    cost_nanousd=schemas.OPTIONAL_COUNT, cost_usd=schemas.OPTIONAL_USD,
)  # fmt: skip
_OPTION = schemas.obj(
    option=schemas.TEXT, option_id=schemas.TEXT, hourly_rate_nanousd=schemas.COUNT, tokens_per_s=schemas.OPTIONAL_NUMBER,
    pace_basis={"enum": ["batches", "requests", "unknown"]}, start_s={"type": "number"},
    start_basis={"enum": ["measured", "assumed"]}, free_gpus=schemas.OPTIONAL_COUNT, gpus_at_most=schemas.COUNT,
    gpus=schemas.COUNT, in_time={"type": ["boolean", "null"]}, offers=schemas.array(_OFFER),
)  # fmt: skip
_ANSWERS = schemas.obj(
    basis={"enum": ["mean", "limit", "none"]}, mean_tokens=schemas.OPTIONAL_NUMBER, requests=schemas.COUNT
)
_COUNTED = schemas.obj(
    lines=schemas.COUNT, refused_lines=schemas.COUNT, prompt_tokens=schemas.COUNT, completion_tokens=schemas.COUNT,
    completion_tokens_at_most=schemas.COUNT, answers=_ANSWERS,
)  # fmt: skip
_TOKENS = {
    **schemas.obj(price_id=schemas.TEXT, cost_nanousd=schemas.COUNT, cost_usd=schemas.USD),
    "type": ["object", "null"],
}
_QUOTED = {
    **schemas.obj(
        model=schemas.TEXT, deadline_s=schemas.COUNT, counted=_COUNTED, tokens=_TOKENS, resources=schemas.array(_OPTION)
    ),
    "type": ["object", "null"],
}  # fmt: skip
_PROBLEM = schemas.obj(
    code=schemas.TEXT, message=schemas.TEXT, line=schemas.OPTIONAL_COUNT, param=schemas.OPTIONAL_TEXT
)
QUOTE = schemas.obj(
    quote_id=schemas.TEXT, status={"enum": ["counting", "ready", "failed"]}, created_at=schemas.TIME,
    errors=schemas.array(_PROBLEM), quote=_QUOTED,
)  # fmt: skip


class AskQuote(Body):
    input_file_id: Annotated[str, Meta(min_length=1, max_length=64)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Annotated[
        str, Meta(min_length=2, max_length=8, description="The deadline, from now: 30m to 168h.")
    ]
    option: (
        Annotated[OptionName, Meta(description="One of the type's performance options; else all are quoted.")]
        | None
    ) = None
    max_gpus: Annotated[int, Meta(ge=1, le=64)] | None = None


def routes(deps: FileDeps, store: Store) -> list[RouteSpec]:
    handlers = _Handlers(deps)
    return [
        schemas.route(
            "POST", "/api/batches/quote", idempotent(store)(handlers.ask), INFERENCE,
            "What a file's lines would take and cost, by the token and on GPUs of their own", AskQuote,
            {200: QUOTE, 202: QUOTE},
        ),
        schemas.route(
            "GET", "/api/batches/quotes/{quote_id}", handlers.get, INFERENCE, "A quote, once it is counted",
            answers={200: QUOTE},
        ),
    ]  # fmt: skip


class _Handlers:
    def __init__(self, deps: FileDeps) -> None:
        self._deps = deps

    async def ask(self, request: web.Request) -> web.Response:
        query_of(request)
        body = parse(await read_json(request), AskQuote)
        team_id, key_id = principal_of(request).team_id, principal_of(request).key_id
        command = QuoteBatch(
            **await command_envelope(request, self._deps.commands),
            team_id=team_id,
            key_id=key_id,
            input_file_id=body.input_file_id,
            endpoint=body.endpoint,
            deadline_s=read_window(body.completion_window),
            option=body.option,
            max_gpus=body.max_gpus,
        )
        result = await self._deps.commands.call(topology.BATCH_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        row = await self._counted(team_id, str(result.body["quote_id"]))
        if row["state"] == "failed":
            problem = json.loads(row["errors"])[0]
            where = "" if problem["line"] is None else f"Line {problem['line']}: "
            raise ApiError(400, problem["code"], where + problem["message"], param=problem["param"])
        return answer(quote_json(row), 200 if row["state"] == "ready" else 202)

    async def get(self, request: web.Request) -> web.Response:
        query_of(request)
        row = await self._deps.tables.quote(principal_of(request).team_id, path_id(request, "quote_id"))
        if row is None:
            raise not_found()
        return answer(quote_json(row))

    async def _counted(self, team_id: str, quote_id: str) -> Row:
        deadline_s = time.monotonic() + WAIT_S
        while True:
            row = await self._deps.tables.quote(team_id, quote_id)
            if row is None:
                raise not_found()
            if row["state"] != "counting" or time.monotonic() > deadline_s:
                return row
            await asyncio.sleep(LOOK_S)


def quote_json(row: Row) -> dict[str, Any]:
    return {
        "quote_id": row["quote_id"],
        "status": row["state"],
        "created_at": timestamp(row["created_at"]),
        "errors": json.loads(row["errors"]),
        "quote": None if row["quote"] is None else json.loads(row["quote"]),
    }
