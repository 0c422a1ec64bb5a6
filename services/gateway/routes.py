"""What one HTTP route is: the same values make the router, the access rules, the error shapes and the OpenAPI page."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web

from shared.inference.principal import Principal

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ErrorShape = Literal["openai", "problem", "vendor"]
Schema = Mapping[str, Any]

PUBLIC = "public"
"""The scope of routes that need no key. It has to be said: a route without a scope stops the start."""

INFERENCE = "inference"
MANAGE = "manage"
PLATFORM = "platform"
ANY_KEY = "any"
"""Any valid key, whatever its scopes."""

PRINCIPAL: web.RequestKey[Principal] = web.RequestKey("principal", Principal)
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
RESPONSE_HEADERS: web.RequestKey[dict[str, str]] = web.RequestKey("response_headers", dict)
"""Headers that a handler wants on its answer, whichever it becomes; the edge adds them."""

SCOPES = frozenset({PUBLIC, ANY_KEY, INFERENCE, MANAGE, PLATFORM})


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSpec:
    """One route. `path` is aiohttp's pattern, e.g. `/v1/models/{model:.+}`; schemas are JSON Schema values."""

    method: str
    path: str
    handler: Handler
    scope: str | None
    summary: str
    error_shape: ErrorShape
    request_schema: Schema | None = None
    """The JSON body; None where the route takes none."""
    responses: Mapping[int, Schema | None] | None = None
    """Status -> JSON body of good answers; None is an empty or a non-JSON body."""
    max_body_bytes: int | None = None
    """Where the body is a file that the handler reads piece by piece: how large it may be. Else the edge's limit holds."""
    query: Mapping[str, Schema] = field(default_factory=dict)
    """Query parameters that the route knows; `/api` refuses all others."""
    tag: str = "inference"
    request_content_type: str = "application/json"

    @property
    def template(self) -> str:
        """The path without the patterns of its parameters, e.g. `/v1/models/{model}`."""
        return re.sub(r"\{(\w+):[^{}]*\}", r"{\1}", self.path)


def principal_of(request: web.Request) -> Principal:
    """Return who asks; set by the edge on every route that is not public."""
    return request[PRINCIPAL]


def request_id_of(request: web.Request) -> str:
    """Return our own id of this request, as in `x-request-id`."""
    return request[REQUEST_ID]
