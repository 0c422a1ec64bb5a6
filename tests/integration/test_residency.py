"""Which models are where, as seen: by a worker's reports, in the scheduler's table, and over the management API."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from services.scheduler.actions import FreePlace, GrantPlace
from services.scheduler.residency_keeper import ResidencyKeeper
from services.scheduler.states import PlaceState
from shared import topology
from shared.ids import new_id
from shared.lease import Fenced
from shared.messages import FleetEvent, JobUsage, ModelHistory, ResidentModel, WorkerReport
from tests.conftest import Vhost
from tests.gateway_harness import Gateway, running_gateway
from tests.integration.test_autoscaling import free_port
from tests.integration.test_gateway_management import make_resource, register
from tests.integration.test_job_path import Path_, path, read, whole_text
from tests.integration.test_model_turns import add_model, submit
from tests.integration.test_scheduler_store import Tables, tables, take_over
from tests.integration.worker_process import MODEL

__all__ = ["free_port", "path", "tables"]  # the fixtures


# ---- the worker's reports


@asynccontextmanager
async def reports_of(path: Path_) -> AsyncIterator[list[WorkerReport]]:
    heard: list[WorkerReport] = []
    subscription = await path.broker.subscribe(
        topology.scheduler_events(new_id("test")),
        FleetEvent,
        lambda delivery: heard.append(delivery.message),
        prefetch=100,
        no_ack=True,
    )
    yield heard
    await subscription.cancel()


async def until(condition: Any, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "not in time"
        await asyncio.sleep(0.05)


def history_of(report: WorkerReport, model_id: str) -> ModelHistory | None:
    return next((each for each in report.history if each.model_id == model_id), None)


async def test_a_worker_reports_swaps_hits_misses_and_why_a_model_failed(path: Path_) -> None:
    first, second, broken = (add_model(path.store, f"mod_{name}") for name in ("first", "second", "broken"))
    (path.store / broken.folder / "model.safetensors").write_bytes(b"xx")
    async with reports_of(path) as heard:
        path.worker(step_s=0.002, environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "4"})
        for ref in (first, first, second, first, broken):
            stream = await submit(path, ref, 3)
            await asyncio.wait_for(read(stream), 30)
        await until(lambda: heard and history_of(heard[-1], "mod_broken"))
    last = heard[-1]
    states = {model.model_id: (model.state, model.weight_bytes) for model in last.models}
    assert states["mod_first"] == ("ready", 1)
    assert states["mod_broken"][0] == "failed"
    (failed,) = [model for model in last.models if model.state == "failed"]
    assert failed.reason == "model.safetensors differs from what was registered"
    one, two = history_of(last, "mod_first"), history_of(last, "mod_second")
    assert one is not None and two is not None
    assert (one.hits, one.misses, one.loads) == (2, 1, 1)
    assert (two.hits, two.misses, two.loads) == (0, 1, 1)
    assert 0 <= one.load_ms_p50 <= one.load_ms_p95 < 30_000


async def test_a_start_is_seen_in_its_phases_and_the_first_model_is_warm_before_it_is_ready(
    path: Path_, free_port: int
) -> None:
    async with reports_of(path) as heard:
        path.worker(step_s=0.4, preload=[MODEL], environment={"OPS_PORT": str(free_port)})
        await until(lambda: heard and heard[-1].phase == "ready")
        phases = list(dict.fromkeys(report.phase for report in heard))
        assert phases[-2:] == ["warming", "ready"] and set(phases[:-2]) <= {"starting", "loading"}, phases
        warm = next(report for report in heard if report.phase == "warming")
        assert [(model.model_id, model.state) for model in warm.models] == [(MODEL.model_id, "ready")]
        # Nobody asked for what it generated meanwhile.
        assert (heard[-1].completion_tokens, heard[-1].left_jobs, heard[-1].stream_s) == (0, 0, 0)
        stream = await path.submit(3)
        await asyncio.wait_for(read(stream), 30)
        await until(lambda: heard[-1].left_jobs == 1)
    url = f"http://127.0.0.1:{free_port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as reply:
        page = await reply.text()
    resource = f'roundhouse_resource_id="{path.resource_id}"'
    found = {
        line.partition("{")[0]: float(line.rpartition(" ")[2])
        for line in page.splitlines()
        if resource in line
    }
    assert found["roundhouse_queue_wait_seconds_count"] == 1
    assert "roundhouse_swap_duration_seconds_count" not in found, "the model was there"
    assert 0.4 <= found["roundhouse_worker_busy_seconds_total"] < 5


async def test_a_hot_model_gets_a_second_copy_on_the_idle_worker(path: Path_) -> None:
    """Memory for one model each: the model with more work than a worker can do takes both, but for the other's turn."""
    hot, cold = add_model(path.store, "mod_hot"), add_model(path.store, "mod_cold")
    async with reports_of(path) as heard:
        workers = [
            path.worker(step_s=0.02, max_batch=4, environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "1"})
            for _ in range(2)
        ]
        ids = {worker.spec.worker_id for worker in workers}
        await until(lambda: {report.worker_id for report in heard if report.phase == "ready"} == ids)
        first = await submit(path, hot, 100)
        reads = [asyncio.create_task(read(first))]
        await until(lambda: any(model.state == "ready" for report in heard[-2:] for model in report.models))
        copies = {
            report.worker_id for report in heard for model in report.models if model.model_id == "mod_hot"
        }
        assert len(copies) == 1
        reads += [asyncio.create_task(read(await submit(path, hot, 100))) for _ in range(40)]
        reads.append(asyncio.create_task(read(await submit(path, cold, 5))))
        results = await asyncio.wait_for(asyncio.gather(*reads), 60)
        assert [text for text, _, _ in results] == [whole_text(100), *[whole_text(100)] * 40, whole_text(5)]
    copies = {report.worker_id for report in heard for model in report.models if model.model_id == "mod_hot"}
    assert copies == ids
    facts = [fact for fact in await path.usage_events(42) if isinstance(fact, JobUsage)]
    done = Counter(fact.worker_id for fact in facts if fact.model_id == "mod_hot")
    assert min(done[worker_id] for worker_id in ids) >= 12, done


# ---- the scheduler's table


def said(incarnation: str, *models: ResidentModel, history: tuple[ModelHistory, ...] = ()) -> Any:
    report = WorkerReport(
        worker_id="w", resource_id="r", place=0, incarnation=incarnation, phase="ready", sent_unix_ms=0,
        models=list(models), history=list(history),
    )  # fmt: skip
    return {incarnation: (report, 0.0)}


def ready(model_id: str) -> ResidentModel:
    return ResidentModel(model_id=model_id, revision=1, state="ready", weight_bytes=5)


async def rows(tables: Tables) -> list[tuple[Any, ...]]:
    found = await tables.database.fetch(
        "SELECT model_id, state, weight_bytes, loads, hits FROM scheduler_api.worker_models_v1 ORDER BY model_id"
    )
    return [tuple(row) for row in found]


async def test_rows_follow_the_reports_and_go_with_the_place(tables: Tables) -> None:
    await tables.live()
    stored = await tables.store.load()
    (place,) = stored.places
    keeper = ResidencyKeeper(tables.database, tables.lease)
    counts = ModelHistory(model_id="mod_a", revision=1, loads=2, load_ms_p50=3, load_ms_p95=4, hits=5)
    await keeper.keep(stored, said(place.incarnation, ready("mod_a"), ready("mod_b"), history=(counts,)))
    assert await rows(tables) == [("mod_a", "ready", 5, 2, 5), ("mod_b", "ready", 5, 0, 0)]
    await keeper.keep(stored, said(place.incarnation, ready("mod_b")))
    assert await rows(tables) == [("mod_a", "absent", 5, 2, 5), ("mod_b", "ready", 5, 0, 0)]
    await keeper.keep(stored, said("inc_of_nobody", ready("mod_c")))
    assert len(await rows(tables)) == 2, "a worker without a place has no rows"

    await tables.apply(FreePlace(0, place.incarnation, None, False, "gone"))
    assert await rows(tables) == []
    await keeper.keep(stored, said(place.incarnation, ready("mod_c")))
    assert await rows(tables) == [], "a late report of a place that is free writes nothing"


async def test_the_next_leader_goes_on_from_the_table_and_the_old_one_writes_nothing(tables: Tables) -> None:
    await tables.live()
    stored = await tables.store.load()
    (place,) = stored.places
    assert place.state == PlaceState.READY
    counts = ModelHistory(model_id="mod_a", revision=1, loads=2, hits=5)
    old = ResidencyKeeper(tables.database, tables.lease)
    await old.keep(stored, said(place.incarnation, ready("mod_a"), history=(counts,)))
    other = await take_over(tables)
    new = ResidencyKeeper(tables.database, other)
    await new.keep(stored, said(place.incarnation, ready("mod_b")))
    expected = [("mod_a", "absent", 5, 2, 5), ("mod_b", "ready", 5, 0, 0)]
    assert await rows(tables) == expected
    with pytest.raises(Fenced):
        await old.keep(stored, said(place.incarnation, ready("mod_c")))
    assert await rows(tables) == expected


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(ready("mod\x00a"), id="a name that no column takes"),
        pytest.param(
            ResidentModel(model_id="mod_a", revision=1 << 40, state="ready"), id="a number too large"
        ),
    ],
)
async def test_what_one_worker_says_that_no_column_takes_hides_no_others_models(
    tables: Tables, broken: ResidentModel
) -> None:
    await tables.live(count=2)
    await tables.apply(GrantPlace(1, "n1", "cpu:1", 1, "words"))
    stored = await tables.store.load()
    first, second = stored.places
    keeper = ResidencyKeeper(tables.database, tables.lease)
    await keeper.keep(stored, said(first.incarnation, broken) | said(second.incarnation, ready("mod_b")))
    assert await rows(tables) == [("mod_b", "ready", 5, 0, 0)]
    await keeper.keep(stored, said(first.incarnation, ready("mod_a")))
    assert await rows(tables) == [("mod_a", "ready", 5, 0, 0), ("mod_b", "ready", 5, 0, 0)]


# ---- the management API


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(running_gateway(database, vhost.amqp_url, tmp_path))


async def add_place(gateway: Gateway, resource_id: str, place: int) -> str:
    incarnation = new_id("inc")
    await gateway.sql.execute(
        """INSERT INTO scheduler.lease VALUES ('leader', 'test', 1, now() + interval '1 hour') ON CONFLICT DO NOTHING"""
    )
    await gateway.sql.execute(
        """INSERT INTO scheduler.places (resource_id, place, state, incarnation, worker_id, node_id, device, epoch)
           VALUES ($1, $2, 'starting', $3, $4, 'n', 'cpu:0', (SELECT epoch FROM scheduler.lease))""",
        resource_id,
        place,
        incarnation,
        f"wrk_{place}",
    )
    return incarnation


async def test_the_models_of_a_resource_are_shown_on_each_worker(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key=key)
    await register(gateway, "other", key=key)
    rival = await gateway.make_team("rival")
    await register(gateway, "theirs", key=rival)
    await gateway.make_option(model["model_type"])
    resource = await make_resource(gateway, key, model["model_type"])
    path = f"/api/resources/{resource['resource_id']}"
    await gateway.call("PATCH", path, {"gpus": 2}, key=key)
    await gateway.call("POST", f"{path}/on", key=key)

    listed = (await gateway.call("GET", f"{path}/models", key=key)).json
    assert sorted(each["name"] for each in listed["data"]) == ["acme/other", "acme/tiny"]
    assert [each["workers"] for each in listed["data"]] == [[], []]

    first, _ = [await add_place(gateway, resource["resource_id"], place) for place in range(2)]
    write = "INSERT INTO scheduler.worker_models VALUES ($1, $2, $3, $4, $5, 9, $6, 40, 50, 7, 2)"
    await gateway.sql.execute(write, first, model["model_id"], 1, "failed", "no such file", 3)
    await gateway.sql.execute(write, first, model["model_id"], 2, "ready", "", 0)
    await gateway.sql.execute(write, first, model["model_id"], 3, "absent", "", 1)
    listed = (await gateway.call("GET", f"{path}/models", key=key)).json
    (shown,) = [each for each in listed["data"] if each["name"] == "acme/tiny"]
    shown["workers"] = [{k: v for k, v in each.items() if k != "changed_at"} for each in shown["workers"]]
    known = {
        "place": 0, "worker_id": "wrk_0", "place_state": "starting", "revision": 1, "state": "failed",
        "reason": "no such file", "pinned": False, "preload": False, "weight_bytes": 9, "swaps": 3, "swap_ms_p50": 40, "swap_ms_p95": 50, "hits": 7,
        "misses": 2,
    }  # fmt: skip
    nothing = {
        "weight_bytes": 0,
        "swaps": 0,
        "swap_ms_p50": None,
        "swap_ms_p95": None,
        "hits": 0,
        "misses": 0,
    }
    assert shown["workers"] == [
        known,
        known | {"revision": 2, "state": "ready", "reason": "", "swaps": 0, "swap_ms_p50": None, "swap_ms_p95": None},
        known | nothing | {"place": 1, "worker_id": "wrk_1", "state": "absent", "reason": ""},
    ]  # fmt: skip

    page = (await gateway.call("GET", f"{path}/models?limit=1", key=key)).json
    rest = (await gateway.call("GET", f"{path}/models?cursor={page['next_cursor']}", key=key)).json
    assert [each["name"] for each in page["data"] + rest["data"]] == [each["name"] for each in listed["data"]]
    assert rest["next_cursor"] is None
    assert (await gateway.call("GET", f"{path}/models", key=rival)).status == 404


async def test_a_model_is_pinned_unpinned_and_preloaded(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key=key)
    rival = await gateway.make_team("rival")
    theirs = await register(gateway, "theirs", key=rival)
    await gateway.make_option(model["model_type"])
    resource = await make_resource(gateway, key, model["model_type"])
    models = f"/api/resources/{resource['resource_id']}/models"
    path = f"{models}/{model['model_id']}"

    reply = await gateway.call("PUT", f"{path}/pin", {"copies": 1}, key=key)
    assert (reply.status, reply.json["pin"]["copies"]) == (200, 1)
    reply = await gateway.call("PUT", f"{path}/pin", {"copies": "all"}, key=key)
    assert (reply.status, reply.json["pin"]["copies"]) == (200, "all")
    (listed,) = (await gateway.call("GET", models, key=key)).json["data"]
    assert listed == reply.json
    reply = await gateway.call("PUT", f"{path}/pin", {"copies": 2}, key=key)
    assert (reply.status, reply.code) == (400, "too_many_copies")
    for body, param in (({"copies": 0}, "copies"), ({"copies": "some"}, "copies"), ({"copies": 65}, "copies"),
                        ({"copies": None}, "copies"), ({"count": 1}, "count")):  # fmt: skip
        reply = await gateway.call("PUT", f"{path}/pin", body, key=key)
        assert (reply.status, reply.json["param"]) == (400, param), body
    assert (await gateway.call("GET", models, key=key)).json["data"] == [listed]

    assert (await gateway.call("DELETE", f"{path}/pin", key=key)).status == 204
    assert (await gateway.call("DELETE", f"{path}/pin", key=key)).status == 204
    reply = await gateway.call("POST", f"{path}/preload", key=key)
    assert (reply.status, reply.json["pin"]) == (202, None)
    sent = [type(command).__name__ for command in gateway.commands if hasattr(command, "model_id")]
    assert sent == ["PinModel", "PinModel", "PinModel", "UnpinModel", "UnpinModel", "PreloadModel"]

    foreign = f"{models}/{theirs['model_id']}"
    for method, route in (("PUT", "pin"), ("DELETE", "pin"), ("POST", "preload")):
        sent_body: Any = {"copies": 1} if method == "PUT" else None
        assert (await gateway.call(method, f"{foreign}/{route}", sent_body, key=key)).status == 404
        assert (await gateway.call(method, f"{path}/{route}", sent_body, key=rival)).status == 404
    assert len([command for command in gateway.commands if hasattr(command, "model_id")]) == 6


async def test_a_shared_pool_shows_the_models_of_all_teams_to_the_platform(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key=key)
    await gateway.make_option(model["model_type"])
    body = {"name": "pool", "model_type": model["model_type"], "option": "bf16", "pool": True}
    pool = (await gateway.call("POST", "/api/resources", body)).json
    listed = (await gateway.call("GET", f"/api/resources/{pool['resource_id']}/models")).json
    assert [each["name"] for each in listed["data"]] == ["acme/tiny"]
    assert (await gateway.call("GET", f"/api/resources/{pool['resource_id']}/models", key=key)).status == 404
