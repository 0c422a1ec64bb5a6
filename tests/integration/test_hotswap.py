"""Swaps on real worker processes: what a kill, a missing image or a crowd of models leaves of them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.worker.engine import Engine, Sampling, SequenceRequest
from services.worker.engine.images import image_file
from services.worker.engine.images.convert import convert
from services.worker.engine.native.build import load_library
from services.worker.image_store import ImageStore
from shared import topology
from shared.broker import Delivery
from shared.messages import Alarm, GenerateJob, ModelDamaged, ModelRef, SamplingParams
from shared.outcomes import Done, Outcome
from tests.integration.test_job_path import Path_, path, read, whole_text
from tests.integration.test_model_turns import add_model, submit
from tests.integration.test_residency import reports_of, until
from tests.integration.worker_process import stub_job
from tests.unit.worker.store_builders import CONFIG, put_model

__all__ = ["path"]  # the fixture

PROMPT, TOKENS = [5, 9, 2, 7], 24


async def test_more_models_than_fit_are_all_answered_and_none_is_loaded_twice(path: Path_) -> None:
    refs = [add_model(path.store, f"mod_{index}") for index in range(8)]
    environment = {"ROUNDHOUSE_WORKER_MODEL_BYTES": "2", "STUB_LOAD_S": "0.01"}
    path.worker(step_s=0.001, max_batch=8, environment=environment)

    async def client(number: int) -> None:
        for turn in range(12):
            text, _, end = await read(await submit(path, refs[(number + turn) % len(refs)], 4))
            assert (text, end.outcome) == (whole_text(4), "succeeded")

    async with asyncio.timeout(90), asyncio.TaskGroup() as group:
        for number in range(16):
            group.create_task(client(number))
    log = path.workers[0].log.read_text()
    assert log.count("model_evicted") > 20
    assert [line for line in log.splitlines() if "model_load_failed" in line or "evict_refused" in line] == []


async def test_the_jobs_of_a_worker_that_is_killed_during_a_swap_are_answered_whole_by_another(
    path: Path_,
) -> None:
    first, second = add_model(path.store, "mod_first"), add_model(path.store, "mod_second")
    slow = {"ROUNDHOUSE_WORKER_MODEL_BYTES": "1", "STUB_LOAD_S": "5"}
    async with reports_of(path) as heard:
        victim = path.worker(step_s=0.01, environment=slow)
        running = await submit(path, first, 1000)
        await until(lambda: any(running.owned.tokens), 40)
        waiting = [await submit(path, second, 30) for _ in range(3)]
        await until(lambda: heard and ("mod_second", "loading") in states(heard[-1]), 20)
        victim.kill()
    path.worker(step_s=0.002, environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "1"})
    results = await asyncio.wait_for(asyncio.gather(*map(read, [running, *waiting])), 60)
    assert [text for text, _, _ in results] == [whole_text(1000), *[whole_text(30)] * 3]
    assert all(end.outcome == "succeeded" for _, _, end in results)
    # Only the one that ran has been in a crash.
    assert [stream.owned.attempt for stream in [running, *waiting]] == [2, 1, 1, 1]


def states(report: Any) -> set[tuple[str, str]]:
    return {(model.model_id, model.state) for model in report.models}


# ---- the real engine


def put(store: Path, model_id: str, revision: int, seed: int) -> ModelRef:
    folder = f"{model_id}/{revision}"
    put_model(store, folder, seed=seed)
    return ModelRef(
        model_id=model_id, revision=revision, name=f"team/{model_id}", folder=folder, signature="0" * 16
    )


def make_images(store: Path, folder: Path, refs: Sequence[ModelRef]) -> None:
    images = ImageStore(folder, 10**9, CONFIG)
    for ref in refs:
        key = images.key(ref, store / ref.folder)
        convert(store / ref.folder, folder / f"{key}.image", key, CONFIG)


def fresh_answer(store: Path, ref: ModelRef) -> list[int]:
    """Of an engine that never had another model."""
    engine = Engine(CONFIG)
    engine.load_model("model", store / ref.folder)
    engine.add(SequenceRequest("a", "model", "t", PROMPT, TOKENS, Sampling(temperature=0.0, ignore_eos=True)))
    tokens: list[int] = []
    while engine.has_work:
        for delta in engine.step().deltas:
            tokens += delta.tokens
    return tokens


def job_of(path: Path_, ref: ModelRef) -> GenerateJob:
    job = stub_job(path.owner.queue, path.resource_id, max_tokens=TOKENS)
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    job = msgspec.structs.replace(job, model=ref, prompt_tokens=PROMPT, sampling=greedy)
    assert isinstance(job, GenerateJob)
    return job


async def ask(path: Path_, ref: ModelRef) -> list[int]:
    _, tokens, end = await read(await path.owner.submit(job_of(path, ref), path.queue))
    assert end.outcome == "succeeded", (end.error_code, end.error_message)
    return tokens


@pytest.mark.skipif(load_library().library is None, reason="images are of the C kernels")
@pytest.mark.timeout(180)
async def test_each_revision_answers_as_itself_with_images_and_without(path: Path_, tmp_path: Path) -> None:
    store, images = path.store, tmp_path / "images"
    old, new, other = put(store, "mod_a", 1, 1), put(store, "mod_a", 2, 2), put(store, "mod_b", 1, 3)
    expected = {ref.folder: fresh_answer(store, ref) for ref in (old, new, other)}
    assert len(set(map(tuple, expected.values()))) == 3, "they would not be told apart"
    make_images(store, images, (old, new, other))
    path.worker(
        module="services.worker",
        max_batch=4,
        environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "1", "ROUNDHOUSE_IMAGE_DIR": str(images)},
    )
    for ref in (old, other, new, other, old, new) * 3:
        assert await asyncio.wait_for(ask(path, ref), 60) == expected[ref.folder]
    assert len(list(images.glob("*.image"))) == 3, "it used those that were made for it"
    shutil.rmtree(images)  # with the one that is in use
    images.mkdir()
    for ref in (old, other, new):
        assert await asyncio.wait_for(ask(path, ref), 60) == expected[ref.folder]
    # A swap was every time, and from memory for one model there was always one to let go.
    assert path.workers[0].log.read_text().count("model_evicted") >= 20


@pytest.mark.skipif(load_library().library is None, reason="images are of the C kernels")
@pytest.mark.timeout(180)
async def test_a_model_that_its_first_pass_finds_damaged_says_nothing_and_others_go_on(
    path: Path_, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_file, "_CHUNK_BYTES", 4096)  # else all of so small a model is read at the load
    store, images = path.store, tmp_path / "images"
    sound, broken = put(store, "mod_a", 1, 1), put(store, "mod_b", 1, 2)
    expected = fresh_answer(store, sound)
    make_images(store, images, (sound, broken))
    key = ImageStore(images, 10**9, CONFIG).key(broken, store / broken.folder)
    alarms: list[ModelDamaged] = []

    async def keep(delivery: Delivery) -> Outcome:
        alarms.append(delivery.message)
        return Done()

    consuming = asyncio.create_task(path.broker.consume(topology.ALARMS, Alarm, keep))
    path.worker(
        module="services.worker",
        max_batch=4,
        environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "1", "ROUNDHOUSE_IMAGE_DIR": str(images)},
    )
    for ref in (broken, sound):
        await asyncio.wait_for(ask(path, ref), 60)
    data = bytearray((images / f"{key}.image").read_bytes())
    data[-5000] ^= 1
    (images / f"{key}.image").unlink()
    (images / f"{key}.image").write_bytes(data)
    streams = [await path.owner.submit(job_of(path, broken), path.queue) for _ in range(3)]
    for _, tokens, end in await asyncio.wait_for(asyncio.gather(*map(read, streams)), 60):
        assert (tokens, end.outcome, end.error_code) == ([], "failed", "model_unavailable")
    async with asyncio.timeout(30):
        while not alarms:
            await asyncio.sleep(0.05)
    consuming.cancel()
    await asyncio.wait({consuming})
    assert [(alarm.model_id, alarm.reason) for alarm in alarms] == [
        ("mod_b", "its weights differ from what was written")
    ]
    assert not (images / f"{key}.image").exists()
    assert await asyncio.wait_for(ask(path, sound), 60) == expected
