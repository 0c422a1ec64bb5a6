"""Autoscaling of real workers (around the stub engine), by a real scheduler and node agent, on real jobs."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from loadtest import replay
from services.gateway.owner import Finished, Owner
from shared import topology
from shared.broker import Broker
from shared.messages import DeleteResource, FleetEvent, JobVoided, SetScaling, WorkerReport
from tests.conftest import Vhost
from tests.integration.fleet import Fleet, running_fleet
from tests.integration.test_job_path import read, whole_text
from tests.integration.worker_process import stub_job, stub_store

STEP_S = 0.02
BATCH = 4
"""A worker does 200 tokens/s."""


@dataclass
class Stand:
    fleet: Fleet
    broker: Broker
    owner: Owner
    voids: list[JobVoided]

    async def resource(self, least: int = 0, most: int = 3, **changes: Any) -> str:
        resource_id = await self.fleet.create_resource(1)
        await self.scale(resource_id, least, most, **changes)
        return resource_id

    async def scale(self, resource_id: str, least: int, most: int, idle_timeout_s: int = 10) -> None:
        result = await self.fleet.command(
            SetScaling,
            team_id="team_1",
            resource_id=resource_id,
            autoscaling=True,
            min_count=least,
            max_count=most,
            idle_timeout_s=idle_timeout_s,
            when_asleep="wake",
        )
        assert result.ok, result

    async def ask(
        self, resource_id: str, tokens: int, deadline_s: float = 100
    ) -> tuple[str, list[int], Finished]:
        job = stub_job(self.owner.queue, resource_id, max_tokens=tokens, deadline_s=deadline_s)
        stream = await self.owner.submit(job, topology.job_queue(resource_id, "live"))
        return await read(stream)

    async def count(self, resource_id: str, *states: str) -> int:
        places = await self.fleet.places()
        return sum(p["resource_id"] == resource_id and (not states or p["state"] in states) for p in places)

    async def waiting(self, resource_id: str) -> int:
        """Jobs in its queue that no worker holds."""
        return await self.broker.depth(topology.job_queue(resource_id, "live"))

    async def until_state(self, resource_id: str, state: str, timeout_s: float = 30) -> None:
        async def reached() -> bool:
            return await self.fleet.state(resource_id) == state

        await self.fleet.until(reached, f"the resource is {state}", timeout_s)


@pytest.fixture
async def stand(tmp_path: Path, vhost: Vhost, module_database: str) -> AsyncIterator[Stand]:
    async with running_stand(tmp_path, vhost.amqp_url, module_database) as running:
        yield running


@asynccontextmanager
async def running_stand(tmp_path: Path, amqp_url: str, database_url: str) -> AsyncIterator[Stand]:
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(running_fleet(tmp_path, amqp_url, database_url))
        fleet.environment |= {
            "ROUNDHOUSE_WORKER_COMMAND": json.dumps([sys.executable, "-m", "loadtest.stub_worker"]),
            "ROUNDHOUSE_MODEL_STORE": str(stub_store(tmp_path / "store")),
            "STUB_STEP_S": str(STEP_S),
            # So that a fall is seen within a test; the policy's own times have unit tests.
            "ROUNDHOUSE_SCALE_DOWN_S": "5",
        }
        broker = await Broker.open(amqp_url, "test", stack)
        voids: list[JobVoided] = []

        async def void(fact: JobVoided, headers: dict[str, str]) -> None:
            voids.append(fact)

        owner = Owner(broker, void, lambda result: None)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        await owner.start(group)
        try:
            yield Stand(fleet, broker, owner, voids)
        finally:
            for task in group._tasks.copy():
                task.cancel()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(240)
async def test_what_waits_at_a_busy_worker_goes_to_one_that_has_nothing_to_do(stand: Stand) -> None:
    fleet = stand.fleet
    fleet.start_scheduler()
    fleet.start_agent()
    resource_id = await stand.resource(1, 1)
    await fleet.turn_on(resource_id)
    await stand.until_state(resource_id, "live")
    # After some seconds of short jobs it holds several that it cannot run yet.
    await asyncio.wait_for(asyncio.gather(*(stand.ask(resource_id, 5) for _ in range(160))), 60)
    jobs = [
        stub_job(stand.owner.queue, resource_id, max_tokens=2000, deadline_s=200) for _ in range(2 * BATCH)
    ]
    queue = topology.job_queue(resource_id, "live")
    streams = [await stand.owner.submit(job, queue) for job in jobs]
    reading = [asyncio.create_task(read(stream)) for stream in streams]

    async def is_held() -> bool:
        return await stand.waiting(resource_id) == 0 and begun() >= BATCH

    def begun() -> int:
        return sum(bool(stream.owned.attempt) for stream in streams)

    await fleet.until(is_held, "the worker holds all jobs", 20)
    await asyncio.sleep(0.5)
    assert begun() == BATCH
    await stand.scale(resource_id, 2, 2)

    async def all_begun() -> bool:
        return all(stream.owned.attempt for stream in streams)

    await fleet.until(all_begun, "all jobs have begun", 38)
    assert not any(task.done() for task in reading), "they did not wait for the first ones, which take 40 s"
    results = await asyncio.wait_for(asyncio.gather(*reading), 120)
    assert [text for text, _, _ in results] == [whole_text(2000)] * len(jobs)
    assert stand.voids == []


@pytest.mark.slow
async def test_a_burst_wakes_scales_up_and_all_of_it_is_answered_though_the_scheduler_is_killed(
    stand: Stand,
) -> None:
    fleet = stand.fleet
    scheduler = fleet.start_scheduler()
    fleet.start_agent()
    resource_id = await stand.resource()
    await fleet.turn_on(resource_id)
    await stand.until_state(resource_id, "asleep")
    assert await fleet.places() == []

    # One request wakes it; what its worker then measures is known to the next waking.
    text, _, end = await asyncio.wait_for(stand.ask(resource_id, 40), 40)
    assert (text, end.outcome) == (whole_text(40), "succeeded")

    most, killed = 0, False
    began_s = time.monotonic()
    asking = [asyncio.create_task(stand.ask(resource_id, 100)) for _ in range(120)]
    asking += [asyncio.create_task(stand.ask(resource_id, 900)) for _ in range(2)]
    while not all(task.done() for task in asking):
        taken = await stand.count(resource_id)
        assert taken <= 3, "more places than the maximum"
        most = max(most, taken)
        if not killed and await stand.count(resource_id, "ready") >= 2:
            fleet.kill(scheduler)
            fleet.start_scheduler()
            killed = True
        assert time.monotonic() - began_s < 90
        await asyncio.sleep(0.2)
    results = [task.result() for task in asking]
    assert [(text, end.outcome) for text, _, end in results] == [(whole_text(100), "succeeded")] * 120 + [
        (whole_text(900), "succeeded")
    ] * 2
    assert (most, killed) == (3, True)
    assert stand.voids == []

    await stand.until_state(resource_id, "asleep", 60)
    assert fleet.workers() == {}
    rows = await fleet.database.fetch(
        "SELECT words FROM scheduler.decisions WHERE action = 'scaling' ORDER BY decision_id"
    )
    words = [row["words"] for row in rows]
    assert any("→ 3 wanted" in each for each in words), words
    assert any("→ 0 wanted: nothing to do for" in each for each in words), words
    row = await fleet.database.fetchrow("SELECT * FROM scheduler_api.scaling_v1")
    assert row is not None and row["wanted_count"] == 0

    # All that was decided comes out the same from what was stored with it.
    replayed = replay.replay(await replay.read(fleet.environment["DATABASE_URL"], None, 1000))
    assert (replayed.different, replayed.unreadable) == ([], [])
    assert replayed.same >= len(words) + 6


@pytest.mark.slow
async def test_a_long_stream_alone_keeps_its_worker_and_a_drain_cuts_nothing(stand: Stand) -> None:
    """For longer than window and idle time-out no job ends; then the maximum falls to none under it."""
    fleet = stand.fleet
    fleet.start_scheduler()
    fleet.start_agent()
    resource_id = await stand.resource()
    await fleet.turn_on(resource_id)
    long = asyncio.create_task(stand.ask(resource_id, 1500))
    await fleet.until(lambda: fleet.is_live(resource_id), "woken", 40)
    await asyncio.sleep(17)
    assert not long.done() and await stand.count(resource_id, "ready") == 1
    await stand.scale(resource_id, 0, 0)

    async def drains() -> bool:
        return await stand.count(resource_id, "draining") == 1

    await fleet.until(drains, "the worker drains")
    text, _, end = await asyncio.wait_for(long, 60)
    assert (text, end.outcome) == (whole_text(1500), "succeeded")
    await stand.until_state(resource_id, "asleep")


async def test_off_while_starting_on_while_draining_and_delete_with_jobs_queued(stand: Stand) -> None:
    fleet = stand.fleet
    fleet.start_scheduler()
    resource_id = await stand.resource(1, 3)
    await fleet.turn_on(resource_id)  # there is no agent yet: it cannot start
    await stand.until_state(resource_id, "starting")
    await fleet.turn_off(resource_id)
    await stand.until_state(resource_id, "off")
    assert await fleet.places() == []

    fleet.start_agent()
    await fleet.turn_on(resource_id)
    await fleet.until(lambda: fleet.is_live(resource_id), "live")
    running = asyncio.create_task(stand.ask(resource_id, 400))
    await asyncio.sleep(1)
    await fleet.turn_off(resource_id)
    await stand.until_state(resource_id, "draining")
    await fleet.turn_on(resource_id)
    await fleet.until(lambda: fleet.is_live(resource_id), "live again", 40)
    text, _, end = await asyncio.wait_for(running, 40)
    assert (text, end.outcome) == (whole_text(400), "succeeded")

    await fleet.turn_off(resource_id)
    await stand.until_state(resource_id, "off")
    queued = asyncio.create_task(stand.ask(resource_id, 10))
    await asyncio.sleep(0.5)
    refused = await fleet.command(DeleteResource, team_id="team_2", resource_id=resource_id)
    assert refused.code == "not_found"
    assert (await fleet.command(DeleteResource, team_id="team_1", resource_id=resource_id)).ok
    assert await stand.owner.fail_queued(resource_id, "resource_off", "The resource was turned off.") == 1
    _, _, end = await asyncio.wait_for(queued, 10)
    assert (end.outcome, end.error_code) == ("failed", "resource_off")


async def test_a_draining_worker_that_is_killed_counts_what_it_cut(stand: Stand, free_port: int) -> None:
    fleet = stand.fleet
    fleet.start_scheduler(OPS_PORT=str(free_port))
    fleet.start_agent()
    resource_id = await stand.resource(1, 3)
    await fleet.turn_on(resource_id)
    await fleet.until(lambda: fleet.is_live(resource_id), "live")
    assert await metric(free_port, "roundhouse_scheduler_cut_requests_total") == 0
    ready = (f'roundhouse_resource_id="{resource_id}"', 'state="ready"')

    async def is_counted() -> bool:
        return await metric(free_port, "roundhouse_scheduler_places", *ready) == 1

    await fleet.until(is_counted, "the next look counts it")
    heard: list[FleetEvent] = []
    await stand.broker.subscribe(
        topology.scheduler_events("test"), FleetEvent, lambda d: heard.append(d.message), prefetch=100, no_ack=True
    )  # fmt: skip
    asking = asyncio.create_task(stand.ask(resource_id, 1800))

    async def is_reported() -> bool:
        return any(isinstance(event, WorkerReport) and event.running_jobs == 1 for event in heard)

    await fleet.until(is_reported, "it has begun, and the scheduler was told")
    await asyncio.sleep(0.5)
    await fleet.turn_off(resource_id)

    async def drains() -> bool:
        return await stand.count(resource_id, "draining") == 1

    await fleet.until(drains, "the worker drains")
    ((_, pid),) = fleet.workers().items()
    os.kill(pid, signal.SIGKILL)
    await stand.until_state(resource_id, "off")
    assert await metric(free_port, "roundhouse_scheduler_cut_requests_total") == 1
    rows = await fleet.database.fetch("SELECT words FROM scheduler.decisions WHERE action = 'free'")
    assert "1 requests that it was finishing were cut" in rows[0]["words"]
    # Nothing is lost even so: turned on again, another worker goes on where the first was stopped.
    await fleet.turn_on(resource_id)
    text, _, end = await asyncio.wait_for(asking, 90)
    assert (text, end.outcome) == (whole_text(1800), "succeeded")


async def metric(ops_port: int, name: str, *labels: str) -> float:
    """The first number of that name that has all these labels, among others."""
    url = f"http://127.0.0.1:{ops_port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as reply:
        page = await reply.text()
    found = [
        line for line in page.splitlines() if line.startswith(name) and all(label in line for label in labels)
    ]
    return float(found[0].rpartition(" ")[2]) if found else math.nan
