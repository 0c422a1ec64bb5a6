"""Images wait for a moment without work, but not for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from services.worker import image_maker
from services.worker.image_maker import ImageMaker
from services.worker.image_store import ImageStore
from shared.messages import ModelRef


class Store:
    def __init__(self) -> None:
        self.made = asyncio.Event()

    async def make(self, *_of: Any) -> None:
        self.made.set()


@pytest.mark.parametrize("ends", [True, False], ids=["the work ends", "it never ends"])
async def test_an_image_waits_while_there_is_work(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    monkeypatch.setattr(image_maker, "_LOOK_S", 0.001)
    monkeypatch.setattr(image_maker, "QUIET_S", 0.5)
    monkeypatch.setattr(image_maker, "BUSY_WAIT_S", 60.0 if ends else 1.0)
    store, is_busy = Store(), True
    maker = ImageMaker(cast(ImageStore, store))
    ref = ModelRef(model_id="mod_1", revision=1, name="t/m", folder="mod_1/1", signature="0" * 16)
    maker.ask("k", ref, Path("x"), 1)
    running = asyncio.create_task(maker.run(lambda: is_busy))
    await asyncio.sleep(0.02)
    assert not store.made.is_set()
    is_busy = not ends
    await asyncio.wait_for(store.made.wait(), 10)
    running.cancel()
