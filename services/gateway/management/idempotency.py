"""`Idempotency-Key` on POST: the same key and request give the same answer and one effect, for a day.

Only answers of success are kept: a refused request changed nothing. What another service refused, it refuses again
under the same key. One-time secrets are not kept: a repeated answer has null in their place.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web

from services.gateway.edge import read_body
from services.gateway.management.acting import answer
from services.gateway.routes import Handler, principal_of
from services.gateway.store import Store
from shared.commands import CommandCaller
from shared.inference.errors import ApiError, bad_request
from shared.outcomes import Unavailable

log = structlog.get_logger()

STALE_S = 60
"""A key that was not renewed for so long belongs to a request that died with its gateway."""
RENEW_S = 20
"""Registering a large model takes minutes; meanwhile its key is held."""
KEEP_S = 24 * 3600
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
ONE_TIME_FIELDS = ("secret",)


def idempotency_key(request: web.Request) -> str | None:
    """Return the request's key, if it has one."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not _KEY.fullmatch(key):
        raise bad_request(
            "invalid_idempotency_key", "Idempotency-Key must be 1 to 255 visible ASCII characters."
        )
    return key


async def command_envelope(request: web.Request, commands: CommandCaller) -> dict[str, Any]:
    """Return a command's common fields; its id is the request's own if the client gave it a key."""
    principal = principal_of(request)
    key = idempotency_key(request) if request.method == "POST" else None
    same_request = None
    if key is not None:
        same_request = f"{principal.team_id}\n{key}\n".encode() + await _digest(request)
    return dataclasses.asdict(commands.envelope(principal.key_id, same_request))


async def _digest(request: web.Request) -> bytes:
    parts = [
        request.method.encode(),
        request.path_qs.encode("utf-8", "surrogateescape"),
        await read_body(request),
    ]
    return hashlib.sha256(b"\n".join(parts)).digest()


def idempotent(store: Store) -> Callable[[Handler], Handler]:
    """Wrap a POST handler.

    1. No key -> the handler as it is.
    2. The key is new -> run, and keep the answer if it is one of success.
    3. The key was used for another request -> 422 idempotency_key_reused.
    4. Its first request still runs -> 409 idempotency_in_progress.
    5. Otherwise -> the kept answer.
    """

    running: set[asyncio.Future[web.StreamResponse]] = set()

    def wrap(handler: Handler) -> Handler:
        async def run(request: web.Request) -> web.StreamResponse:
            key = idempotency_key(request)
            if key is None:  # 1
                return await handler(request)
            team_id = principal_of(request).team_id
            digest = await _digest(request)
            held = await store.begin_idempotent(team_id, key, digest, STALE_S)
            if held is None:  # 2
                # The effect and its note belong together: they are finished also for a client that is gone.
                task = asyncio.ensure_future(_first(store, team_id, key, handler(request)))
                running.add(task)
                task.add_done_callback(running.discard)
                return await asyncio.shield(task)
            if held["request_sha256"] != digest:  # 3
                raise ApiError(
                    422, "idempotency_key_reused", "This Idempotency-Key was used for another request."
                )
            if held["status"] is None:  # 4
                message = "The first request with this Idempotency-Key still runs."
                raise ApiError(409, "idempotency_in_progress", message, retry_after_s=1)
            return answer(json.loads(held["response"]), held["status"], {"Idempotent-Replayed": "true"})  # 5

        return run

    return wrap


async def _first(
    store: Store, team_id: str, key: str, running: Awaitable[web.StreamResponse]
) -> web.StreamResponse:
    renewing = asyncio.ensure_future(_renew(store, team_id, key))
    try:
        response = await running
    except BaseException:
        await _quietly(store.forget_idempotent(team_id, key))
        raise
    finally:
        renewing.cancel()
        await asyncio.wait([renewing])
    body: Any = None
    if isinstance(response, web.Response) and isinstance(response.body, bytes):
        body = json.loads(response.body)
    if isinstance(body, dict):
        body = {name: None if name in ONE_TIME_FIELDS else value for name, value in body.items()}
    await _quietly(store.end_idempotent(team_id, key, response.status, body))
    return response


async def _renew(store: Store, team_id: str, key: str) -> None:
    while True:
        await asyncio.sleep(RENEW_S)
        await _quietly(store.renew_idempotent(team_id, key))


async def _quietly(work: Awaitable[None]) -> None:
    # The effect is committed (or refused) already; without the note the key is free again after `STALE_S`.
    try:
        await work
    except Unavailable as error:
        log.warning("idempotency_not_noted", error=str(error))
