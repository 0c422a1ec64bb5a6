"""A file of named tensors that is mapped, not read: its pages are the page cache's, shared by all who map it.

Layout: 8 bytes that say what it is, the header's length and digest, the header as JSON, and from the next page on the
tensors, each at a multiple of 64 bytes. A file appears under its name only when all of it is on the disk, and never
changes afterwards: a new one replaces it by a rename, and who has the old one mapped keeps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .checksums import BEST, DIGESTS

_MAGIC = b"RHIMAGE2"
_PREFIX = struct.Struct("<8sQ32s")
# The kernel may hold and map huge pages of a file that is written in whole ones: loads then wait for hundreds of faults
# instead of ten thousands.
_HUGE_PAGE_BYTES = 2 * 1024 * 1024
_ALIGNMENT_BYTES = 64
_CHUNK_BYTES = 4 * 1024 * 1024
# That of a model with 500 layers is below 1 MiB.
_MOST_HEADER_BYTES = 64 * 1024 * 1024
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.int64)
}


class ImageDamaged(ValueError):
    """The file is not what was written; the message says which part differs."""


@dataclass(frozen=True, slots=True)
class Image:
    """tensors: views of the mapped file, to be read only. meta: what the writer said of them. body: all bytes of the
    tensors, uint8.
    """

    meta: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    body: torch.Tensor
    chunk_digests: tuple[str, ...]
    chunk_bytes: int
    algorithm: str

    def offset(self, tensor: str) -> int:
        """Bytes of the body before it."""
        place: int = self.tensors[tensor].data_ptr() - self.body.data_ptr()
        return place

    def verify(self, after_chunk: Callable[[int], None] = lambda _: None, *, threads: int = 1) -> None:
        """Reads all of it, at the speed of memory where it is in the page cache. Raises ImageDamaged.

        after_chunk: called with the bytes just read, so that a caller can leave memory to others in between; on the thread
        that read them. threads: that read at once, this one among them.
        """
        with self.verifying(after_chunk, threads=threads):
            pass

    @contextmanager
    def verifying(
        self, after_chunk: Callable[[int], None], *, threads: int, first_bytes: int | None = None
    ) -> Iterator[None]:
        """As `verify`, whose other threads read while the caller does something else; at its end this one helps.

        first_bytes: of the body, where the caller compares the rest by itself; None: all of it.
        """
        digest, data = DIGESTS[self.algorithm], memoryview(self.body.numpy())
        chunks = len(self.chunk_digests)
        if first_bytes is not None:
            chunks = min(chunks, -(-first_bytes // self.chunk_bytes))
        left = iter(range(chunks))

        def read() -> None:
            for number in left:  # each number goes to one thread
                chunk = data[number * self.chunk_bytes : (number + 1) * self.chunk_bytes]
                if digest(chunk) != self.chunk_digests[number]:
                    raise ImageDamaged(
                        f"chunk {number} of {len(self.chunk_digests)} differs from what was written"
                    )
                after_chunk(len(chunk))

        helpers = min(threads, chunks) - 1
        if helpers < 1:
            yield
            read()
            return
        with ThreadPoolExecutor(helpers, thread_name_prefix="verify") as pool:
            reading = [pool.submit(read) for _ in range(helpers)]
            try:
                yield
                read()
            finally:
                for _ in left:  # after a failure nobody needs the rest
                    pass
            for each in reading:
                each.result()


def write_image(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> int:
    """Returns the file's bytes. Raises OSError; what was at `path` before is then still there."""
    offsets, body_bytes = _places(tensors)
    header: dict[str, Any] = {
        "meta": meta,
        "tensors": {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offsets[name]]
            for name, tensor in tensors.items()
        },
        "body_bytes": body_bytes,
        "chunk_bytes": _CHUNK_BYTES,
        "algorithm": BEST,
    }
    # All digests have one length, so the header's is known before the body is read.
    nothing = DIGESTS[BEST](memoryview(b""))
    chunks = -(-body_bytes // _CHUNK_BYTES)
    body_start = _body_start(len(json.dumps(header | {"chunks": [nothing] * chunks}).encode()))
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=".image-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.seek(body_start)
            header["chunks"] = list(_write_body(file, tensors, offsets, body_bytes))
            encoded = json.dumps(header).encode()
            file.seek(0)
            file.write(_PREFIX.pack(_MAGIC, len(encoded), hashlib.sha256(encoded).digest()) + encoded)
            file.flush()
            os.fchmod(file.fileno(), 0o444)
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    _sync_folder(path.parent)
    return body_start + body_bytes


def open_image(path: Path) -> Image:
    """Maps the file; of the body nothing is read yet. Raises OSError, and ImageDamaged for what is no whole image."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        header, header_bytes = _read_header(file)
    body_start, body_bytes = _body_start(header_bytes), int(header["body_bytes"])
    if size_bytes != body_start + body_bytes:
        raise ImageDamaged(f"the file has {size_bytes} bytes instead of {body_start + body_bytes}")
    if header["algorithm"] not in DIGESTS:
        raise ImageDamaged(f"its checksums are {header['algorithm']}, which this machine cannot compute")
    # Private: even a stray write would not reach the file. The mapping lives as long as a view of it.
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size_bytes)
    body = torch.tensor([], dtype=torch.uint8).set_(storage)[body_start:]
    return Image(
        meta=header["meta"],
        tensors=_views(storage, body_start, header["tensors"]),
        body=body,
        chunk_digests=tuple(header["chunks"]),
        chunk_bytes=int(header["chunk_bytes"]),
        algorithm=header["algorithm"],
    )


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise ImageDamaged("the file ends within its header")
    magic, header_bytes, digest = _PREFIX.unpack(prefix)
    if magic != _MAGIC or header_bytes > _MOST_HEADER_BYTES:
        raise ImageDamaged("the file does not begin as an image does")
    encoded = file.read(header_bytes)
    if hashlib.sha256(encoded).digest() != digest:
        raise ImageDamaged("the header differs from what was written")
    header: dict[str, Any] = json.loads(encoded)
    return header, header_bytes


def _views(
    storage: torch.UntypedStorage, body_start: int, places: Mapping[str, tuple[str, list[int], int]]
) -> dict[str, torch.Tensor]:
    """One step for each tensor: a model has hundreds, and whoever waits for it waits for them."""
    whole = {name: torch.empty(0, dtype=dtype).set_(storage) for name, dtype in _DTYPES.items()}
    views = {}
    for name, (dtype, shape, offset) in places.items():
        strides = [1] * len(shape)
        for axis in range(len(shape) - 1, 0, -1):
            strides[axis - 1] = strides[axis] * shape[axis]
        elements = (body_start + offset) // _DTYPES[dtype].itemsize
        views[name] = whole[dtype].as_strided(shape, strides, elements)
    return views


def _places(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, int], int]:
    """Where each begins, and the bytes of all."""
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        end = _up(end + tensor.nbytes, _ALIGNMENT_BYTES)
    return offsets, end


def _write_body(
    file: BinaryIO, tensors: Mapping[str, torch.Tensor], offsets: Mapping[str, int], body_bytes: int
) -> Iterator[str]:
    """Digests of the chunks, made from what is written, not from what the disk says of it."""
    digest, chunk = DIGESTS[BEST], bytearray()
    written = 0
    for piece in _pieces(tensors, offsets, body_bytes):
        while len(piece):
            taken = min(_CHUNK_BYTES - len(chunk), len(piece))
            chunk += piece[:taken]
            piece = piece[taken:]
            written += taken
            if len(chunk) == _CHUNK_BYTES or written == body_bytes:
                yield digest(memoryview(chunk))
                file.write(chunk)
                chunk.clear()


def _pieces(
    tensors: Mapping[str, torch.Tensor], offsets: Mapping[str, int], body_bytes: int
) -> Iterator[memoryview]:
    end = 0
    for name, tensor in tensors.items():
        yield memoryview(bytes(offsets[name] - end))
        yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        end = offsets[name] + tensor.nbytes
    yield memoryview(bytes(body_bytes - end))


def _body_start(header_bytes: int) -> int:
    return _up(_PREFIX.size + header_bytes, _HUGE_PAGE_BYTES)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
