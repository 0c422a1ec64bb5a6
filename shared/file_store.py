"""Files of teams in a folder or in object storage: written and read in pieces, never whole in memory.

A file is there with all its bytes or not at all: what is not finished leaves nothing under its name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from shared.outcomes import Unavailable

PIECE_BYTES = 1024 * 1024
"""Of what is read at once."""
WRITE_BUFFER_BYTES = 8 * 1024 * 1024
"""Object storage takes parts of at least 5 MiB; a smaller file is one request."""


class MissingFile(Exception):
    """There is no file of this name (any more)."""


class Writer(Protocol):
    async def write(self, piece: bytes, /) -> None: ...


class FileStore:
    """url: a folder's path, or `s3://bucket/prefix`, whose credentials come from the environment's AWS_ variables."""

    def __init__(self, url: str) -> None:
        if "://" in url:
            self._store: Any = from_url(url)
        else:
            self._store = LocalStore(prefix=url, automatic_cleanup=True, mkdir=True)

    @asynccontextmanager
    async def writing(self, path: str) -> AsyncIterator[Writer]:
        """Write a file in pieces; it appears when the body ends, and not if the body raises. Raises `Unavailable`."""
        of_body: BaseException | None = None
        opened = obstore.open_writer_async(
            self._store, path, buffer_size=WRITE_BUFFER_BYTES, max_concurrency=2
        )
        try:
            async with opened as writer:
                try:
                    yield _Writer(writer)
                except BaseException as error:
                    of_body = error
                    raise
        except (BaseError, OSError) as error:
            if error is of_body:
                raise  # a client that went away is no failure of the storage
            raise _unavailable(error) from error

    async def read(self, path: str) -> AsyncIterator[bytes]:
        """Yield the file's bytes in pieces. Raises `MissingFile` or `Unavailable`."""
        try:
            found = await obstore.get_async(self._store, path)
            async for piece in found.stream(min_chunk_size=PIECE_BYTES):
                yield bytes(piece)
        except FileNotFoundError as error:
            raise MissingFile(path) from error
        except (BaseError, OSError) as error:
            raise _unavailable(error) from error

    async def read_range(self, path: str, start: int, length: int) -> bytes:
        """Raises `MissingFile` or `Unavailable`."""
        try:
            return bytes(await obstore.get_range_async(self._store, path, start=start, length=length))
        except FileNotFoundError as error:
            raise MissingFile(path) from error
        except (BaseError, OSError) as error:
            raise _unavailable(error) from error

    async def delete(self, path: str) -> None:
        """Idempotent. Raises `Unavailable`."""
        try:
            await obstore.delete_async(self._store, path)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise _unavailable(error) from error


class _Writer:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def write(self, piece: bytes, /) -> None:
        try:
            await self._inner.write(piece)
        except (BaseError, OSError) as error:
            raise _unavailable(error) from error


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(f"file storage: {type(error).__name__}")
