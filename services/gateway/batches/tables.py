"""SQL of files: the gateway's own, and what batches wrote; and SELECTs on batches. Every query takes the team's id."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from shared.database import Database

FILES_PER_TEAM = 1000
BYTES_PER_TEAM = 20 * 1024**3
RESULT_PAGE_LINES = 200
SHOWN_RUNS = 20
SETTLED_S = 10.0
"""Longer than a transaction of the batch service takes: its statements end after eight seconds."""

# `own`: whether the gateway may delete it; what a batch wrote is deleted by the batch service.
_FILES = """
    SELECT * FROM (
        SELECT file_id, team_id, filename, purpose, bytes, storage_path, created_at, expires_at, true AS own
        FROM gateway.files WHERE deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now())
        UNION ALL
        SELECT file_id, team_id, filename, purpose, bytes, storage_path, created_at, expires_at, false AS own
        FROM batch_api.files_v1
    ) AS files
"""
# With what the batch's own resource was charged so far, if it has one.
_BATCHES = """
    SELECT b.*, o.state AS own_state, o.resource_id AS own_resource_id, o.gpus AS own_gpus, o.quoted AS own_quoted,
           m.minutes AS own_minutes, m.cost_nanousd AS own_cost_nanousd
    FROM batch_api.batches_v1 b
    LEFT JOIN batch_api.own_resources_v1 o USING (batch_id)
    LEFT JOIN LATERAL (
        SELECT coalesce(sum(minutes), 0)::bigint AS minutes, coalesce(sum(posted_nanousd), 0)::bigint AS cost_nanousd
        FROM billing_api.minutes_v1 WHERE resource_id = o.resource_id
    ) AS m ON true
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRow:
    file_id: str
    team_id: str
    filename: str
    purpose: str
    bytes: int
    storage_path: str
    created_at: datetime
    expires_at: datetime | None
    own: bool = True


class Tables:
    """What the routes of files and batches read and write."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ---- files

    async def room(self, team_id: str) -> tuple[int, int]:
        """Return how many files, and how many bytes, the team may still add. What batches made counts by its bytes alone."""
        row = await self._database.fetchrow(
            "SELECT count(*) FILTER (WHERE purpose = 'batch') AS files, coalesce(sum(bytes), 0)::bigint AS bytes"
            f" FROM ({_FILES}) AS f WHERE team_id = $1",
            team_id,
        )
        return (FILES_PER_TEAM - row["files"], BYTES_PER_TEAM - row["bytes"]) if row else (0, 0)

    async def add_file(self, file: FileRow, key_id: str) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(
                "INSERT INTO gateway.files"
                " (file_id, team_id, key_id, filename, purpose, bytes, storage_path, created_at, expires_at)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
                file.file_id,
                file.team_id,
                key_id,
                file.filename,
                file.purpose,
                file.bytes,
                file.storage_path,
                file.created_at,
                file.expires_at,
            )

    async def file(self, team_id: str, file_id: str) -> FileRow | None:
        row = await self._database.fetchrow(_FILES + " WHERE team_id = $1 AND file_id = $2", team_id, file_id)
        return None if row is None else FileRow(**dict(row))

    async def files(
        self, team_id: str, purpose: str | None, after: FileRow | None, limit: int, *, newest_first: bool
    ) -> list[FileRow]:
        compare, order = ("<", "DESC") if newest_first else (">", "ASC")
        at, file_id = (after.created_at, after.file_id) if after else (None, None)
        # The two words are the constants above: nothing of the request is in the text.
        rows = await self._database.fetch(
            f"{_FILES} WHERE team_id = $1 AND ($2::text IS NULL OR purpose = $2)"
            f" AND ($3::timestamptz IS NULL OR (created_at, file_id) {compare} ($3, $4))"
            f" ORDER BY created_at {order}, file_id {order} LIMIT $5",
            team_id,
            purpose,
            at,
            file_id,
            limit,
        )
        return [FileRow(**dict(row)) for row in rows]

    async def is_in_use(self, file_id: str) -> bool:
        """Whether a batch that is not over, or a schedule, reads the file."""
        row = await self._database.fetchrow(
            "SELECT 1 FROM batch_api.batches_v1 WHERE input_file_id = $1"
            " AND state IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
            " UNION ALL SELECT 1 FROM batch_api.schedules_v1 WHERE input_file_id = $1 LIMIT 1",
            file_id,
        )
        return row is not None

    async def mark_deleted(self, file_id: str) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(
                "UPDATE gateway.files SET deleted_at = now() WHERE file_id = $1 AND deleted_at IS NULL",
                file_id,
            )

    async def expired_files(self, limit: int) -> list[tuple[str, str]]:
        """Return ids and paths of files whose time is over and that still lie in the storage."""
        rows = await self._database.fetch(
            "SELECT file_id, storage_path FROM gateway.files WHERE expires_at < now() AND deleted_at IS NULL LIMIT $1",
            limit,
        )
        return [(row["file_id"], row["storage_path"]) for row in rows]

    # ---- batches

    async def batch(self, team_id: str, batch_id: str) -> asyncpg.Record | None:
        return await self._database.fetchrow(
            f"{_BATCHES} WHERE b.team_id = $1 AND b.batch_id = $2", team_id, batch_id
        )

    async def batches(self, team_id: str, after: str | None, limit: int) -> list[asyncpg.Record]:
        """Return the newest first. Ids sort by time."""
        return await self._database.fetch(
            f"{_BATCHES} WHERE b.team_id = $1 AND ($2::text IS NULL OR b.batch_id < $2)"
            " ORDER BY b.batch_id DESC LIMIT $3",
            team_id,
            after,
            limit,
        )

    async def schedules(self, team_id: str, after: str, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT * FROM batch_api.schedules_v1 WHERE team_id = $1 AND schedule_id > $2 ORDER BY schedule_id LIMIT $3",
            team_id,
            after,
            limit,
        )

    async def schedule(self, team_id: str, schedule_id: str) -> asyncpg.Record | None:
        return await self._database.fetchrow(
            "SELECT * FROM batch_api.schedules_v1 WHERE team_id = $1 AND schedule_id = $2",
            team_id,
            schedule_id,
        )

    async def schedule_runs(self, team_id: str, schedule_id: str) -> list[asyncpg.Record]:
        """Return the newest."""
        return await self._database.fetch(
            "SELECT * FROM batch_api.schedule_runs_v1 WHERE team_id = $1 AND schedule_id = $2"
            " ORDER BY due_at DESC LIMIT $3",
            team_id,
            schedule_id,
            SHOWN_RUNS,
        )

    async def events(self, team_id: str, after: int, limit: int) -> list[asyncpg.Record]:
        """Return the oldest after that one. One that a running transaction still writes may come later than a younger one,
        so none of the last seconds is told.
        """
        return await self._database.fetch(
            "SELECT * FROM batch_api.batch_events_v1 WHERE team_id = $1 AND event_id > $2"
            " AND at < now() - make_interval(secs => $4) ORDER BY event_id LIMIT $3",
            team_id,
            after,
            limit,
            SETTLED_S,
        )

    async def events_of(self, team_id: str, batch_id: str) -> list[asyncpg.Record]:
        """Return a batch's few."""
        return await self._database.fetch(
            "SELECT * FROM batch_api.batch_events_v1 WHERE team_id = $1 AND batch_id = $2 ORDER BY event_id",
            team_id,
            batch_id,
        )

    async def spendable(self, team_id: str) -> int | None:
        """In nano-USD; None is without a bound."""
        row = await self._database.fetchrow(
            "SELECT spendable_nanousd FROM billing_api.spendable_v1 WHERE team_id = $1", team_id
        )
        return None if row is None else row["spendable_nanousd"]

    async def quote(self, team_id: str, quote_id: str) -> asyncpg.Record | None:
        return await self._database.fetchrow(
            "SELECT * FROM batch_api.quotes_v1 WHERE team_id = $1 AND quote_id = $2", team_id, quote_id
        )

    async def results(self, team_id: str, batch_id: str) -> AsyncIterator[Any]:
        """Yield the rows of all lines that are over, in the file's order."""
        after_line = 0
        while rows := await self._database.fetch(
            "SELECT line, custom_id, state, request_id, status_code, response FROM batch_api.results_v1"
            " WHERE team_id = $1 AND batch_id = $2 AND line > $3 AND state NOT IN ('queued', 'running')"
            " ORDER BY line LIMIT $4",
            team_id,
            batch_id,
            after_line,
            RESULT_PAGE_LINES,
        ):
            for row in rows:
                yield row
            after_line = rows[-1]["line"]
