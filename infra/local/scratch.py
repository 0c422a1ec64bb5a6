"""Vhosts and databases for one use: made on servers that already run, removed afterwards.

For tests and measuring scripts. The users in the given URLs may make and remove both.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import threading
import urllib.parse
import urllib.request
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg


@contextmanager
def scratch_vhost(amqp_url: str, management_url: str, prefix: str = "scratch") -> Iterator[str]:
    """Yield the AMQP URL of a fresh vhost."""
    name = f"{prefix}-{secrets.token_hex(6)}"
    user = urllib.parse.unquote(urllib.parse.urlsplit(management_url).username or "")
    call_management(management_url, "PUT", f"vhosts/{name}")
    try:
        rights = b'{"configure": ".*", "write": ".*", "read": ".*"}'
        call_management(management_url, "PUT", f"permissions/{name}/{urllib.parse.quote(user)}", rights)
        yield with_path(amqp_url, name)
    finally:
        # Users are the whole broker's: those that somebody made for this vhost would stay behind.
        for row in json.loads(call_management(management_url, "GET", f"vhosts/{name}/permissions", None)):
            if row["user"] != user:
                call_management(management_url, "DELETE", f"users/{urllib.parse.quote(row['user'])}")
        call_management(management_url, "DELETE", f"vhosts/{name}")


@contextmanager
def scratch_database(url: str, how: str = "", prefix: str = "scratch") -> Iterator[str]:
    """Yield the URL of a fresh database; `how` goes behind CREATE DATABASE (a TEMPLATE, say)."""
    name = f"{prefix}_{secrets.token_hex(6)}"
    execute(url, f'CREATE DATABASE "{name}" {how}')
    try:
        yield with_path(url, name)
    finally:
        execute(url, f'DROP DATABASE "{name}" WITH (FORCE)')


def call_management(management_url: str, method: str, path: str, body: bytes | None = b"{}") -> bytes:
    """Ask RabbitMQ's management API and return its answer; any but a 2xx raises."""
    parts = urllib.parse.urlsplit(management_url)
    user, password = urllib.parse.unquote(parts.username or ""), urllib.parse.unquote(parts.password or "")
    request = urllib.request.Request(
        f"{parts.scheme}://{parts.hostname}:{parts.port}{parts.path.rstrip('/')}/api/{path}",
        method=method,
        data=body,
    )
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    with urllib.request.urlopen(request, timeout=20) as answer:
        return bytes(answer.read())


def execute(url: str, statement: str) -> None:
    """Run one SQL statement on a connection, a loop and a thread of its own (the caller's loop may be running)."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    _run_in_thread(run())


def _run_in_thread(work: Coroutine[Any, Any, None]) -> None:
    errors: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(work)
        except BaseException as error:  # noqa: BLE001 - handed to the calling thread, which raises it
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def with_path(url: str, path: str) -> str:
    """Return `url` with another path: another vhost, database or Redis database on the same server."""
    return urllib.parse.urlsplit(url)._replace(path="/" + urllib.parse.quote(path, safe="")).geturl()
