"""Routes that need no key: health, the OpenAPI page, and the console's static files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from services.gateway.openapi import describe
from services.gateway.routes import PUBLIC, Handler, RouteSpec

API_VERSION = "1.0"
CONSOLE = Path(__file__).parent / "console"
CONSOLE_FILES = {
    "console.html": "text/html",
    "console.css": "text/css",
    "console.js": "text/javascript",
    "api.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
CONSOLE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def routes(not_ready: Callable[[], list[str]]) -> list[RouteSpec]:
    """Return the public routes but `/openapi.json`, which `with_openapi` adds when all routes are known."""

    async def livez(_request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def readyz(_request: web.Request) -> web.Response:
        # Names of parts stay on the operators' port: this one is public.
        ready = not not_ready()
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def root(_request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/console"})

    health: dict[str, Any] = {"type": "object"}
    return [
        _public("/livez", livez, "Whether the process runs", {200: health}, "health"),
        _public("/readyz", readyz, "Whether it can serve", {200: health, 503: health}, "health"),
        _public("/", root, "To the console", {302: None}, "console"),
        _public("/console", _file("console.html"), "The console", {200: None}, "console"),
        *(
            _public(f"/console/{name}", _file(name), "A file of the console", {200: None}, "console")
            for name in CONSOLE_FILES
            if name != "console.html"
        ),
    ]


def with_openapi(specs: Sequence[RouteSpec]) -> list[RouteSpec]:
    """Return all routes and `/openapi.json`, which describes them and itself."""
    described: dict[str, Any] = {}

    async def openapi(_request: web.Request) -> web.Response:
        return web.json_response(described)

    page = _public("/openapi.json", openapi, "This description", {200: {"type": "object"}}, "health")
    everything = [*specs, page]
    described.update(describe(everything, API_VERSION))
    return everything


def _public(
    path: str, handler: Handler, summary: str, answers: dict[int, dict[str, Any] | None], tag: str
) -> RouteSpec:
    return RouteSpec(
        method="GET",
        path=path,
        handler=handler,
        scope=PUBLIC,
        summary=summary,
        error_shape="problem",
        responses=answers,
        tag=tag,
    )


def _file(name: str) -> Handler:
    content_type = CONSOLE_FILES[name]

    async def serve(_request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": CONSOLE_POLICY, "Cache-Control": "no-cache"}
        body = (CONSOLE / name).read_bytes()
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)

    return serve
