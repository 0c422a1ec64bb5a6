"""Autoscaling when the broker goes, and when nothing ends for minutes: real workers (around the stub engine) and servers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from infra.local.layout import Layout
from infra.local.state import read_report
from infra.local.testservers import running_servers
from tests.conftest import Servers, Vhost
from tests.integration.test_autoscaling import Stand, free_port, metric, running_stand
from tests.integration.test_job_path import whole_text

__all__ = ["free_port"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(360)]


class OwnBroker:
    """A RabbitMQ of this test's own, whose supervisor starts it again."""

    def __init__(self, layout: Layout, amqp_url: str) -> None:
        self._layout = layout
        self.amqp_url = amqp_url

    def kill(self) -> None:
        os.kill(self._pid(), signal.SIGKILL)

    def _pid(self) -> int:
        report = read_report(self._layout)
        assert report is not None
        (pid,) = (each.pid for each in report.processes if each.name == "rabbitmq")
        assert pid is not None
        return pid


@pytest.fixture
def broker(tmp_path: Path, servers: Servers) -> Iterator[OwnBroker]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AMQP_")}
    environ |= {"DATABASE_URL": servers.database_url, "REDIS_URL": servers.redis_url}
    layout = Layout(tmp_path / "broker")
    with running_servers(environ, layout) as addresses:
        yield OwnBroker(layout, addresses.amqp_url)


@pytest.fixture
async def stand(tmp_path: Path, broker: OwnBroker, module_database: str) -> AsyncIterator[Stand]:
    async with running_stand(tmp_path, broker.amqp_url, module_database) as running:
        yield running


async def test_the_broker_restarts_in_the_middle_of_a_burst_and_nothing_is_lost_or_cut(
    stand: Stand, broker: OwnBroker, free_port: int
) -> None:
    """Nought to three workers and back; the broker is killed while they work, and comes back by itself."""
    fleet = stand.fleet
    fleet.environment["ROUNDHOUSE_LOST_AFTER_S"] = "3"  # shorter than the silence
    fleet.start_scheduler(OPS_PORT=str(free_port))
    fleet.start_agent()
    resource_id = await stand.resource()
    await fleet.turn_on(resource_id)
    await stand.until_state(resource_id, "asleep")
    await asyncio.wait_for(stand.ask(resource_id, 40), 60)  # what a worker does is known from here on

    asking = [asyncio.create_task(stand.ask(resource_id, 100, 300)) for _ in range(100)]
    asking += [asyncio.create_task(stand.ask(resource_id, 900, 300)) for _ in range(2)]

    async def works() -> bool:
        """A worker that is starting may be ready a moment after the kill: its report is on its way."""
        return await stand.count(resource_id, "ready") >= 2 and not await stand.count(resource_id, "starting")

    await fleet.until(works, "two workers work, and none is starting", 60)
    assert not all(task.done() for task in asking)
    broker.kill()
    # Blind means hold: what runs goes on to run, and nobody is started, drained or called lost for the silence.
    await asyncio.sleep(2)
    before = {(place["place"], place["incarnation"], place["state"]) for place in await fleet.places()}
    held_s = time.monotonic()
    while time.monotonic() - held_s < 4:
        now = {(place["place"], place["incarnation"], place["state"]) for place in await fleet.places()}
        assert now == before
        await asyncio.sleep(0.2)

    began_s = time.monotonic()
    most = len(before)
    while not all(task.done() for task in asking):
        taken = await stand.count(resource_id)
        assert taken <= 3, "more places than the maximum"
        most = max(most, taken)
        assert time.monotonic() - began_s < 200, await fleet.story()
        await asyncio.sleep(0.2)
    results = [task.result() for task in asking]
    assert [(text, end.outcome) for text, _, end in results] == [(whole_text(100), "succeeded")] * 100 + [
        (whole_text(900), "succeeded")
    ] * 2
    assert most == 3 and stand.voids == []
    await stand.until_state(resource_id, "asleep", 90)
    assert fleet.workers() == {}
    assert await metric(free_port, "roundhouse_scheduler_cut_requests_total") == 0


async def test_a_stream_of_two_minutes_without_a_completion_keeps_its_worker(
    tmp_path: Path, vhost: Vhost, module_database: str
) -> None:
    """Idle time-out and windows are seconds; nothing ends, nothing comes, and one stream runs."""
    async with running_stand(tmp_path, vhost.amqp_url, module_database) as stand:
        fleet = stand.fleet
        fleet.environment |= {"STUB_STEP_S": "0.07", "ROUNDHOUSE_LOST_AFTER_S": "30"}
        fleet.start_scheduler()
        fleet.start_agent()
        resource_id = await stand.resource()
        await fleet.turn_on(resource_id)
        began_s = time.monotonic()
        long = asyncio.create_task(stand.ask(resource_id, 1900, 300))
        await fleet.until(lambda: fleet.is_live(resource_id), "woken", 40)
        (place,) = await fleet.places()
        while time.monotonic() - began_s < 120:
            assert not long.done()
            assert [(p["incarnation"], p["state"]) for p in await fleet.places()] == [
                (place["incarnation"], "ready")
            ]
            await asyncio.sleep(1)
        text, _, end = await asyncio.wait_for(long, 90)
        assert (text, end.outcome) == (whole_text(1900), "succeeded")
        await stand.until_state(resource_id, "asleep", 40)
