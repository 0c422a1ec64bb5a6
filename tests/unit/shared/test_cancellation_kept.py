"""A library that loses a cancellation does not keep its caller alive."""

from __future__ import annotations

import asyncio

import pytest

from shared.broker import cancellation_kept, in_time
from shared.outcomes import Unavailable


async def lose(ends_with: Exception | None, log: list[str]) -> None:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError as error:
        log.append("lost")
        if ends_with is not None:
            raise ends_with from error


@pytest.mark.parametrize("ends_with", [None, ConnectionError("lost"), ValueError("other")])
async def test_a_lost_cancellation_is_found(ends_with: Exception | None) -> None:
    log: list[str] = []

    async def try_again() -> None:
        for _ in range(3):
            try:
                async with in_time("x"):
                    await lose(ends_with, log)
            except (Unavailable, ValueError):
                log.append("again")

    task = asyncio.create_task(try_again())
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait({task})
    assert task.cancelled() and log == ["lost"]


async def test_what_was_cancelled_before_may_still_be_cleaned_up() -> None:
    """The finally of a cancelled task runs as ever, and its errors are its own."""
    said: list[str] = []

    async def clean_up() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            with cancellation_kept():
                await asyncio.sleep(0)
            said.append("done")
            try:
                async with in_time("x"):
                    raise ConnectionError
            except Unavailable:
                said.append("unavailable")

    task = asyncio.create_task(clean_up())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() and said == ["done", "unavailable"]


async def test_a_time_that_is_over_is_no_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.broker.PUBLISH_TIMEOUT_S", 0.01)
    log: list[str] = []
    with pytest.raises(Unavailable):
        async with in_time("x"):
            await asyncio.sleep(60)
    with pytest.raises(Unavailable):
        async with in_time("x"):
            await lose(ConnectionError("lost"), log)
    async with in_time("x"):
        await lose(None, log)
    assert log == ["lost", "lost"]


async def test_an_outer_limit_is_kept() -> None:
    log: list[str] = []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), in_time("x"):
            await lose(ConnectionError("lost"), log)
    assert log == ["lost"]
