"""A host's folder of model images: made by a child process, shared by all workers of the host, bounded.

`<key>.image` is an image, and its key begins with the model's id and revision. Whoever uses one holds a shared lock on it,
so that no other process removes it meanwhile. One image is made at a time on a host, by whoever holds `make.lock`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from services.worker.engine import EngineConfig
from services.worker.engine.images.model_image import image_key
from services.worker.image_choice import StoredImage, choose_removals
from services.worker.model_files import content_id
from shared.messages import WeightsRef

log = structlog.get_logger()

_SUFFIX = ".image"
_PART_PREFIX = ".image-"
_STALE_PART_S = 3600.0
_PROJECT_ROOT = Path(__file__).resolve().parents[2]
_LOCK_POLL_S = 0.5
_MAKE_TIMEOUT_S = 120.0
_MAKE_BYTES_PER_S = 20e6
"""Beside busy neighbours and from a slow disk: large models get more time."""
_KEPT_OUTPUT_BYTES = 2000


class ImageNotMade(Exception):
    """The model has no image and is loaded from its folder; the message says why."""


@dataclass(frozen=True, slots=True)
class HeldImage:
    """An image that nobody removes until `close`."""

    path: Path
    key: str
    descriptor: int

    def close(self) -> None:
        os.close(self.descriptor)


class ImageStore:
    def __init__(self, folder: Path, limit_bytes: int, config: EngineConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._limit_bytes, self._config = folder, limit_bytes, config

    def key(self, ref: WeightsRef, model_folder: Path) -> str:
        """Names the revision's image under this config, and says whose it is. Raises `ModelUnavailable`."""
        return f"{ref.model_id}-{ref.revision}-{image_key(content_id(ref, model_folder), self._config)}"

    def has(self, key: str) -> bool:
        return self._path(key).exists()

    def hold(self, key: str) -> HeldImage | None:
        """The image, noted as used now; None when there is none."""
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(
            FileNotFoundError
        ):  # removed before the lock was ours: it can be read all the same
            os.utime(path)
        # From the disk into the page cache, beside whatever comes first.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        return HeldImage(path, key, descriptor)

    def discard(self, key: str) -> None:
        """Of an image that is damaged; who has it mapped keeps what it has."""
        self._path(key).unlink(missing_ok=True)

    async def make(self, key: str, model_folder: Path, weight_bytes: int) -> None:
        """Have the image made by a child process of low priority, unless it is there. Raises `ImageNotMade`."""
        async with self._making():
            if self.has(key):
                return
            self._make_room(weight_bytes)
            await self._run_child(key, model_folder, weight_bytes)
        log.info("image_made", key=key)

    def _make_room(self, coming_bytes: int) -> None:
        _remove_stale_parts(self._folder)
        removals = choose_removals(self._stored(), coming_bytes, self._limit_bytes)
        if removals is None:
            raise ImageNotMade(f"{coming_bytes} bytes do not fit beside the images that are in use")
        for key in removals:
            self._path(key).unlink(missing_ok=True)
            log.info("image_removed", key=key)

    def _stored(self) -> list[StoredImage]:
        found = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append(StoredImage(path.stem, stat.st_size, stat.st_mtime, _is_held(path)))
        return found

    async def _run_child(self, key: str, model_folder: Path, weight_bytes: int) -> None:
        request = {
            "folder": str(model_folder),
            "path": str(self._path(key)),
            "key": key,
            "config": asdict(self._config),
        }
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.worker.make_image",
            json.dumps(request),
            cwd=_PROJECT_ROOT,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "OMP_NUM_THREADS": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_MAKE_TIMEOUT_S + weight_bytes / _MAKE_BYTES_PER_S):
                _, errors = await child.communicate()
        except TimeoutError as error:
            raise ImageNotMade("it took too long") from error
        finally:
            if child.returncode is None:
                child.kill()
                await asyncio.shield(child.wait())
        if child.returncode != 0:
            said = errors[-_KEPT_OUTPUT_BYTES:].decode(errors="replace").strip()
            raise ImageNotMade(said or f"the child ended with {_exit(child.returncode)}")

    @contextlib.asynccontextmanager
    async def _making(self) -> AsyncIterator[None]:
        """One image at a time on this host: each takes a processor and twice the model's memory."""
        descriptor = os.open(self._folder / "make.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not _try_lock(descriptor):  # noqa: ASYNC110 - it is another process that lets go of it
                await asyncio.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale_parts(folder: Path) -> None:
    """Of children that were killed."""
    for part in folder.glob(f"{_PART_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > _STALE_PART_S:
                part.unlink()


def _exit(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
