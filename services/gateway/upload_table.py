"""All SQL on uploads: which team's are open, what of them has come, and how many bytes that is. Files are `model_uploads.py`'s."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from services.gateway.store import LimitReached, Row
from shared.database import Connection, Database

_UPLOAD = "SELECT upload_id, created_at, expires_at FROM gateway.model_uploads WHERE team_id = $1 AND expires_at > now()"
_BYTES = """
    SELECT coalesce(sum(f.size_bytes), 0)::bigint
    FROM gateway.upload_files f JOIN gateway.model_uploads u USING (upload_id) WHERE u.team_id = $1
"""


@dataclass(frozen=True, slots=True)
class UploadedFile:
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Upload:
    """An open upload, with the files that are whole."""

    upload_id: str
    created_at: datetime
    expires_at: datetime
    files: tuple[UploadedFile, ...]


@dataclass(frozen=True, slots=True)
class NewFile:
    upload_id: str
    name: str
    size_bytes: int
    writer: str
    """Who writes it: of two that send one name, the one that began last."""


class UploadGone(Exception):
    """The team has no such upload, or no longer."""


class Superseded(Exception):
    """Another request sends the same file since."""


class UploadTable:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, team_id: str, upload_id: str, expires_after_s: float, limit: int) -> None:
        """Raises `LimitReached` when the team has `limit` open uploads."""
        async with self._database.transaction() as connection:
            await _lock_team(connection, team_id)
            held = await connection.fetchval(
                "SELECT count(*) FROM gateway.model_uploads WHERE team_id = $1 AND expires_at > now()",
                team_id,
            )
            if held >= limit:
                raise LimitReached
            await connection.execute(
                "INSERT INTO gateway.model_uploads (upload_id, team_id, expires_at)"
                " VALUES ($1, $2, now() + make_interval(secs => $3))",
                upload_id,
                team_id,
                expires_after_s,
            )

    async def upload(self, team_id: str, upload_id: str) -> Upload | None:
        rows = await self._database.fetch(_UPLOAD + " AND upload_id = $2", team_id, upload_id)
        found = await self._with_files(rows)
        return found[0] if found else None

    async def uploads(self, team_id: str, after: str, limit: int) -> list[Upload]:
        sql = _UPLOAD + " AND upload_id > $2 ORDER BY upload_id LIMIT $3"
        return await self._with_files(await self._database.fetch(sql, team_id, after, limit))

    async def _with_files(self, uploads: Sequence[Row]) -> list[Upload]:
        rows = await self._database.fetch(
            "SELECT upload_id, name, size_bytes, sha256 FROM gateway.upload_files"
            " WHERE upload_id = ANY($1) AND sha256 IS NOT NULL ORDER BY name",
            [upload["upload_id"] for upload in uploads],
        )
        return [
            Upload(
                upload["upload_id"],
                upload["created_at"],
                upload["expires_at"],
                tuple(
                    UploadedFile(row["name"], row["size_bytes"], row["sha256"])
                    for row in rows
                    if row["upload_id"] == upload["upload_id"]
                ),
            )
            for upload in uploads
        ]

    async def begin_file(self, team_id: str, file: NewFile, team_bytes: int) -> None:
        """Count its bytes from now on. Raises `UploadGone`, or `LimitReached` over the team's bytes in all uploads."""
        async with self._database.transaction() as connection:
            # The team's row: two files that begin at once must not both take the last free bytes.
            await _lock_team(connection, team_id)
            await _lock_upload(connection, team_id, file.upload_id)
            await connection.execute(
                "DELETE FROM gateway.upload_files WHERE upload_id = $1 AND name = $2 AND sha256 IS NULL",
                file.upload_id,
                file.name,
            )
            if await connection.fetchval(_BYTES, team_id) + file.size_bytes > team_bytes:
                raise LimitReached
            await connection.execute(
                "INSERT INTO gateway.upload_files (writer, upload_id, name, size_bytes) VALUES ($1, $2, $3, $4)",
                file.writer,
                file.upload_id,
                file.name,
                file.size_bytes,
            )

    async def end_file(
        self,
        team_id: str,
        file: NewFile,
        sha256: str,
        put_in_place: Callable[[], Awaitable[None]],
        expires_after_s: float,
    ) -> None:
        """Make it one of the upload's files, in the place of an older one. Raises `UploadGone`, `Superseded`.

        The file is put in place under the upload's lock, so that the row and the file are the same writer's.
        """
        async with self._database.transaction() as connection:
            await _lock_upload(connection, team_id, file.upload_id)
            if not await connection.fetchval(
                "SELECT 1 FROM gateway.upload_files WHERE writer = $1", file.writer
            ):
                raise Superseded
            await connection.execute(
                "DELETE FROM gateway.upload_files WHERE upload_id = $1 AND name = $2 AND sha256 IS NOT NULL",
                file.upload_id,
                file.name,
            )
            await connection.execute(
                "UPDATE gateway.upload_files SET sha256 = $2 WHERE writer = $1", file.writer, sha256
            )
            await connection.execute(
                "UPDATE gateway.model_uploads SET expires_at = now() + make_interval(secs => $2)"
                " WHERE upload_id = $1",
                file.upload_id,
                expires_after_s,
            )
            await put_in_place()

    async def forget_file(self, writer: str) -> None:
        """Count the bytes of a file that did not come whole no longer."""
        async with self._database.transaction() as connection:
            await connection.execute(
                "DELETE FROM gateway.upload_files WHERE writer = $1 AND sha256 IS NULL", writer
            )

    async def delete_file(
        self, team_id: str, upload_id: str, name: str, remove: Callable[[], Awaitable[None]]
    ) -> bool:
        """Return whether there was such a whole file. Raises `UploadGone`."""
        async with self._database.transaction() as connection:
            await _lock_upload(connection, team_id, upload_id)
            found = await connection.fetchval(
                "DELETE FROM gateway.upload_files WHERE upload_id = $1 AND name = $2 AND sha256 IS NOT NULL"
                " RETURNING 1",
                upload_id,
                name,
            )
            if found is not None:
                await remove()
            return found is not None

    async def delete(self, team_id: str, upload_id: str) -> bool:
        """Return whether the team had this upload."""
        async with self._database.transaction() as connection:
            found = await connection.fetchval(
                "DELETE FROM gateway.model_uploads WHERE team_id = $1 AND upload_id = $2 RETURNING 1",
                team_id,
                upload_id,
            )
            return found is not None

    async def expire(self) -> None:
        async with self._database.transaction() as connection:
            await connection.execute("DELETE FROM gateway.model_uploads WHERE expires_at <= now()")

    async def unknown(self, upload_ids: Sequence[str]) -> list[str]:
        """Return those of the ids that are no upload's."""
        rows = await self._database.fetch(
            "SELECT id FROM unnest($1::text[]) AS id"
            " WHERE NOT EXISTS (SELECT 1 FROM gateway.model_uploads WHERE upload_id = id)",
            list(upload_ids),
        )
        return [row["id"] for row in rows]


async def _lock_team(connection: Connection, team_id: str) -> None:
    await connection.fetchval("SELECT 1 FROM gateway.teams WHERE team_id = $1 FOR UPDATE", team_id)


async def _lock_upload(connection: Connection, team_id: str, upload_id: str) -> None:
    found = await connection.fetchval(
        "SELECT 1 FROM gateway.model_uploads"
        " WHERE team_id = $1 AND upload_id = $2 AND expires_at > now() FOR UPDATE",
        team_id,
        upload_id,
    )
    if found is None:
        raise UploadGone
