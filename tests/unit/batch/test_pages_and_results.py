"""What the dispatcher holds of a batch: lines that are read ahead, and how fast they end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from services.batch import results
from services.batch.line_texts import LineTexts
from services.batch.pages import Pages
from services.batch.preparation import Preparer
from services.batch.records import Batch, Ended, LineRef
from services.batch.results import Results
from services.batch.store import Store
from shared.inference.principal import ModelView, Route


class Rows:
    """A store that answers when the test says so."""

    def __init__(self) -> None:
        self.asked, self.answers = asyncio.Event(), asyncio.Event()

    async def waiting_lines(self, *_: Any) -> Sequence[LineRef]:
        self.asked.set()
        await self.answers.wait()
        return []

    async def end(self, *_: Any) -> None: ...


@pytest.mark.parametrize("comes", ["nothing", "lines", "a restart"])
async def test_a_page_that_is_found_empty_says_nothing_of_lines_that_came_meanwhile(comes: str) -> None:
    rows = Rows()
    pages = Pages(
        cast(Batch, _Named()),
        cast(ModelView, None),
        cast(Store, rows),
        cast(LineTexts, None),
        cast(Preparer, None),
    )
    pages.move(cast(Route, _Named()))
    loading = asyncio.create_task(pages.load())
    await rows.asked.wait()
    if comes == "lines":
        pages.more()
    elif comes == "a restart":
        pages.restart()
    rows.answers.set()
    assert await loading == []
    assert pages.exhausted is (comes == "nothing")


class _Named:
    batch_id = "batch_1"


async def test_of_batches_that_are_over_no_rates_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Results(cast(Store, Rows()))
    for number in range(50):
        kept.add(cast(Ended, _Ended(f"batch_{number}")))
        await kept.flush()
    assert len(kept._written) == 50
    monkeypatch.setattr(results, "RATE_WINDOW_S", -1.0)
    kept.add(cast(Ended, _Ended("batch_last")))
    await kept.flush()
    assert list(kept._written) == ["batch_last"]


class _Ended:
    response = b""
    prompt_tokens = completion_tokens = 1

    def __init__(self, batch_id: str) -> None:
        self.batch_id = batch_id
