"""Has images made of models that have none, one after another, beside serving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Asked:
    """is_loaded: by a load of the model, so that it is made whatever becomes of the model."""

    ref: WeightsRef
    folder: Path
    weight_bytes: int
    is_loaded: bool


class ImageMaker:
    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self._waiting: asyncio.Queue[str] = asyncio.Queue(MOST_WAITING)
        self._asked: dict[str, Asked] = {}

    def ask(self, key: str, asked: Asked) -> None:
        """Idempotent while the image is waited for. What failed is tried again only when it is asked for again."""
        if key in self._asked:
            if asked.is_loaded:
                self._asked[key] = asked
        elif not self._waiting.full():
            self._asked[key] = asked
            self._waiting.put_nowait(key)

    def withdraw_others(self, keys: Collection[str]) -> None:
        """Of models that were asked for in advance only these are still wanted: another one may be deleted."""
        self._asked = {key: each for key, each in self._asked.items() if each.is_loaded or key in keys}

    async def run(self, is_busy: Callable[[], bool]) -> None:
        """Make what is asked for, until cancelled. is_busy: whether the worker has jobs at the moment."""
        while True:
            key = await self._waiting.get()
            if key in self._asked:
                await _quiet(is_busy)
            if (asked := self._asked.get(key)) is None:
                continue
            try:
                await self._store.make(key, asked.folder, asked.weight_bytes)
            except (ImageNotMade, OSError) as error:
                # The model is served from its folder, slower.
                ref = asked.ref
                log.warning("image_not_made", model_id=ref.model_id, revision=ref.revision, reason=str(error))
            finally:
                self._asked.pop(key, None)


async def _quiet(is_busy: Callable[[], bool]) -> None:
    begun_s = busy_s = time.monotonic()
    while time.monotonic() < min(busy_s + QUIET_S, begun_s + BUSY_WAIT_S):
        await asyncio.sleep(_LOOK_S)
        if is_busy():
            busy_s = time.monotonic()
