"""`/v1/files`: upload, list, look, download, delete. Names and sizes are rows, the bytes lie in the file storage."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from aiohttp import web

from services.gateway.batches.shapes import DELETED, FILE, MAX_KEEP_S, MIN_KEEP_S, file_json, list_of
from services.gateway.batches.tables import BYTES_PER_TEAM, FILES_PER_TEAM, FileRow, Tables
from services.gateway.batches.uploads import MAX_FILE_BYTES, MAX_UPLOAD_BYTES, Uploaded, receive
from services.gateway.commands import refusal
from services.gateway.management.acting import answer, not_found, path_id, query_of
from services.gateway.management.idempotency import command_envelope
from services.gateway.routes import INFERENCE, RouteSpec, principal_of
from shared import topology
from shared.commands import CommandCaller
from shared.file_store import FileStore, MissingFile
from shared.ids import new_id
from shared.inference.errors import ApiError, bad_request, must_not_retry
from shared.messages import DeleteBatchFile
from shared.outcomes import Unavailable

log = structlog.get_logger()

MAX_PAGE = 10_000
SWEEP_S = 600.0
SWEEP_FILES = 100
_UPLOAD = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": ["batch"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_KEEP_S, "maximum": MAX_KEEP_S},
    },
    "required": ["file", "purpose"],
}
LIST_QUERY: dict[str, dict[str, Any]] = {
    "after": {"type": "string", "description": "The last id of the page before."},
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": MAX_PAGE},
    "order": {"type": "string", "enum": ["asc", "desc"], "default": "desc"},
    "purpose": {"type": "string"},
}


@dataclass(frozen=True, slots=True)
class FileDeps:
    tables: Tables
    files: FileStore
    commands: CommandCaller


def routes(deps: FileDeps) -> list[RouteSpec]:
    handlers = _Handlers(deps)

    def spec(method: str, path: str, handler: Any, summary: str, **more: Any) -> RouteSpec:
        return RouteSpec(
            method=method, path=path, handler=handler, summary=summary, error_shape="openai", scope=INFERENCE,
            tag="batches", **more
        )  # fmt: skip

    return [
        spec("POST", "/v1/files", handlers.upload, "Store a file of a batch's lines.", request_schema=_UPLOAD,
             request_content_type="multipart/form-data", max_body_bytes=MAX_UPLOAD_BYTES, responses={200: FILE}),
        spec("GET", "/v1/files", handlers.list, "The team's files.", query=LIST_QUERY, responses={200: list_of(FILE)}),
        spec("GET", "/v1/files/{file_id}", handlers.get, "One file.", responses={200: FILE}),
        spec("DELETE", "/v1/files/{file_id}", handlers.delete, "Delete a file.", responses={200: DELETED}),
        spec("GET", "/v1/files/{file_id}/content", handlers.content, "A file's bytes.", responses={200: None}),
    ]  # fmt: skip


class _Handlers:
    def __init__(self, deps: FileDeps) -> None:
        self._deps = deps

    async def upload(self, request: web.Request) -> web.Response:
        principal = principal_of(request)
        files_left, bytes_left = await self._deps.tables.room(principal.team_id)
        if files_left <= 0 or bytes_left <= 0:
            message = (
                f"A team has at most {FILES_PER_TEAM} files of {BYTES_PER_TEAM} bytes in all: delete some."
            )
            raise must_not_retry(ApiError(409, "too_many_files", message))
        file_id = new_id("file")
        path = f"{principal.team_id}/{file_id}"
        uploaded = await receive(request, self._deps.files, path, min(MAX_FILE_BYTES, bytes_left))
        try:
            file = _new_file(file_id, principal.team_id, path, uploaded)
            await self._deps.tables.add_file(file, principal.key_id)
        except BaseException:
            await asyncio.shield(self._deps.files.delete(path))
            raise
        return answer(file_json(file))

    async def list(self, request: web.Request) -> web.Response:
        team_id, query = principal_of(request).team_id, query_of(request)
        limit = read_limit(query, MAX_PAGE, MAX_PAGE)
        if query.get("order", "desc") not in ("asc", "desc"):
            raise bad_request("invalid_value", "order must be asc or desc.", "order")
        after = None
        if "after" in query:
            after = await self._deps.tables.file(team_id, query["after"])
            if after is None:
                raise bad_request("invalid_value", "after is not one of your files.", "after")
        rows = await self._deps.tables.files(
            team_id, query.get("purpose"), after, limit + 1, newest_first=query.get("order", "desc") == "desc"
        )
        return answer(page_json([file_json(row) for row in rows], limit))

    async def get(self, request: web.Request) -> web.Response:
        return answer(file_json(await self._file(request)))

    async def delete(self, request: web.Request) -> web.Response:
        file = await self._file(request)
        if file.own:
            if await self._deps.tables.is_in_use(file.file_id):
                message = "A batch that is not over, or a schedule, reads this file."
                raise must_not_retry(ApiError(409, "file_in_use", message))
            # The bytes first: a row without them is deleted again, bytes without a row would stay for ever.
            await self._deps.files.delete(file.storage_path)
            await self._deps.tables.mark_deleted(file.file_id)
        else:
            command = DeleteBatchFile(
                **await command_envelope(request, self._deps.commands),
                team_id=file.team_id,
                file_id=file.file_id,
            )
            result = await self._deps.commands.call(topology.BATCH_COMMANDS, command)
            if not result.ok:
                raise refusal(result)
        return answer({"id": file.file_id, "object": "file", "deleted": True})

    async def content(self, request: web.Request) -> web.StreamResponse:
        file = await self._file(request)
        pieces = self._deps.files.read(file.storage_path)
        try:
            first = await anext(pieces, b"")
        except MissingFile as error:
            raise not_found() from error
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.content_length = file.bytes
        await response.prepare(request)
        await response.write(first)
        async for piece in pieces:
            await response.write(piece)
        await response.write_eof()
        return response

    async def _file(self, request: web.Request) -> FileRow:
        file = await self._deps.tables.file(principal_of(request).team_id, path_id(request, "file_id"))
        if file is None:
            raise not_found()
        return file


def read_limit(query: dict[str, str], default: int, maximum: int) -> int:
    raw = query.get("limit", str(default))
    if not re.fullmatch(r"[0-9]{1,5}", raw) or not 1 <= int(raw) <= maximum:
        raise bad_request("invalid_value", f"limit must be an integer from 1 to {maximum}.", "limit")
    return int(raw)


def page_json(entries: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's page; `entries` has one more than the page holds if there is a next one."""
    shown = entries[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(entries) > limit,
    }


def _new_file(file_id: str, team_id: str, path: str, uploaded: Uploaded) -> FileRow:
    """Check the form's fields. Raises ApiError 400."""
    fields = uploaded.fields
    if "purpose" not in fields:
        raise bad_request("missing_parameter", "purpose is required.", "purpose")
    if fields["purpose"] != "batch":
        raise bad_request("invalid_value", "purpose must be batch.", "purpose")
    now = datetime.now(UTC)
    expires_at = None
    seconds = fields.get("expires_after[seconds]")
    if seconds is not None or "expires_after[anchor]" in fields:
        if fields.get("expires_after[anchor]") != "created_at":
            raise bad_request("invalid_value", "expires_after.anchor must be created_at.", "expires_after")
        if (
            not re.fullmatch(r"[0-9]{1,9}", seconds or "")
            or not MIN_KEEP_S <= int(seconds or 0) <= MAX_KEEP_S
        ):
            message = f"expires_after.seconds must be an integer from {MIN_KEEP_S} to {MAX_KEEP_S}."
            raise bad_request("invalid_value", message, "expires_after")
        expires_at = now + timedelta(seconds=int(seconds or 0))
    return FileRow(
        file_id=file_id,
        team_id=team_id,
        filename=uploaded.filename,
        purpose="batch",
        bytes=uploaded.bytes,
        storage_path=path,
        created_at=now,
        expires_at=expires_at,
    )


async def sweep_files(tables: Tables, files: FileStore) -> None:
    """Remove files whose time is over, until cancelled."""
    while True:
        try:
            for file_id, path in await tables.expired_files(SWEEP_FILES):
                await files.delete(path)
                await tables.mark_deleted(file_id)
        except Unavailable as error:
            log.warning("expired_files_not_swept", error=str(error))
        await asyncio.sleep(SWEEP_S)
