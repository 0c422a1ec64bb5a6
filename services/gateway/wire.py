"""The HTTP protocol below the application: header deadline, connections per address, and refusals of broken HTTP.

aiohttp has no time-out for headers, answers a broken request in plain text that repeats part of it, and names itself
in each answer. All three are mended here; `edge.py` deals with requests that could be parsed.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from shared.ids import new_id

log = structlog.get_logger()

HEADER_DEADLINE_S = 10.0
KEEPALIVE_S = 75.0
"""Longer than the idle time-out of common load balancers (60 s), so that they close first."""
BACKLOG = 1024


class WireProtocol(RequestHandler):
    """aiohttp's connection with a deadline for each request's headers and a cap of connections per address."""

    def __init__(
        self,
        server: web.Server,
        *,
        loop: asyncio.AbstractEventLoop,
        peers: Counter[str],
        max_per_peer: int,
        header_deadline_s: float,
    ) -> None:
        super().__init__(server, loop=loop, keepalive_timeout=KEEPALIVE_S, auto_decompress=False)
        self._logging_enabled = False  # requests are observed by the application, with their route
        self._peers = peers
        self._max_per_peer = max_per_peer
        self._header_deadline_s = header_deadline_s
        self._peer: str | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        address = transport.get_extra_info("peername")
        self._peer = str(address[0]) if isinstance(address, tuple) else "local"
        self._peers[self._peer] += 1
        if self._peers[self._peer] > self._max_per_peer:
            log.warning("connection_refused", reason="too many from one address", limit=self._max_per_peer)
            self._abort()
            return
        self._arm()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._disarm()
        if self._peer is not None:
            self._peers[self._peer] -= 1
            if self._peers[self._peer] <= 0:
                del self._peers[self._peer]
            self._peer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._request_count
        super().data_received(data)
        if self._request_count > before:
            self._disarm()
        elif self._deadline is None and not self._is_busy():
            # The first bytes of another request on a kept-alive connection.
            self._arm()

    def _is_busy(self) -> bool:
        """Whether a request with complete headers is being handled: what comes in is its body."""
        return self._request_in_progress or bool(self._messages)

    def _arm(self) -> None:
        self._deadline = self._loop.call_later(self._header_deadline_s, self._on_deadline)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if not self._is_busy():
            log.info("connection_closed", reason="headers not complete in time")
            self._abort()

    def _abort(self) -> None:
        transport = self.transport
        self.force_close()
        if isinstance(transport, asyncio.Transport):
            transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be parsed (or, as a last resort, a bug) without repeating any of it."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, no other can be sent")
        if status >= 500:
            log.error("request_failed_outside_handlers", exc_info=exc)
            return BareError(500, "internal_error", "Something went wrong here.")
        if isinstance(exc, LineTooLong):
            return BareError(400, "header_too_large", "The request line or a header is too long.")
        return BareError(400, "bad_http", "The request is not valid HTTP.")


class BareError(web.Response):
    """An error before any route is known, in OpenAI's shape; always closes the connection."""

    def __init__(self, status: int, code: str, text: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {"error": {"message": text, "type": kind, "param": None, "code": code}}
        super().__init__(status=status, body=json.dumps(body).encode(), content_type="application/json")
        self.headers["x-request-id"] = new_id("req")
        self.headers["X-Content-Type-Options"] = "nosniff"
        self.headers["Cache-Control"] = "no-store"
        self.force_close()

    async def _prepare_headers(self) -> None:
        # The application's hook that removes it does not run for requests that were never parsed.
        await super()._prepare_headers()
        self.headers.popall("Server", None)


class WireSite(web.TCPSite):
    """A listening socket whose connections are `WireProtocol`s."""

    def __init__(
        self,
        runner: web.AppRunner,
        host: str,
        port: int,
        *,
        max_per_peer: int,
        header_deadline_s: float = HEADER_DEADLINE_S,
    ) -> None:
        super().__init__(runner, host, port, backlog=BACKLOG)
        self._max_per_peer = max_per_peer
        self._header_deadline_s = header_deadline_s
        self._peers: Counter[str] = Counter()

    async def start(self) -> None:
        # Registers the site with its runner; TCPSite.start would listen with aiohttp's own protocol class.
        await web.BaseSite.start(self)
        loop = asyncio.get_running_loop()
        server = self._runner.server
        if server is None:
            raise RuntimeError("the runner is not set up")

        def connection() -> WireProtocol:
            return WireProtocol(
                server,
                loop=loop,
                peers=self._peers,
                max_per_peer=self._max_per_peer,
                header_deadline_s=self._header_deadline_s,
            )

        self._server = await loop.create_server(connection, self._host, self._port, backlog=BACKLOG)

    @property
    def port(self) -> int:
        """The port in use; another than asked for when that was 0."""
        sockets: Any = getattr(self._server, "sockets", ())
        return int(sockets[0].getsockname()[1])
