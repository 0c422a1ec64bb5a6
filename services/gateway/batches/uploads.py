"""Reads a multipart upload into the file storage, piece by piece: no more than a piece of it is in memory.

Nothing is kept of an upload that does not arrive whole, is too large, or is for a purpose that is not served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import BodyPartReader, web
from aiohttp.web_protocol import RequestPayloadError

from shared.file_store import FileStore
from shared.inference.errors import ApiError, bad_request

MAX_FILE_BYTES = 200 * 1024 * 1024
MAX_UPLOAD_BYTES = MAX_FILE_BYTES + 1024 * 1024
"""With the form around the file."""
PIECE_BYTES = 256 * 1024
PIECE_DEADLINE_S = 30.0
MAX_FIELD_BYTES = 1024
MAX_FILENAME_CHARS = 255
T = TypeVar("T")
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


@dataclass(frozen=True, slots=True)
class Uploaded:
    filename: str
    bytes: int
    fields: dict[str, str]


async def receive(request: web.Request, files: FileStore, path: str, max_bytes: int) -> Uploaded:
    """Write the part `file` to `path` and return it with the form's other fields. Raises ApiError or `Unavailable`."""
    if not request.content_type.startswith("multipart/form-data"):
        raise ApiError(415, "unsupported_media_type", "Content-Type must be multipart/form-data.")
    filename, size, fields = None, 0, {}
    try:
        reader = await request.multipart()
        while (part := await _in_time(reader.next())) is not None:
            if not isinstance(part, BodyPartReader):
                raise bad_request("invalid_multipart", "A part of the form is a form of its own.")
            if part.name != "file":
                fields[_known(part.name)] = await _text(part)
            elif filename is not None:
                raise bad_request("invalid_multipart", "The form has more than one file.", "file")
            else:
                filename = (part.filename or "")[:MAX_FILENAME_CHARS].replace("\x00", "")
                size = await _store(part, files, path, max_bytes)
    except ValueError as error:  # what aiohttp says of a form that is none
        raise bad_request("invalid_multipart", "The body is not a valid form.") from error
    except RequestPayloadError as error:
        raise ApiError(
            400, "bad_http", "The body is not valid HTTP.", headers={"Connection": "close"}
        ) from error
    if filename is None:
        raise bad_request("missing_parameter", "file is required.", "file")
    return Uploaded(filename or "upload", size, fields)


async def _store(part: BodyPartReader, files: FileStore, path: str, max_bytes: int) -> int:
    size = 0
    async with files.writing(path) as writer:
        while piece := await _in_time(part.read_chunk(PIECE_BYTES)):
            size += len(piece)
            if size > max_bytes:
                raise ApiError(
                    413,
                    "file_too_large",
                    f"The file is over {max_bytes} bytes.",
                    param="file",
                    headers={"Connection": "close"},
                )
            await writer.write(piece)
    return size


async def _text(part: BodyPartReader) -> str:
    text = b""
    while piece := await _in_time(part.read_chunk(MAX_FIELD_BYTES)):
        text += piece
        if len(text) > MAX_FIELD_BYTES:
            raise bad_request("invalid_value", f"{part.name} is too long.", part.name)
    return text.decode("utf-8", "replace")


def _known(name: str | None) -> str:
    if name not in FIELDS:
        raise bad_request("unknown_parameter", "The form has a field that is not known here.")
    return name


async def _in_time(reading: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(PIECE_DEADLINE_S):
            return await reading
    except TimeoutError as error:
        raise ApiError(
            408, "request_timeout", "The body did not arrive in time.", headers={"Connection": "close"}
        ) from error
