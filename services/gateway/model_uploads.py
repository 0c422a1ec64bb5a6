"""The files of uploads on disk: streamed in piece by piece, whole or not there, swept when nobody registers them.

They lie below the model store, on its file system, so that registering links weights and copies nothing twice:
`.uploads/<upload id>/files/<name>`, and beside it, while it comes in, `parts/<writer>`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from aiohttp import StreamReader
from aiohttp.web_protocol import RequestPayloadError

from services.gateway.store import LimitReached
from services.gateway.threads import run_to_its_end
from services.gateway.upload_table import NewFile, Superseded, UploadGone, UploadTable
from shared.ids import new_id
from shared.inference.errors import ApiError, bad_request
from shared.model_files import ADAPTER_CONFIG, ModelFolderError, ModelFolderLimits, size_limit
from shared.outcomes import Unavailable

log = structlog.get_logger()

FOLDER = ".uploads"
PIECE_BYTES = 1024 * 1024
IDLE_S = 30.0
SLOWEST_BYTES_PER_S = 64 * 1024
"""A file that comes more slowly holds its place for nothing."""
BUSY_RETRY_S = 5


@dataclass(frozen=True, slots=True)
class UploadLimits:
    folder: ModelFolderLimits = field(default_factory=ModelFolderLimits)
    team_bytes: int = 300 * 1024**3
    team_uploads: int = 8
    team_files_at_once: int = 4
    files_at_once: int = 16
    expires_after_s: float = 24 * 3600.0
    idle_s: float = IDLE_S


@dataclass(frozen=True, slots=True)
class ModelUploads:
    table: UploadTable
    store: Path
    limits: UploadLimits
    _coming: Counter[str] = field(default_factory=Counter)
    """Files on their way to this gateway, by team."""

    async def create(self, team_id: str) -> str:
        """Return the new upload's id. Raises `ApiError` 409 when the team has as many as it may."""
        upload_id = new_id("upl")
        try:
            await self.table.create(team_id, upload_id, self.limits.expires_after_s, self.limits.team_uploads)
        except LimitReached as error:
            message = (
                f"A team may have {self.limits.team_uploads} open uploads; register or delete one first."
            )
            raise ApiError(409, "too_many_uploads", message) from error
        return upload_id

    def folder(self, upload_id: str) -> Path:
        return self.store / FOLDER / upload_id / "files"

    def check_name(self, name: str, size_bytes: int) -> None:
        """Raises `ApiError` for a name that no model folder holds, and a size above what is allowed for it."""
        try:
            limit_bytes = size_limit(name, self.limits.folder, adapter=name == ADAPTER_CONFIG)
        except ModelFolderError as error:
            raise bad_request(error.code.value, error.message[:300], "name") from error
        if size_bytes > limit_bytes:
            message = f"The file may have {limit_bytes} bytes."
            raise ApiError(413, "model_too_large", message, param="name")

    async def receive(
        self, team_id: str, upload_id: str, name: str, size_bytes: int, content: StreamReader
    ) -> str:
        """Take one file, whole, and return its digest; one of this name is replaced. Raises `ApiError`."""
        file = NewFile(upload_id, name, size_bytes, new_id("wri"))
        with _Place(self._coming, team_id, self.limits):
            try:
                await self.table.begin_file(team_id, file, self.limits.team_bytes)
                return await self._receive(team_id, file, content)
            except UploadGone as error:
                raise ApiError(404, "not_found", "There is no such thing.") from error
            except LimitReached as error:
                message = f"A team's open uploads may have {self.limits.team_bytes} bytes in all."
                raise ApiError(409, "upload_quota_exceeded", message) from error
            except Superseded as error:
                message = "Another request sends the same file since."
                raise ApiError(409, "upload_superseded", message) from error

    async def _receive(self, team_id: str, file: NewFile, content: StreamReader) -> str:
        part = self.store / FOLDER / file.upload_id / "parts" / file.writer
        kept = False
        try:
            sha256 = await self._write(part, file.size_bytes, content)
            target = self.folder(file.upload_id) / file.name

            async def put_in_place() -> None:
                await run_to_its_end(_move, part, target)

            await self.table.end_file(team_id, file, sha256, put_in_place, self.limits.expires_after_s)
            kept = True
            return sha256
        except ConnectionError:
            raise
        except OSError as error:
            log.error("upload_not_written", upload_id=file.upload_id, error=str(error))
            raise ApiError(507, "store_full", "The file could not be written to the store.") from error
        finally:
            if not kept:
                await asyncio.shield(self._forget(part, file.writer))

    async def _forget(self, part: Path, writer: str) -> None:
        await asyncio.to_thread(part.unlink, missing_ok=True)
        try:
            await self.table.forget_file(writer)
        except Unavailable as error:
            # Its bytes count until the file is sent again, or the upload ends.
            log.warning("upload_part_not_forgotten", writer=writer, error=str(error))

    async def _write(self, part: Path, size_bytes: int, content: StreamReader) -> str:
        """Return the digest of what came. At most a piece of it is in memory at a time."""
        digest = hashlib.sha256()
        written = 0
        opened: Any = await run_to_its_end(_open_new, part)
        try:
            async with asyncio.timeout(self.limits.idle_s + size_bytes / SLOWEST_BYTES_PER_S):
                while piece := await self._next_piece(content):
                    written += len(piece)
                    await run_to_its_end(_append, opened, digest, piece)
        except TimeoutError as error:
            message = "The file did not arrive in time."
            raise ApiError(408, "request_timeout", message) from error
        except RequestPayloadError as error:
            raise bad_request("bad_http", "The body is not valid HTTP.") from error
        finally:
            await run_to_its_end(opened.close)
        if written != size_bytes:
            raise bad_request("bad_http", "The body is not as long as Content-Length says.")
        return digest.hexdigest()

    async def _next_piece(self, content: StreamReader) -> bytes:
        piece = bytearray()
        while len(piece) < PIECE_BYTES:
            async with asyncio.timeout(self.limits.idle_s):
                chunk = await content.readany()
            if not chunk:
                break
            piece += chunk
        return bytes(piece)

    async def delete_file(self, team_id: str, upload_id: str, name: str) -> bool:
        async def remove() -> None:
            await asyncio.to_thread((self.folder(upload_id) / name).unlink, missing_ok=True)

        try:
            return await self.table.delete_file(team_id, upload_id, name, remove)
        except UploadGone:
            return False

    async def delete(self, team_id: str, upload_id: str) -> bool:
        """Return whether the team had this upload; what is on its way to it ends with an error."""
        found = await self.table.delete(team_id, upload_id)
        if found:
            await asyncio.to_thread(shutil.rmtree, self.store / FOLDER / upload_id, ignore_errors=True)
        return found

    async def sweep(self) -> list[str]:
        """End uploads that expired, remove all folders that are no upload's, and return which."""
        await self.table.expire()
        root = self.store / FOLDER
        names = await asyncio.to_thread(lambda: sorted(os.listdir(root)) if root.is_dir() else [])
        gone = await self.table.unknown(names)
        for name in gone:
            try:
                await asyncio.to_thread(shutil.rmtree, root / name)
            except FileNotFoundError:
                continue  # another gateway is at it, too
            except OSError as error:
                log.error("upload_not_removed", upload_id=name, error=str(error))
        return gone


class _Place:
    """One of the places for files on their way; as a `with` block. Raises `ApiError` 429 where none is free."""

    def __init__(self, coming: Counter[str], team_id: str, limits: UploadLimits) -> None:
        self._coming, self._team_id, self._limits = coming, team_id, limits

    def __enter__(self) -> None:
        if (
            self._coming[self._team_id] >= self._limits.team_files_at_once
            or self._coming.total() >= self._limits.files_at_once
        ):
            message = "Too many files are on their way."
            raise ApiError(429, "too_many_uploads", message, retry_after_s=BUSY_RETRY_S)
        self._coming[self._team_id] += 1

    def __exit__(self, *_error: object) -> None:
        self._coming[self._team_id] -= 1
        if self._coming[self._team_id] <= 0:
            del self._coming[self._team_id]


def _open_new(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("xb")


def _append(opened: Any, digest: Any, piece: bytes) -> None:
    opened.write(piece)
    digest.update(piece)


def _move(part: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    os.replace(part, target)
