"""Images wait for a moment without work, but not for ever, and not of models that are gone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from services.worker import image_maker
from services.worker.image_maker import Asked, ImageMaker
from services.worker.image_store import ImageStore
from shared.messages import ModelRef

REF = ModelRef(model_id="mod_1", revision=1, name="t/m", folder="mod_1/1", signature="0" * 16)
IN_ADVANCE = Asked(REF, Path("x"), 1, is_loaded=False)
LOADED = replace(IN_ADVANCE, is_loaded=True)


class Store:
    def __init__(self) -> None:
        self.made: asyncio.Queue[str] = asyncio.Queue()

    async def make(self, key: str, *_of: Any) -> None:
        self.made.put_nowait(key)


@pytest.mark.parametrize("ends", [True, False], ids=["the work ends", "it never ends"])
async def test_an_image_waits_while_there_is_work(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    monkeypatch.setattr(image_maker, "_LOOK_S", 0.001)
    monkeypatch.setattr(image_maker, "QUIET_S", 0.5)
    monkeypatch.setattr(image_maker, "BUSY_WAIT_S", 60.0 if ends else 1.0)
    store, is_busy = Store(), True
    maker = ImageMaker(cast(ImageStore, store))
    maker.ask("k", IN_ADVANCE)
    running = asyncio.create_task(maker.run(lambda: is_busy))
    await asyncio.sleep(0.02)
    assert store.made.empty()
    is_busy = not ends
    assert await asyncio.wait_for(store.made.get(), 10) == "k"
    running.cancel()


async def test_what_nobody_may_ask_for_any_more_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it waits for its turn, or for a moment without work; and asked for again it is made, once."""
    monkeypatch.setattr(image_maker, "_LOOK_S", 0.001)
    monkeypatch.setattr(image_maker, "QUIET_S", 0.05)
    store, is_busy = Store(), True
    maker = ImageMaker(cast(ImageStore, store))
    for key, asked in (
        ("next", IN_ADVANCE),
        ("gone", IN_ADVANCE),
        ("loaded", LOADED),
        ("loaded later", IN_ADVANCE),
        ("back", IN_ADVANCE),
        ("kept", IN_ADVANCE),
    ):
        maker.ask(key, asked)
    running = asyncio.create_task(maker.run(lambda: is_busy))
    await asyncio.sleep(0.02)
    maker.ask("loaded later", LOADED)
    maker.withdraw_others({"kept"})
    maker.ask("back", IN_ADVANCE)
    is_busy = False
    made = [await asyncio.wait_for(store.made.get(), 10) for _ in range(4)]
    await asyncio.sleep(0.2)
    assert (made, store.made.qsize()) == (["loaded", "loaded later", "back", "kept"], 0)
    running.cancel()
