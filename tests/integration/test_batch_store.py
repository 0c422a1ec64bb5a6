"""A batch that takes lines is closed and added to at the same time: which is first decides, and no line is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, cast

import asyncpg
import pytest

from services.batch.store import Store
from shared.database import Connection, Database
from shared.lease import Lease

BATCH = "batch_1"


class Leads:
    """A lease that is always held."""

    async def fence(self, connection: Connection) -> int:
        return 1


@pytest.fixture
async def admin(database: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(database)
    await connection.execute(
        "INSERT INTO batch.batches (batch_id, team_id, key_id, endpoint, input_file_id, input_path, completion_window,"
        " metadata, state, model_id, revision, model_name, model_type, expires_at, in_progress_at)"
        " VALUES ($1, 't', 'k', '/v1/completions', '', '', '24h', '{}', 'in_progress', 'm', 1, 'm', 'm',"
        " now() + interval '1 day', now())",
        BATCH,
    )
    yield connection
    await connection.close()


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    async with AsyncExitStack() as stack:
        yield Store(await Database.open(database, "roundhouse_batch", stack), cast(Lease, Leads()))


async def add_line(connection: asyncpg.Connection[Any]) -> None:
    """As whoever adds lines does: it holds the batch."""
    await connection.execute("SELECT 1 FROM batch.batches WHERE batch_id = $1 FOR UPDATE", BATCH)
    await connection.execute(
        "INSERT INTO batch.lines (batch_id, line, custom_id, byte_offset, byte_length) VALUES ($1, 1, 'a', -1, 2)",
        BATCH,
    )


async def state(connection: asyncpg.Connection[Any]) -> str:
    return str(await connection.fetchval("SELECT state FROM batch.batches WHERE batch_id = $1", BATCH))


async def test_a_batch_without_open_lines_is_closed(admin: asyncpg.Connection[Any], store: Store) -> None:
    await store.begin_finalizing(BATCH)
    assert await state(admin) == "finalizing"


async def test_a_batch_is_not_closed_over_lines_that_came_since_it_was_looked_at(
    admin: asyncpg.Connection[Any], store: Store
) -> None:
    await add_line(admin)
    await store.begin_finalizing(BATCH)
    assert await state(admin) == "in_progress"


async def test_whoever_closes_a_batch_waits_for_whoever_adds_to_it(
    admin: asyncpg.Connection[Any], store: Store
) -> None:
    async with admin.transaction():
        await add_line(admin)
        closing = asyncio.create_task(store.begin_finalizing(BATCH))
        while not await admin.fetchval("SELECT EXISTS (SELECT 1 FROM pg_locks WHERE NOT granted)"):
            assert not closing.done()
            await asyncio.sleep(0.02)
    await closing
    assert await state(admin) == "in_progress"
