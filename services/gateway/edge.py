"""The outer ring around all handlers: request ids, spans, refusals, keys and scopes, bodies, headers.

Order, outermost first: observe (id, span, duration), shape errors, check the transport, authorise, handler. Nothing
here knows what a route does; it reads the route's `RouteSpec`.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import structlog
from aiohttp import web
from aiohttp.hdrs import METH_ALL
from aiohttp.http import HttpVersion11
from aiohttp.typedefs import Middleware
from aiohttp.web_protocol import RequestPayloadError
from opentelemetry.trace import SpanKind, Status, StatusCode

from services.gateway.routes import (
    ANY_KEY,
    PRINCIPAL,
    PUBLIC,
    REQUEST_ID,
    RESPONSE_HEADERS,
    SCOPES,
    ErrorShape,
    Handler,
    RouteSpec,
)
from services.gateway.wire import BareError
from shared import strict_json, telemetry
from shared.ids import new_id
from shared.inference.errors import ApiError, bad_request, error_type
from shared.inference.principal import Principal
from shared.outcomes import Unavailable

log = structlog.get_logger()

BODY_DEADLINE_S = 30.0
UNAVAILABLE_RETRY_S = 2

_CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BEARER = re.compile(r"bearer ([\x21-\x7e]{1,256})", re.IGNORECASE)
_JSON_TYPE = re.compile(r"application/json\s*(;\s*charset\s*=\s*\"?utf-8\"?\s*)?", re.IGNORECASE)
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
_ONCE_ONLY = ("Authorization", "Content-Type", "Content-Encoding", "Idempotency-Key", "If-Match")


class Keyring(Protocol):
    async def principal_for(self, secret: str) -> Principal | None:
        """Return who holds this key, or None. Raises `Unavailable` when that cannot be known."""
        ...


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    max_body_bytes: int = 1024 * 1024
    body_deadline_s: float = BODY_DEADLINE_S
    allowed_hosts: frozenset[str] = frozenset()
    """Lower-case host names without port; empty accepts any."""


def build_app(specs: Sequence[RouteSpec], keyring: Keyring, limits: EdgeLimits) -> web.Application:
    """Return the application for these routes. Raises `ValueError` for a route without a known scope."""
    app = web.Application(
        middlewares=[_observe(), _shape_errors, _check_transport(limits), _authorise(keyring)],
        client_max_size=limits.max_body_bytes,
    )
    app[LIMITS] = limits
    app[SPECS] = {}
    for spec in specs:
        if spec.scope not in SCOPES:
            raise ValueError(f"{spec.method} {spec.path} has no scope")
        app.router.add_route(spec.method, spec.path, spec.handler)
        app[SPECS][(spec.method, spec.template)] = spec
    app.on_response_prepare.append(_finish_headers)
    return app


LIMITS: web.AppKey[EdgeLimits] = web.AppKey("limits", EdgeLimits)
SPECS: web.AppKey[dict[tuple[str, str], RouteSpec]] = web.AppKey("specs", dict)


def build_runner(app: web.Application, *, drain_timeout_s: float) -> web.AppRunner:
    """Return the runner; its handlers are cancelled when their client goes, which is not aiohttp's default."""
    return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=drain_timeout_s)


def guard_expectations(runner: web.AppRunner) -> None:
    """Give refused `Expect` headers our shape: aiohttp handles them before any middleware."""
    server = runner.server
    if server is None:
        raise RuntimeError("the runner is not set up")
    inner = server.request_handler

    async def guarded(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await inner(request)
        except web.HTTPExpectationFailed:
            return BareError(417, "expectation_failed", "The Expect header is not supported.")

    server.request_handler = guarded


async def read_json(request: web.Request) -> dict[str, Any]:
    """Return the body as a JSON object. Raises `ApiError` 400, 408, 413 or 415."""
    kind = request.headers.get("Content-Type", "")
    if not _JSON_TYPE.fullmatch(kind.strip()):
        raise ApiError(415, "unsupported_media_type", "Content-Type must be application/json in UTF-8.")
    return strict_json.loads(await read_body(request))


async def read_body(request: web.Request) -> bytes:
    """Return the whole body, bounded in size and time."""
    limits = request.app[LIMITS]
    try:
        async with asyncio.timeout(limits.body_deadline_s):
            return await request.read()
    except TimeoutError as error:
        raise ApiError(
            408, "request_timeout", "The body did not arrive in time.", headers={"Connection": "close"}
        ) from error
    except web.HTTPRequestEntityTooLarge as error:
        raise _too_large(limits.max_body_bytes) from error
    except RequestPayloadError as error:
        raise ApiError(
            400, "bad_http", "The body is not valid HTTP.", headers={"Connection": "close"}
        ) from error


def _too_large(max_bytes: int) -> ApiError:
    message = f"The body is over {max_bytes} bytes."
    return ApiError(413, "request_too_large", message, headers={"Connection": "close"})


def spec_of(request: web.Request) -> RouteSpec | None:
    """Return the matched route's spec, or None for a path or method that is not ours."""
    resource = request.match_info.route.resource
    if resource is None:
        return None
    return request.app[SPECS].get((request.method, resource.canonical))


def _observe() -> Middleware:
    duration_s = telemetry.meter().create_histogram(
        telemetry.HTTP_DURATION, unit="s", description="Duration of HTTP requests"
    )

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = new_id("req")
        spec = spec_of(request)
        attributes: dict[str, str | int] = {
            # Other methods are other people's text: they must not become metric labels.
            "http.request.method": request.method if request.method in METH_ALL else "_OTHER",
            "url.scheme": request.scheme,
        }
        if spec:
            attributes["http.route"] = spec.template
        started_s = time.perf_counter()
        method = str(attributes["http.request.method"])
        name = f"{method} {spec.template}" if spec else method
        with (
            telemetry.remote_context(request.headers),
            structlog.contextvars.bound_contextvars(request_id=request[REQUEST_ID]),
        ):
            try:
                with telemetry.span(name, kind=SpanKind.SERVER, attributes=attributes) as span:
                    span.set_attribute("url.path", request.path[:256])
                    span.set_attribute("roundhouse.request.id", request[REQUEST_ID])
                    response = await handler(request)
                    span.set_attribute("http.response.status_code", response.status)
                    attributes["http.response.status_code"] = response.status
                    if response.status >= 500:
                        attributes[telemetry.ERROR_TYPE] = str(response.status)
                        span.set_attribute(telemetry.ERROR_TYPE, str(response.status))
                        span.set_status(Status(StatusCode.ERROR))
                    return response
            except BaseException as error:
                attributes[telemetry.ERROR_TYPE] = type(error).__name__
                raise
            finally:
                duration_s.record(time.perf_counter() - started_s, attributes)

    return observe


@web.middleware
async def _shape_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        refusal = error
    except web.HTTPNotFound:
        refusal = ApiError(404, "not_found", "There is nothing at this path.")
    except web.HTTPMethodNotAllowed as error:
        allow = {"Allow": ", ".join(sorted(error.allowed_methods))}
        refusal = ApiError(405, "method_not_allowed", "The path does not know this method.", headers=allow)
    except web.HTTPRequestEntityTooLarge:
        refusal = _too_large(request.app[LIMITS].max_body_bytes)
    except Unavailable as error:
        log.warning("dependency_unavailable", error=str(error))
        refusal = ApiError(
            503, "service_unavailable", "A part of the service is away.", retry_after_s=UNAVAILABLE_RETRY_S
        )
    except ConnectionError:
        raise
    except Exception:
        log.exception("request_failed")
        refusal = ApiError(500, "internal_error", "Something went wrong here.")
    if request.writer.output_size > 0:
        # A second head would be read as part of the first answer's body.
        log.error("request_failed_in_mid_answer", code=refusal.code)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionError("the answer has begun, no other can be sent")
    return error_response(request, refusal)


def error_response(request: web.Request, error: ApiError) -> web.Response:
    """Return the error in the shape that the path's clients read."""
    spec = spec_of(request)
    shape = spec.error_shape if spec else _shape_of_path(request.path)
    content_type = "application/problem+json" if shape == "problem" else "application/json"
    response = web.Response(
        status=error.status,
        body=json.dumps(error_body(error, shape, request[REQUEST_ID])).encode(),
        content_type=content_type,
        headers=error.headers,
    )
    if error.headers.get("Connection") == "close":
        response.force_close()
    return response


def error_body(error: ApiError, shape: ErrorShape, request_id: str) -> dict[str, Any]:
    """Return the JSON of an error. OpenAI's and the vendor's carry no request id: it stands in the header alone."""
    if shape == "problem":
        body = {
            "type": "about:blank",
            "title": _title(error.status),
            "status": error.status,
            "detail": error.message,
            "code": error.code,
            "request_id": request_id,
        }
        return body | ({"param": error.param} if error.param else {})
    return {
        "error": {
            "message": error.message,
            "type": error_type(error.status),
            "param": error.param,
            "code": error.code,
        }
    }


def _title(status: int) -> str:
    return HTTPStatus(status).phrase


def _shape_of_path(path: str) -> ErrorShape:
    if path == "/v1" or path.startswith("/v1/"):
        return "openai"
    return "vendor" if path.startswith("/models/") else "problem"


def _check_transport(limits: EdgeLimits) -> Middleware:
    @web.middleware
    async def check_transport(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.version < HttpVersion11 and "Transfer-Encoding" in request.headers:
            raise bad_request("bad_http", "HTTP/1.0 has no transfer encodings.")
        for name in _ONCE_ONLY:
            if len(request.headers.getall(name, ())) > 1:
                raise bad_request("duplicate_header", f"The header {name} is given more than once.")
        host = request.headers.get("Host")
        if host is not None and not _HOST.fullmatch(host):
            # It stands in the URLs and shell commands that the API shows.
            raise bad_request("bad_http", "The Host header names no host.")
        if limits.allowed_hosts and not _is_for_us(request, limits.allowed_hosts):
            raise ApiError(421, "bad_host", "This host name is not served here.")
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding != "identity":
            raise ApiError(415, "unsupported_encoding", "Compressed bodies are not accepted.")
        spec = spec_of(request)
        max_body_bytes = (spec and spec.max_body_bytes) or limits.max_body_bytes
        if request.content_length is not None and request.content_length > max_body_bytes:
            raise _too_large(max_body_bytes)
        return await handler(request)

    return check_transport


def _is_for_us(request: web.Request, allowed: frozenset[str]) -> bool:
    if "Host" not in request.headers:
        return False  # aiohttp would ask the name service for a host, and wait for it
    named = request.host.rsplit(":", 1)[0].strip("[]").lower()
    return named in allowed and (request.url.host or "").lower() in allowed


def _authorise(keyring: Keyring) -> Middleware:
    @web.middleware
    async def authorise(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.http_exception is not None:
            return await handler(request)  # 404 and 405 tell nothing that needs a key
        spec = spec_of(request)
        if spec is None:
            raise RuntimeError("a route without a spec")
        if spec.scope == PUBLIC:
            return await handler(request)
        principal = await _principal(request, keyring)
        if spec.scope != ANY_KEY and spec.scope not in principal.scopes:
            raise ApiError(403, "insufficient_scope", f"This key lacks the scope '{spec.scope}'.")
        request[PRINCIPAL] = principal
        return await handler(request)

    return authorise


async def _principal(request: web.Request, keyring: Keyring) -> Principal:
    given = request.headers.get("Authorization")
    if given is None:
        raise _unauthorised("missing_api_key", "No API key: send 'Authorization: Bearer sk-...'.")
    match = _BEARER.fullmatch(given)
    principal = await keyring.principal_for(match[1]) if match else None
    if principal is None:
        raise _unauthorised("invalid_api_key", "The API key is not valid.")
    return principal


def _unauthorised(code: str, message: str) -> ApiError:
    return ApiError(401, code, message, headers={"WWW-Authenticate": "Bearer"})


async def _finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    headers = response.headers
    headers.popall("Server", None)
    # Only what never reached a middleware (a refused Expect) has no id yet.
    headers.setdefault("x-request-id", request.get(REQUEST_ID) or new_id("req"))
    theirs = request.headers.get("X-Request-Id", "")
    if _CLIENT_REQUEST_ID.fullmatch(theirs):
        headers["x-client-request-id"] = theirs
    for name, value in request.get(RESPONSE_HEADERS, {}).items():
        headers[name] = value
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    if "Content-Security-Policy" not in headers:
        headers["Content-Security-Policy"] = "default-src 'none'; frame-ancestors 'none'"
    if "Cache-Control" not in headers:
        headers["Cache-Control"] = "no-store"
