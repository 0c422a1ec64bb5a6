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
        """Return how many files, and how many bytes, the team may still add."""
        row = await self._database.fetchrow(
            f"SELECT count(*) AS files, coalesce(sum(bytes), 0)::bigint AS bytes FROM ({_FILES}) AS f WHERE team_id = $1",
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
        """Whether a batch that is not over reads the file."""
        row = await self._database.fetchrow(
            "SELECT 1 FROM batch_api.batches_v1 WHERE input_file_id = $1"
            " AND state IN ('validating', 'in_progress', 'finalizing', 'cancelling') LIMIT 1",
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
            "SELECT * FROM batch_api.batches_v1 WHERE team_id = $1 AND batch_id = $2", team_id, batch_id
        )

    async def batches(self, team_id: str, after: str | None, limit: int) -> list[asyncpg.Record]:
        """Return the newest first. Ids sort by time."""
        return await self._database.fetch(
            "SELECT * FROM batch_api.batches_v1 WHERE team_id = $1 AND ($2::text IS NULL OR batch_id < $2)"
            " ORDER BY batch_id DESC LIMIT $3",
            team_id,
            after,
            limit,
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
