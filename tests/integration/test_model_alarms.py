"""A damaged model: its jobs fail, nothing of it is answered, and an alarm is there to be read by who owns the resource."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from services.scheduler.alarms import AlarmKeeper
from shared import topology
from shared.broker import Broker, Delivery
from shared.database import Database
from shared.messages import Alarm, ModelDamaged
from shared.outcomes import Done, Outcome
from tests.conftest import Vhost
from tests.gateway_harness import Gateway, running_gateway
from tests.integration.test_gateway_management import make_resource, register
from tests.integration.test_job_path import Path_, path, read, whole_text
from tests.integration.test_model_turns import add_model, submit
from tests.integration.test_residency import until

__all__ = ["path"]  # the fixture

ALARM = ModelDamaged(
    event_id="evt_1",
    worker_id="wrk_1",
    resource_id="res_1",
    model_id="mod_1",
    revision=2,
    reason="chunk 3 of 78 differs from what was written",
    found_unix_ms=time.time_ns() // 1_000_000,
)


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(running_gateway(database, vhost.amqp_url, tmp_path))


async def until_shown(gateway: Gateway, url: str, key: str, count: int) -> None:
    async with asyncio.timeout(15):
        while len((await gateway.call("GET", url, key=key)).json["data"]) < count:
            await asyncio.sleep(0.05)


async def test_jobs_of_a_damaged_model_fail_with_an_alarm_and_others_go_on(path: Path_) -> None:
    good, broken = add_model(path.store, "mod_good"), add_model(path.store, "mod_broken")
    (path.store / broken.folder / "model.safetensors").write_bytes(b"xx")
    alarms: list[ModelDamaged] = []

    async def keep(delivery: Delivery) -> Outcome:
        alarms.append(delivery.message)
        return Done()

    consuming = asyncio.create_task(path.broker.consume(topology.ALARMS, Alarm, keep))
    path.worker(step_s=0.002)
    streams = [await submit(path, ref, 5) for ref in (broken, good, broken)]
    ends = [await asyncio.wait_for(read(stream), 30) for stream in streams]
    await until(lambda: alarms)
    consuming.cancel()
    await asyncio.wait({consuming})
    assert [(text, end.outcome, end.error_code) for text, _, end in ends] == [
        ("", "failed", "model_unavailable"),
        (whole_text(5), "succeeded", None),
        ("", "failed", "model_unavailable"),
    ]
    (alarm,) = alarms  # of both jobs one load
    assert (alarm.model_id, alarm.revision, alarm.resource_id) == ("mod_broken", 1, path.resource_id)
    assert alarm.reason == "model.safetensors differs from what was registered"


async def test_an_alarm_is_kept_once_and_shown_to_its_team_alone(
    gateway: Gateway, database: str, vhost: Vhost
) -> None:
    owner, stranger = await gateway.make_team("acme"), await gateway.make_team("other")
    model = await register(gateway, "tiny", key=owner)
    await gateway.make_option(model["model_type"])
    resource = await make_resource(gateway, owner, model["model_type"])
    url = f"/api/resources/{resource['resource_id']}/alarms"
    assert (await gateway.call("GET", url, key=owner)).json == {"data": [], "next_cursor": None}

    alarm = msgspec.structs.replace(ALARM, resource_id=resource["resource_id"])
    async with AsyncExitStack() as stack:
        broker = await Broker.open(vhost.amqp_url, "test", stack)
        tables = await Database.open(database, "roundhouse_scheduler", stack)
        # Sent before anybody listens: it waits.
        await broker.publish_event(alarm)
        await broker.publish_event(alarm)
        await broker.publish_event(
            msgspec.structs.replace(alarm, event_id="evt_2", resource_id="res_of_nobody")
        )
        await broker.publish_event(
            msgspec.structs.replace(alarm, event_id="evt_old", found_unix_ms=1_700_000_000_000)
        )
        await broker.publish_event(
            msgspec.structs.replace(alarm, event_id="evt_3", found_unix_ms=alarm.found_unix_ms + 1000)
        )
        consuming = asyncio.create_task(broker.consume(topology.ALARMS, Alarm, AlarmKeeper(tables).on_alarm))
        try:
            await until_shown(gateway, url, owner, 2)
        finally:
            consuming.cancel()
            await asyncio.wait({consuming})
    reply = await gateway.call("GET", url, key=owner)
    shown = {"model_id": "mod_1", "revision": 2, "worker_id": "wrk_1", "reason": alarm.reason}
    assert [{k: v for k, v in each.items() if k != "found_at"} for each in reply.json["data"]] == [
        shown,
        shown,
    ]
    times = [each["found_at"] for each in reply.json["data"]]
    assert times == sorted(times, reverse=True) and len(set(times)) == 2, "the newest first"
    assert (await gateway.call("GET", url, key=stranger)).status == 404
