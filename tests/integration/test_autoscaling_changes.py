"""Scaling settings that change while requests run, on real workers (around the stub engine) and servers."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from services.gateway.owner import Finished
from shared.messages import ScaleResource, ScalingWindow, SetScaling
from tests.integration.test_autoscaling import Stand, free_port, metric, stand
from tests.integration.test_job_path import whole_text

__all__ = ["free_port", "stand"]  # the fixtures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WINDOW = ScalingWindow(
    name="rush", start="* * * * *", duration_minutes=5, time_zone="UTC", min_count=3, max_count=3
)
EVERY_S, JOB_EVERY_S, TOKENS = 4.0, 0.25, 30


def between(least: int, most: int, windows: list[ScalingWindow]) -> dict[str, Any]:
    return {
        "autoscaling": True, "min_count": least, "max_count": most, "idle_timeout_s": 10, "when_asleep": "wake",
        "windows": windows,
    }  # fmt: skip


CHANGES: list[tuple[type[Any], dict[str, Any]]] = [
    (SetScaling, between(1, 3, [])),
    (SetScaling, between(1, 1, [WINDOW])),
    (SetScaling, between(0, 1, [])),
    (ScaleResource, {"fixed_count": 3}),
    (ScaleResource, {"fixed_count": 1}),
    (SetScaling, between(0, 2, [WINDOW])),
    (SetScaling, between(1, 1, [])),
]
"""Up and down by each of the ways that there are; the last one leaves one worker."""


async def test_settings_that_change_all_the_time_under_traffic_lose_and_cut_nothing(
    stand: Stand, free_port: int
) -> None:
    fleet = stand.fleet
    fleet.start_scheduler(OPS_PORT=str(free_port))
    fleet.start_agent()
    resource_id = await stand.resource(1, 3)
    await fleet.turn_on(resource_id)
    await stand.until_state(resource_id, "live")
    long = asyncio.create_task(
        stand.ask(resource_id, 1500)
    )  # some thirty seconds, through most of the changes
    asking: list[asyncio.Task[tuple[str, list[int], Finished]]] = []
    seen: set[int] = set()
    for make, fields in CHANGES:
        result = await fleet.command(make, team_id="team_1", resource_id=resource_id, **fields)
        assert result.ok, result
        until_s = time.monotonic() + EVERY_S
        while time.monotonic() < until_s:
            asking.append(asyncio.create_task(stand.ask(resource_id, TOKENS)))
            seen.add(await stand.count(resource_id))
            await asyncio.sleep(JOB_EVERY_S)

    async def one_is_left() -> bool:
        return await stand.count(resource_id) == 1 == await stand.count(resource_id, "ready")

    results = await asyncio.wait_for(asyncio.gather(*asking), 60)
    assert {(text, end.outcome) for text, _, end in results} == {(whole_text(TOKENS), "succeeded")}
    text, _, end = await asyncio.wait_for(long, 60)
    assert (text, end.outcome) == (whole_text(1500), "succeeded")
    await fleet.until(one_is_left, "the last settings hold", 30)
    assert max(seen) == 3 and len(asking) > len(CHANGES), seen
    assert stand.voids == []
    assert await metric(free_port, "roundhouse_scheduler_cut_requests_total") == 0
