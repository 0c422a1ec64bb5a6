"""A batch ends once, however often its files are written: a look at it may be older than its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, cast

import asyncpg
import pytest

from services.batch.records import OutputFile
from services.batch.store import Store
from shared.database import Connection, Database
from shared.lease import Lease

OUTPUT = OutputFile("file_1", "batch_1_output.jsonl", 10, "t/file_1")


class Leads:
    """A lease that is always held."""

    async def fence(self, connection: Connection) -> int:
        return 1


@pytest.fixture
async def admin(database: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture
async def store(database: str) -> AsyncIterator[Store]:
    async with AsyncExitStack() as stack:
        yield Store(await Database.open(database, "roundhouse_batch", stack), cast(Lease, Leads()))


@pytest.mark.parametrize(("ending", "ended"), [("cancelling", "cancelled"), ("finalizing", "completed")])
async def test_a_batch_that_was_seen_open_and_has_ended_is_not_ended_again(
    admin: asyncpg.Connection[Any], store: Store, ending: str, ended: str
) -> None:
    moved = "cancelling_at" if ending == "cancelling" else "finalizing_at"
    await admin.execute(
        "INSERT INTO batch.batches (batch_id, team_id, key_id, endpoint, input_file_id, input_path, completion_window,"
        f" metadata, state, model_id, revision, model_name, model_type, expires_at, in_progress_at, {moved})"
        " VALUES ('batch_1', 't', 'k', '/v1/completions', '', '', '24h', '{}', $1, 'm', 1, 'm', 'm',"
        " now() + interval '1 day', now(), now())",
        ending,
    )
    (seen,) = await store.open_batches()
    await store.finish(seen, OUTPUT, None)
    await store.finish(seen, OUTPUT, None)
    row = await admin.fetchrow("SELECT state, output_file_id FROM batch.batches WHERE batch_id = 'batch_1'")
    assert row is not None
    assert dict(row) == {"state": ended, "output_file_id": "file_1"}
    assert await admin.fetchval("SELECT count(*) FROM batch.files") == 1
