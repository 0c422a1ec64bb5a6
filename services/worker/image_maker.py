"""Has images made of models that have none, one after another, beside serving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from services.worker.image_store import ImageNotMade, ImageStore
from shared.messages import WeightsRef

log = structlog.get_logger()

MOST_WAITING = 1000
"""More models than that of one type get their images when they are next loaded."""
QUIET_S = 1.0
BUSY_WAIT_S = 20.0
"""Each image waits until there was no work for the one, or for the other in all: even a child of low priority takes memory's
speed from answers, and who starts again after a crash has those of a whole queue to give.
"""
_LOOK_S = 0.25


class ImageMaker:
    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self._waiting: asyncio.Queue[tuple[str, WeightsRef, Path, int]] = asyncio.Queue(MOST_WAITING)
        self._asked: set[str] = set()

    def ask(self, key: str, ref: WeightsRef, folder: Path, weight_bytes: int) -> None:
        """Idempotent while the image is waited for. What failed is tried again only when it is asked for again."""
        if key in self._asked or self._waiting.full():
            return
        self._asked.add(key)
        self._waiting.put_nowait((key, ref, folder, weight_bytes))

    async def run(self, is_busy: Callable[[], bool]) -> None:
        """Make what is asked for, until cancelled. is_busy: whether the worker has jobs at the moment."""
        while True:
            key, ref, folder, weight_bytes = await self._waiting.get()
            try:
                await _quiet(is_busy)
                await self._store.make(key, folder, weight_bytes)
            except (ImageNotMade, OSError) as error:
                # The model is served from its folder, slower.
                log.warning("image_not_made", model_id=ref.model_id, revision=ref.revision, reason=str(error))
            finally:
                self._asked.discard(key)


async def _quiet(is_busy: Callable[[], bool]) -> None:
    begun_s = busy_s = time.monotonic()
    while time.monotonic() < min(busy_s + QUIET_S, begun_s + BUSY_WAIT_S):
        await asyncio.sleep(_LOOK_S)
        if is_busy():
            busy_s = time.monotonic()
