"""A gateway's edge on a real socket with a handful of routes and keys in memory, and a raw HTTP client for it.

Through `AppRunner`, as the service runs: aiohttp's own test server cancels handlers by other rules.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from services.gateway import edge
from services.gateway.routes import INFERENCE, MANAGE, PUBLIC, RouteSpec, principal_of
from services.gateway.wire import WireSite
from shared.inference.errors import ApiError
from shared.inference.principal import Principal

KEY = "sk-rh-" + "a" * 43
MANAGE_KEY = "sk-rh-" + "b" * 43


class MemoryKeyring:
    """Two keys of one team: KEY may do all, MANAGE_KEY cannot infer."""

    async def principal_for(self, secret: str) -> Principal | None:
        scopes = {KEY: {"inference", "manage"}, MANAGE_KEY: {"manage"}}.get(secret)
        return (
            None if scopes is None else Principal("key_1", "team_1", "acme", False, False, frozenset(scopes))
        )


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        document = self.json
        return str(document["error"]["code"] if "error" in document else document["code"])


@dataclass
class EdgeServer:
    port: int
    cancelled: asyncio.Event
    handled: list[str]
    runner: web.AppRunner

    async def raw(self, request: bytes, *, wait_s: float = 5.0) -> Answer:
        """Send bytes as they are, and read one answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            async with asyncio.timeout(wait_s):
                return await read_answer(reader)
        finally:
            writer.close()

    async def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: dict[str, str] | None = None,
        key: str | None = KEY,
    ) -> Answer:
        fields = {"Host": "localhost", "Content-Length": str(len(body))}
        if body:
            fields["Content-Type"] = "application/json"
        if key:
            fields["Authorization"] = f"Bearer {key}"
        fields |= headers or {}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in fields.items()
        )
        return await self.raw(head.encode("latin-1") + b"\r\n" + body)


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in head[1:] if line)
    }
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(int(head[0].split()[1]), headers, body)


def make_routes(cancelled: asyncio.Event, handled: list[str]) -> list[RouteSpec]:
    async def echo(request: web.Request) -> web.StreamResponse:
        handled.append(request.path)
        return web.json_response(
            {"got": await edge.read_json(request), "team": principal_of(request).team_slug}
        )

    async def plain(request: web.Request) -> web.StreamResponse:
        handled.append(request.path)
        return web.json_response({"ok": True})

    async def bug(_request: web.Request) -> web.StreamResponse:
        raise KeyError("a secret value")

    async def refuse(_request: web.Request) -> web.StreamResponse:
        raise ApiError(429, "queue_full", "Full.", param="model", retry_after_s=3)

    async def wait(_request: web.Request) -> web.StreamResponse:
        handled.append("waiting")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError("nobody cancelled the handler")

    async def short(_request: web.Request) -> web.StreamResponse:
        handled.append("short")
        await asyncio.sleep(0.3)
        return web.json_response({"ok": True})

    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half an answer")
        raise KeyError("a secret value")

    def spec(method: str, path: str, handler: Any, scope: str | None, shape: Any) -> RouteSpec:
        return RouteSpec(
            method=method, path=path, handler=handler, scope=scope, summary=path, error_shape=shape
        )

    return [
        spec("POST", "/v1/echo", echo, INFERENCE, "openai"),
        spec("POST", "/api/echo", echo, MANAGE, "problem"),
        spec("GET", "/api/plain", plain, MANAGE, "problem"),
        spec("GET", "/v1/bug", bug, INFERENCE, "openai"),
        spec("GET", "/api/bug", bug, MANAGE, "problem"),
        spec("GET", "/v1/refuse", refuse, INFERENCE, "openai"),
        spec("GET", "/v1/wait", wait, INFERENCE, "openai"),
        spec("GET", "/v1/short", short, INFERENCE, "openai"),
        spec("GET", "/v1/break", break_off, INFERENCE, "openai"),
        spec("GET", "/livez", plain, PUBLIC, "problem"),
    ]


@asynccontextmanager
async def running_edge(
    limits: edge.EdgeLimits | None = None,
    *,
    header_deadline_s: float = 10.0,
    max_per_peer: int = 100,
    drain_timeout_s: float = 0.1,
) -> AsyncIterator[EdgeServer]:
    cancelled, handled = asyncio.Event(), list[str]()
    app = edge.build_app(make_routes(cancelled, handled), MemoryKeyring(), limits or edge.EdgeLimits())
    runner = edge.build_runner(app, drain_timeout_s=drain_timeout_s)
    await runner.setup()
    edge.guard_expectations(runner)
    site = WireSite(runner, "127.0.0.1", 0, max_per_peer=max_per_peer, header_deadline_s=header_deadline_s)
    await site.start()
    try:
        yield EdgeServer(site.port, cancelled, handled, runner)
    finally:
        await runner.cleanup()
