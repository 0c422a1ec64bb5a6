"""What asyncpg raises while a server goes away means `Unavailable`, whichever of its layers raises it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import asyncpg
import pytest

from shared.database import Database
from shared.outcomes import Unavailable


class Pool:
    """Its connections are broken."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    @asynccontextmanager
    async def acquire(self, timeout: float) -> AsyncIterator[Any]:
        yield self

    def transaction(self) -> Pool:
        return self

    async def __aenter__(self) -> None:
        raise self._error

    async def __aexit__(self, *_: object) -> None: ...

    async def fetch(self, *_: Any) -> list[Any]:
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.ConnectionDoesNotExistError("closed in the middle of operation"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress"),
        asyncpg.AdminShutdownError("terminating connection due to administrator command"),
        ConnectionResetError(),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_it_is_unavailable(error: Exception) -> None:
    database = Database(cast(Any, Pool(error)))
    with pytest.raises(Unavailable):
        async with database.transaction():
            pass
    assert not database.healthy
    with pytest.raises(Unavailable):
        await database.fetch("SELECT 1")


async def test_what_is_wrong_with_a_row_is_not() -> None:
    error = asyncpg.UniqueViolationError("twice")
    database = Database(cast(Any, Pool(error)))
    with pytest.raises(asyncpg.UniqueViolationError):
        async with database.transaction():
            pass
    assert database.healthy
