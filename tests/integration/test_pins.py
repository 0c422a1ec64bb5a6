"""Pins and preloads, from the command to the worker's memory: each part for itself, then all of them as processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from services.scheduler.pin_keeper import TELL_AGAIN_S, PinKeeper, pin_set
from services.scheduler.residency_keeper import ResidencyKeeper
from shared import topology
from shared.messages import (
    CommandResult,
    DeleteResource,
    ModelRef,
    PinModel,
    PreloadAsked,
    PreloadModel,
    ResidentModel,
    ScaleResource,
    SetPins,
    SetScaling,
    TurnOnResource,
    UnpinModel,
    WorkerReport,
)
from tests.conftest import Vhost
from tests.integration.fleet import Fleet, running_fleet
from tests.integration.test_job_path import Path_, path, read
from tests.integration.test_model_turns import add_model, submit
from tests.integration.test_residency import reports_of, until
from tests.integration.test_scheduler_store import Tables, tables
from tests.integration.worker_process import WorkerProcess, stub_store

__all__ = ["path", "tables"]  # the fixtures

MEMORY = "4"
"""Bytes: a stub model counts 2 until it is loaded, then 1."""


# ---- the worker


async def tell(
    path: Path_, worker: WorkerProcess, *pinned: ModelRef, preload: tuple[PreloadAsked, ...] = ()
) -> str:
    pins = pin_set(list(pinned), list(preload))
    message = SetPins(worker_id=worker.spec.worker_id, incarnation=worker.spec.incarnation, pins=pins)
    await path.broker.send(topology.worker_commands(worker.spec.worker_id), message)
    return pins.version


def ready(report: WorkerReport) -> set[str]:
    return {model.model_id for model in report.models if model.state == "ready"}


async def test_a_pinned_model_comes_unasked_and_stays_while_others_take_turns(path: Path_) -> None:
    refs = [add_model(path.store, f"mod_{index}") for index in range(5)]
    async with reports_of(path) as heard:
        worker = path.worker(step_s=0.002, environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "3"})
        await until(lambda: heard and heard[-1].phase == "ready")
        assert (heard[-1].model_memory_bytes, heard[-1].pins_version, heard[-1].pinned) == (3, "", [])
        version = await tell(path, worker, refs[0])
        await until(lambda: ready(heard[-1]) == {"mod_0"})
        assert (heard[-1].pins_version, heard[-1].pinned) == (version, [("mod_0", 1)])
        for ref in refs[1:] + refs[1:]:
            text, _, end = await asyncio.wait_for(read(await submit(path, ref, 3)), 30)
            assert (len(text.split()), end.outcome) == (3, "succeeded")
        assert all(
            "mod_0" in ready(report)
            for report in heard[heard.index(next(r for r in heard if "mod_0" in ready(r))) :]
        )
        assert (path.folder / "worker0.log").read_text().count('"model_id": "mod_0"') == 1

        await tell(path, worker)
        await until(lambda: heard[-1].pins_version == "")
        for ref in refs[1:]:
            await asyncio.wait_for(read(await submit(path, ref, 3)), 30)
        await until(lambda: "mod_0" not in ready(heard[-1]))


async def test_jobs_that_pins_leave_no_room_for_are_told(path: Path_) -> None:
    pinned, other = add_model(path.store, "mod_pinned"), add_model(path.store, "mod_other")
    async with reports_of(path) as heard:
        worker = path.worker(step_s=0.002, environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "2"})
        await until(lambda: heard and heard[-1].phase == "ready")
        await tell(path, worker, pinned)
        await until(lambda: ready(heard[-1]) == {"mod_pinned"})
        _, _, end = await asyncio.wait_for(read(await submit(path, other, 3)), 30)
        assert (end.outcome, end.error_code) == ("failed", "model_unavailable")
        assert "pinned" in (end.error_message or "")
        _, _, end = await asyncio.wait_for(read(await submit(path, pinned, 3)), 30)
        assert end.outcome == "succeeded"


async def test_a_preload_waits_until_nobody_does_and_takes_an_idle_models_place(path: Path_) -> None:
    first, second = add_model(path.store, "mod_first"), add_model(path.store, "mod_second")
    async with reports_of(path) as heard:
        # One place: a second job waits while the first one runs, for several reports' time.
        worker = path.worker(step_s=0.01, max_batch=1, environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "1"})
        await until(lambda: heard and heard[-1].phase == "ready")
        streams = [await submit(path, first, 400) for _ in range(2)]
        reads = [asyncio.create_task(read(stream)) for stream in streams]
        await until(lambda: heard[-1].held_jobs == 2 and ready(heard[-1]) == {"mod_first"})
        asked = PreloadAsked(model=second, asked_unix_ms=1)
        await tell(path, worker, preload=(asked,))
        await until(lambda: heard[-1].preload == [("mod_second", 1)])
        # One whose end is only still to be told is held too, and the model may go by then.
        while heard[-1].running_jobs or heard[-1].waiting_jobs:
            assert ready(heard[-1]) == {"mod_first"}
            await asyncio.sleep(0.05)
        await until(lambda: ready(heard[-1]) == {"mod_second"})
        assert [end.outcome for _, _, end in await asyncio.gather(*reads)] == ["succeeded", "succeeded"]
        await asyncio.wait_for(read(await submit(path, first, 3)), 30)
        await until(lambda: ready(heard[-1]) == {"mod_first"})
        since = len(heard)
        await until(lambda: len(heard) >= since + 2)
        assert all(ready(each) == {"mod_first"} for each in heard[since:]), "asked for once, loaded once"


# ---- the scheduler's commands and what it tells


@pytest.fixture
async def models(tables: Tables, module_database: str) -> AsyncIterator[None]:
    async with models_of_teams(module_database):
        yield


@asynccontextmanager
async def models_of_teams(database_url: str) -> AsyncIterator[None]:
    """Models m1 to m4 of t1, one of the platform, of another team, and of another type."""
    administrator = await asyncpg.connect(database_url)
    try:
        await administrator.execute("""
            INSERT INTO gateway.teams (team_id, slug, name, is_platform)
                VALUES ('t1', 't1', 'T1', false), ('t2', 't2', 'T2', false), ('tp', 'platform', 'P', true);
            INSERT INTO gateway.model_types (signature, name, architecture, parameter_count)
                VALUES ('0000000000000000', 'tiny', 'L', 1), ('0000000000000001', 'large', 'L', 1);
            INSERT INTO gateway.models (model_id, team_id, name, signature)
                SELECT 'mod_' || n, t, n, s FROM (VALUES
                    ('m1', 't1', '0000000000000000'), ('m2', 't1', '0000000000000000'),
                    ('m3', 't1', '0000000000000000'), ('m4', 't1', '0000000000000000'),
                    ('shared', 'tp', '0000000000000000'), ('theirs', 't2', '0000000000000000'),
                    ('big', 't1', '0000000000000001')) AS made (n, t, s);
            INSERT INTO gateway.model_revisions (model_id, revision, folder, manifest, context_tokens)
                SELECT model_id, 1, model_id || '/1', '{}', 8 FROM gateway.models;
        """)
        yield
    finally:
        await administrator.execute(
            "DELETE FROM gateway.model_revisions; DELETE FROM gateway.models; DELETE FROM gateway.model_types;"
            "DELETE FROM gateway.teams"
        )
        await administrator.close()


async def pin(
    tables: Tables, resource_id: str, model: str, copies: int | None = 1, team: str = "t1"
) -> CommandResult:
    return await tables.run(
        PinModel, team_id=team, resource_id=resource_id, model_id=f"mod_{model}", copies=copies
    )


async def stored_pins(tables: Tables) -> dict[str, int | None]:
    rows = await tables.database.fetch("SELECT model_id, copies FROM scheduler_api.model_pins_v1")
    return {row["model_id"]: row["copies"] for row in rows}


async def test_pins_are_set_replaced_and_removed(tables: Tables, models: None) -> None:
    resource_id = await tables.resource(count=2)
    assert (await pin(tables, resource_id, "m1")).ok
    assert (await pin(tables, resource_id, "shared", None)).ok
    assert (await pin(tables, resource_id, "m1", 2)).ok
    assert await stored_pins(tables) == {"mod_m1": 2, "mod_shared": None}
    for _ in range(2):
        result = await tables.run(UnpinModel, team_id="t1", resource_id=resource_id, model_id="mod_m1")
        assert result.ok
    assert await stored_pins(tables) == {"mod_shared": None}
    words = [row["words"] for row in await tables.database.fetch(
        "SELECT words FROM scheduler.decisions WHERE action IN ('pinned', 'unpinned') ORDER BY decision_id"
    )]  # fmt: skip
    assert words == [
        "t1/m1 pinned 1 times by test",
        "platform/shared pinned everywhere by test",
        "t1/m1 pinned 2 times by test",
        "mod_m1 unpinned by test",
    ]
    assert (await tables.run(DeleteResource, team_id="t1", resource_id=resource_id)).ok
    assert await stored_pins(tables) == {}


@pytest.mark.parametrize(
    ("model", "copies", "team", "code"),
    [
        ("m1", 3, "t1", "too_many_copies"),
        ("m1", 0, "t1", "invalid_value"),
        ("m1", 65, "t1", "invalid_value"),
        ("m1", 1, "t2", "not_found"),
        ("theirs", 1, "t1", "not_found"),
        ("nothing", 1, "t1", "not_found"),
        ("big", 1, "t1", "model_type_mismatch"),
    ],
)
async def test_a_pin_that_cannot_be_is_refused_and_changes_nothing(
    tables: Tables, models: None, model: str, copies: int, team: str, code: str
) -> None:
    resource_id = await tables.resource(count=2)
    assert (await pin(tables, resource_id, "m2")).ok
    result = await pin(tables, resource_id, model, copies, team)
    assert (result.ok, result.code) == (False, code)
    assert await stored_pins(tables) == {"mod_m2": 1}


async def test_a_resource_that_scales_by_itself_may_have_a_copy_on_each_gpu_it_may_reach(
    tables: Tables, models: None
) -> None:
    resource_id = await tables.resource(count=1)
    scaling: dict[str, Any] = {"autoscaling": True, "min_count": 0, "max_count": 3, "idle_timeout_s": 60}
    scaled = await tables.run(
        SetScaling, team_id="t1", resource_id=resource_id, when_asleep="wake", **scaling
    )
    assert scaled.ok, scaled
    assert (await pin(tables, resource_id, "m1", 3)).ok
    assert (await pin(tables, resource_id, "m2", 4)).code == "too_many_copies"


def report_of(incarnation: str, *resident: str, pinned: tuple[str, ...] = (), version: str = "") -> Any:
    report = WorkerReport(
        worker_id="w", resource_id="r", place=0, incarnation=incarnation, phase="ready", sent_unix_ms=0,
        models=[ResidentModel(model_id=f"mod_{name}", revision=1, state="ready", weight_bytes=10) for name in resident],
        model_memory_bytes=39, pins_version=version, pinned=[(f"mod_{name}", 1) for name in pinned],
    )  # fmt: skip
    return {incarnation: (report, 0.0)}


async def test_pins_that_do_not_fit_are_refused_once_memory_and_sizes_are_known(
    tables: Tables, models: None
) -> None:
    resource_id = await tables.live()
    stored = await tables.store.load()
    keeper = ResidencyKeeper(tables.database, tables.lease)
    await keeper.keep(stored, report_of(stored.places[0].incarnation, "m1"))
    # Room for three of the five models that may run there: two pins, and one place for the others.
    assert (await pin(tables, resource_id, "m1")).ok
    assert (await pin(tables, resource_id, "m2")).ok
    refused = await pin(tables, resource_id, "m3")
    assert (refused.code, "room for 2 pinned models" in refused.message) == ("pins_do_not_fit", True)
    assert await stored_pins(tables) == {"mod_m1": 1, "mod_m2": 1}
    assert (await pin(tables, resource_id, "m2", None)).ok, "what is pinned may be pinned otherwise"


async def test_a_worker_is_told_its_set_until_it_reports_it(tables: Tables, models: None) -> None:
    resource_id = await tables.live()
    stored = await tables.store.load()
    incarnation = stored.places[0].incarnation
    pins = PinKeeper(tables.database)
    silent = report_of(incarnation)
    await pins.look(stored, silent)
    (message,) = pins.to_tell(stored, silent, 0.0)
    known = sorted(ref.folder for ref in message.pins.known)
    assert known == ["mod_m1/1", "mod_m2/1", "mod_m3/1", "mod_m4/1", "mod_shared/1"], (
        "the team's own of the type, and the platform's"
    )
    assert (message.pins.pinned, message.pins.preload) == ([], [])
    nothing = message.pins
    told = report_of(incarnation, version=nothing.version)
    assert pins.to_tell(stored, told, 1.0) == [], "it reports what it was told"

    assert (await pin(tables, resource_id, "m1", None)).ok
    preload = await tables.run(PreloadModel, team_id="t1", resource_id=resource_id, model_id="mod_shared")
    assert preload.ok
    await pins.look(stored, silent)
    (message,) = pins.to_tell(stored, silent, 10.0)
    assert message.worker_id == stored.places[0].worker_id
    assert [ref.folder for ref in message.pins.pinned] == ["mod_m1/1"]
    assert [each.model.name for each in message.pins.preload] == ["platform/shared"]
    assert abs(message.pins.preload[0].asked_unix_ms / 1000 - time.time()) < 60
    assert pins.to_tell(stored, silent, 10.0 + TELL_AGAIN_S / 2) == [], "not with every look"
    assert pins.to_tell(stored, silent, 10.0 + TELL_AGAIN_S) == [message]
    heard = report_of(incarnation, "m1", pinned=("m1",), version=message.pins.version)
    await pins.look(stored, heard)
    assert pins.to_tell(stored, heard, 99.0) == []

    await tables.run(UnpinModel, team_id="t1", resource_id=resource_id, model_id="mod_m1")
    await tables.database.fetch(
        "UPDATE scheduler.model_preloads SET asked_at = now() - interval '16 minutes'"
    )
    await pins.look(stored, heard)
    (message,) = pins.to_tell(stored, heard, 199.0)
    assert message.pins == nothing


async def test_a_smaller_resource_keeps_what_it_can_and_a_preload_needs_one_that_is_on(
    tables: Tables, models: None
) -> None:
    resource_id = await tables.resource(count=3)
    assert (await pin(tables, resource_id, "m1", 3)).ok
    assert (await tables.run(ScaleResource, team_id="t1", resource_id=resource_id, fixed_count=1)).ok
    assert (await pin(tables, resource_id, "m2", 1)).ok, "an old pin that asks for too much bars no new one"
    refused = await tables.run(PreloadModel, team_id="t1", resource_id=resource_id, model_id="mod_m1")
    assert (refused.ok, refused.code) == (False, "resource_off")


async def test_pins_of_deleted_models_are_forgotten(
    tables: Tables, models: None, module_database: str
) -> None:
    resource_id = await tables.resource()
    for name in ("m1", "m2"):
        assert (await pin(tables, resource_id, name)).ok
    administrator = await asyncpg.connect(module_database)
    await administrator.execute("UPDATE gateway.models SET deleted_at = now() WHERE name = 'm1'")
    await administrator.close()
    await tables.store.prune()
    assert await stored_pins(tables) == {"mod_m2": 1}


# ---- all of it


@pytest.fixture
async def fleet(tmp_path: Path, module_vhost: Vhost, module_database: str) -> AsyncIterator[Fleet]:
    async with running_fleet(tmp_path, module_vhost.amqp_url, module_database) as running:
        yield running


@pytest.mark.timeout(240)
async def test_pins_are_spread_over_workers_and_are_there_again_after_a_crash(
    fleet: Fleet, module_database: str
) -> None:
    store = stub_store(fleet.folder / "store")
    for name in ("m1", "m2", "shared"):
        add_model(store, f"mod_{name}")
    fleet.environment |= {
        "ROUNDHOUSE_MODEL_STORE": str(store),
        "ROUNDHOUSE_WORKER_MODEL_BYTES": MEMORY,
        "ROUNDHOUSE_WORKER_COMMAND": json.dumps([sys.executable, "-m", "loadtest.stub_worker"]),
    }

    async def resident() -> dict[int, set[str]]:
        rows = await fleet.database.fetch(
            """SELECT place, model_id FROM scheduler_api.worker_models_v1
               WHERE state = 'ready' AND pinned AND place_state = 'ready'"""
        )
        places: dict[int, set[str]] = {}
        for row in rows:
            places.setdefault(row["place"], set()).add(row["model_id"].removeprefix("mod_"))
        return places

    async with models_of_teams(module_database):
        fleet.start_scheduler()
        fleet.start_agent()
        resource_id = await fleet.create_resource(2, team_id="t1")
        command = {"team_id": "t1", "resource_id": resource_id}
        for name, copies in (("m1", None), ("m2", 1), ("shared", 1)):
            pinned = await fleet.command(PinModel, **command, model_id=f"mod_{name}", copies=copies)
            assert pinned.ok, pinned
        assert (await fleet.command(TurnOnResource, **command)).ok

        async def spread() -> bool:
            return await resident() == {0: {"m1", "m2"}, 1: {"m1", "shared"}}

        await fleet.until(spread, "pinned models are resident, spread over both workers", timeout_s=90)
        victim = await fleet.database.fetchval("SELECT incarnation FROM scheduler.places WHERE place = 1")
        os.kill(fleet.workers()[victim], signal.SIGKILL)

        async def moved_or_back() -> bool:
            replaced = await fleet.database.fetchval(
                "SELECT incarnation FROM scheduler.places WHERE place = 1"
            )
            found = await resident()
            everywhere = set().union(*found.values()) if found else set()
            return (
                replaced not in (None, victim)
                and set(found) == {0, 1}
                and all("m1" in models for models in found.values())
                and everywhere == {"m1", "m2", "shared"}
            )

        await fleet.until(moved_or_back, "all copies are there again", timeout_s=90)
        assert (await fleet.command(UnpinModel, **command, model_id="mod_m1")).ok

        async def unpinned() -> bool:
            return not any("m1" in models for models in (await resident()).values())

        await fleet.until(unpinned, "the pin is gone on both workers")
