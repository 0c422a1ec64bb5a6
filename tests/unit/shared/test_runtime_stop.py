"""A service stops though a task of it has lost its cancellation."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from shared import runtime


async def test_a_task_that_lost_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "CANCEL_AGAIN_S", 0.05)
    ended: list[str] = []

    async def loses_the_first() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.append("lost")
        await asyncio.sleep(3600)

    async def ends() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("ended")

    with capture_logs() as logs:
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            tasks = [group.create_task(loses_the_first()), group.create_task(ends())]
            await asyncio.sleep(0)
            await runtime._cancel_all(group)
    assert sorted(ended) == ["ended", "lost"] and all(task.cancelled() for task in tasks)
    assert [entry["event"] for entry in logs] == ["tasks_cancelled_again"]
    assert "loses_the_first" in logs[0]["tasks"][0]
