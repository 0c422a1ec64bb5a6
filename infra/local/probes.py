"""Readiness probes: each asks one server whether it can be used now, and says why not.

They use the standard library and asyncpg only, open a connection, and close it again.
"""

from __future__ import annotations

import asyncio
import base64
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Protocol

import asyncpg

PROBE_TIMEOUT_S = 2.0


class Probe(Protocol):
    async def __call__(self) -> str | None:
        """None when ready, else why not, in a few words. Never raises for a server that is down; takes at most
        about `PROBE_TIMEOUT_S`."""
        ...


@dataclass(frozen=True, slots=True)
class HttpProbe:
    """Ready when GET `url` answers 200."""

    url: str
    user: str = ""
    password: str = field(default="", repr=False)

    async def __call__(self) -> str | None:
        return await asyncio.to_thread(self._ask)

    def _ask(self) -> str | None:
        request = urllib.request.Request(self.url)
        if self.user:
            token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        # No proxy, whatever the environment says: these are loopback addresses.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=PROBE_TIMEOUT_S) as answer:
                return None if answer.status == 200 else f"answers {answer.status}"
        except urllib.error.HTTPError as error:
            return f"answers {error.code}"
        except OSError as error:  # URLError, refused, reset, timed out
            return str(getattr(error, "reason", error)) or "does not answer"
        except ValueError as error:  # not HTTP
            return f"answers nonsense: {error}"


@dataclass(frozen=True, slots=True)
class EpmdProbe:
    """Ready when Erlang's port mapper lists its names. It logs a complaint about a connection that asks nothing."""

    port: int

    async def __call__(self) -> str | None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    writer.write(b"\x00\x01n")  # length, NAMES_REQ
                    answer = await reader.read()
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            return f"port {self.port}: {str(error) or 'no answer'}"
        return None if answer[:4] == self.port.to_bytes(4, "big") else "answers nonsense"


@dataclass(frozen=True, slots=True)
class RedisProbe:
    port: int
    password: str = field(repr=False)

    async def __call__(self) -> str | None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    writer.write(f"AUTH {self.password}\r\nPING\r\n".encode())
                    answers = [await reader.readline(), await reader.readline()]
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            return str(error) or "no answer"
        return (
            None
            if answers == [b"+OK\r\n", b"+PONG\r\n"]
            else b" ".join(answers).decode(errors="replace").strip()
        )


@dataclass(frozen=True, slots=True)
class PostgresProbe:
    dsn: str = field(repr=False)

    async def __call__(self) -> str | None:
        try:
            connection = await asyncpg.connect(self.dsn, timeout=PROBE_TIMEOUT_S)
            await connection.close(timeout=PROBE_TIMEOUT_S)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            return str(error) or "no answer"
        return None
