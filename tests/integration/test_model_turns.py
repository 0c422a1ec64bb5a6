"""Models take turns on a real worker process with memory for one: nobody waits for the end of another's long answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import msgspec

from services.gateway.owner import OwnedStream, TextDelta
from shared.messages import ModelRef
from shared.model_files import ModelFile
from shared.model_folder import ModelManifest
from tests.integration.test_job_path import Path_, path, read, whole_text
from tests.integration.worker_process import MODEL, stub_job

__all__ = ["path"]  # the fixture


def add_model(store: Path, model_id: str, weights: bytes = b"ab") -> ModelRef:
    """Its size is that of its file, 2 bytes; loaded, the stub engine says 1."""
    ref = msgspec.structs.replace(MODEL, model_id=model_id, name=f"team/{model_id}", folder=f"{model_id}/1")
    manifest = ModelManifest.from_json(json.loads((store / MODEL.folder / "manifest.json").read_text()))
    file = ModelFile("model.safetensors", len(weights), hashlib.sha256(weights).hexdigest())
    target = store / ref.folder
    target.mkdir(parents=True)
    (target / file.name).write_bytes(weights)
    changed = {**manifest.to_json(), "files": [msgspec.to_builtins(file)]}
    (target / "manifest.json").write_text(json.dumps(changed))
    return ref


async def submit(path: Path_, ref: ModelRef, max_tokens: int) -> OwnedStream:
    job = stub_job(path.owner.queue, path.resource_id, max_tokens=max_tokens)
    return await path.owner.submit(msgspec.structs.replace(job, model=ref), path.queue)


async def test_a_long_answer_gives_way_and_goes_on_unbroken(path: Path_) -> None:
    first, second = add_model(path.store, "mod_first"), add_model(path.store, "mod_second")
    path.worker(step_s=0.02, max_batch=4, environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "1"})
    long = await submit(path, first, 600)
    begun, order = asyncio.Event(), []

    async def read_long() -> tuple[str, int]:
        text = ""
        async for event in long:
            if isinstance(event, TextDelta):
                text += event.text
                begun.set()
            else:
                order.append("long")
                return text, event.completion_tokens
        raise AssertionError("the stream ended without an end")

    reading = asyncio.create_task(read_long())
    await asyncio.wait_for(begun.wait(), 30)
    for _ in range(2):
        text, _, end = await asyncio.wait_for(read(await submit(path, second, 5)), 30)
        order.append("short")
        assert (text, end.outcome) == (whole_text(5), "succeeded")
    assert await asyncio.wait_for(reading, 60) == (whole_text(600), 600)
    assert order == ["short", "short", "long"]
    assert long.owned.attempt == 1
    log = (path.folder / "worker0.log").read_text()
    assert log.count("job_paused") >= 2


async def test_six_models_answer_in_turn_where_one_fits(path: Path_) -> None:
    refs = [add_model(path.store, f"mod_{index}") for index in range(6)]
    path.worker(step_s=0.005, max_batch=8, environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "1"})
    streams = [await submit(path, refs[index % 6], 120) for index in range(12)]
    results = await asyncio.wait_for(asyncio.gather(*map(read, streams)), 60)
    assert all(text == whole_text(120) and end.outcome == "succeeded" for text, _, end in results)
