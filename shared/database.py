"""PostgreSQL: a pool per process under its service's role, and queries that end in time.

`asyncio.wait_for` around asyncpg does not return while the server is frozen (the cancel waits for it), so a query on
a path where somebody waits goes through `bounded`, which gives up the connection instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeAlias, TypeVar

import asyncpg
import structlog

from shared.outcomes import Unavailable

log = structlog.get_logger()
T = TypeVar("T")
# The stubs make these generic; the classes themselves cannot be subscripted.
Connection: TypeAlias = (
    "asyncpg.pool.PoolConnectionProxy[asyncpg.Record] | asyncpg.Connection[asyncpg.Record]"
)

DATABASE_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    # A query on a connection that the server has just said farewell on, and that is not closed yet.
    asyncpg.InternalClientError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.QueryCanceledError,
    asyncpg.LockNotAvailableError,
)
"""What "the database is away or too busy" looks like. Anything else asyncpg raises is a bug or a refused row."""


class Database:
    """A small pool whose sessions run as one role."""

    def __init__(self, pool: asyncpg.Pool[asyncpg.Record]) -> None:
        self.pool = pool
        self.healthy = True

    @classmethod
    async def open(
        cls, url: str, role: str, stack: AsyncExitStack, *, size: int = 6, timeout_s: float = 30.0
    ) -> Database:
        """Connect and close with `stack`. Raises `Unavailable` when the server cannot be reached in `timeout_s`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                pool = await asyncpg.create_pool(
                    url,
                    min_size=1,
                    max_size=size,
                    timeout=5,
                    command_timeout=10,
                    reset=_keep,
                    server_settings={
                        "role": role,
                        "application_name": role,
                        "statement_timeout": "8000",
                        "lock_timeout": "3000",
                        "idle_in_transaction_session_timeout": "15000",
                    },
                )
                break
            except DATABASE_ERRORS as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise Unavailable(f"cannot reach the database: {type(error).__name__}") from error
                await asyncio.sleep(0.5)
        stack.push_async_callback(_close, pool)
        return cls(pool)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A transaction on a pooled connection; what means "away" becomes `Unavailable`, after a rollback."""
        try:
            async with self.pool.acquire(timeout=5) as connection, connection.transaction():
                yield connection
        except DATABASE_ERRORS as error:
            self.healthy = False
            raise Unavailable(f"database: {type(error).__name__}") from error
        self.healthy = True

    async def bounded(self, query: Callable[[Connection], Awaitable[T]], timeout_s: float) -> T:
        """Run `query` and return within `timeout_s` even if the server is frozen. Raises `Unavailable`."""
        held: list[Connection] = []
        task = asyncio.ensure_future(self._run(query, held))
        try:
            done, _ = await asyncio.wait({task}, timeout=timeout_s)
        except asyncio.CancelledError:
            self._abandon(task, held)
            raise
        if task not in done:
            self.healthy = False
            self._abandon(task, held)
            raise Unavailable(f"no answer from the database within {timeout_s} s")
        try:
            result = task.result()
        except DATABASE_ERRORS as error:
            self.healthy = False
            raise Unavailable(f"database: {type(error).__name__}") from error
        self.healthy = True
        return result

    async def _run(self, query: Callable[[Connection], Awaitable[T]], held: list[Connection]) -> T:
        async with self.pool.acquire(timeout=5) as connection:
            held.append(connection)
            return await query(connection)

    @staticmethod
    def _abandon(task: asyncio.Future[Any], held: list[Connection]) -> None:
        # The session may be frozen: it is cut, since a polite cancel would wait for the server.
        for connection in held:
            # One that was given back to the pool at this very moment refuses, and needs no cutting.
            with suppress(asyncpg.InterfaceError):
                connection.terminate()
        task.add_done_callback(_forget)
        task.cancel()

    async def fetch(self, sql: str, *args: Any, timeout_s: float = 3.0) -> list[asyncpg.Record]:
        """Bounded SELECT of all rows."""
        return await self.bounded(lambda connection: connection.fetch(sql, *args), timeout_s)

    async def fetchrow(self, sql: str, *args: Any, timeout_s: float = 3.0) -> asyncpg.Record | None:
        """Bounded SELECT of the first row."""
        return await self.bounded(lambda connection: connection.fetchrow(sql, *args), timeout_s)


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.info("abandoned_query_ended", error=type(task.exception()).__name__)


async def _keep(_session: Connection) -> None:
    """A session goes back as it is: nothing of ours sets, listens or locks beyond a transaction."""


async def _close(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    try:
        await asyncio.wait_for(pool.close(), 5.0)
    except TimeoutError:
        pool.terminate()
