"""Adapters on real worker processes: the base is loaded for them, shared by them, and goes after them."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from infra.local.demo_model import BASE_NAME, ensure_demo_models
from services.gateway.owner import OwnedStream
from shared.messages import ModelRef, SamplingParams, WeightsRef
from shared.model_files import ModelFile
from shared.model_folder import ModelFolderLimits, ModelManifest, inspect_model_folder
from tests.integration.test_demo_models import (
    FORMAL,
    MODELS_DIR,
    PIRATE,
    REPOSITORY,
    chat_tokens,
    classify,
    sha256,
)
from tests.integration.test_job_path import Path_, path, read, whole_text
from tests.integration.test_model_turns import add_model, submit
from tests.integration.test_residency import history_of, reports_of, until
from tests.integration.worker_process import stub_job

__all__ = ["path"]  # the fixture

PROMPT = "What is the capital of Germany?"


def on(base: ModelRef, adapter: ModelRef) -> ModelRef:
    fields = {name: getattr(base, name) for name in WeightsRef.__struct_fields__}
    return msgspec.structs.replace(adapter, base=WeightsRef(**fields))


async def test_a_base_comes_for_its_adapters_and_goes_after_them(path: Path_) -> None:
    base, other = add_model(path.store, "mod_base"), add_model(path.store, "mod_other", b"abc")
    first, second = (on(base, add_model(path.store, f"mod_{name}")) for name in ("first", "second"))
    async with reports_of(path) as heard:
        path.worker(step_s=0.002, environment={"ROUNDHOUSE_WORKER_MODEL_BYTES": "3"})
        streams = [await submit(path, ref, 40) for ref in (first, second, first, base)]
        for text, _, end in await asyncio.wait_for(asyncio.gather(*map(read, streams)), 30):
            assert (text, end.outcome) == (whole_text(40), "succeeded")
        await until(lambda: heard and history_of(heard[-1], "mod_second"))
        loads = {history.model_id: history.loads for history in heard[-1].history}
        assert loads == {"mod_base": 1, "mod_first": 1, "mod_second": 1}

        # Until it is loaded it counts 3 bytes, all there are.
        await asyncio.wait_for(read(await submit(path, other, 3)), 30)
        await until(lambda: [model.model_id for model in heard[-1].models] == ["mod_other"])
    log = (path.folder / "worker0.log").read_text()
    assert "evict_refused" not in log and "model_load_failed" not in log


async def test_a_broken_base_is_what_its_adapters_jobs_are_told(path: Path_) -> None:
    base = add_model(path.store, "mod_base")
    adapter = on(base, add_model(path.store, "mod_adapter"))
    (path.store / base.folder / "model.safetensors").write_bytes(b"xx")
    path.worker(step_s=0.002)
    _, _, end = await asyncio.wait_for(read(await submit(path, adapter, 3)), 30)
    assert (end.outcome, end.error_code) == ("failed", "model_unavailable")
    assert end.error_message == "its base: model.safetensors differs from what was registered"


def store_model(folder: Path, target: Path, manifest: ModelManifest) -> None:
    target.mkdir(parents=True)
    for file in manifest.files:
        os.link(folder / file.name, target / file.name)
    (target / "manifest.json").write_bytes(msgspec.json.encode(manifest.to_json()))


@pytest.fixture
def demo_refs(path: Path_, tmp_path: Path) -> dict[str, ModelRef]:
    """The demo's base, and its two adapters as they were trained, in the worker's store."""
    models = {model.name: model for model in ensure_demo_models(MODELS_DIR, print)}
    base_manifest = inspect_model_folder(models[BASE_NAME].folder, ModelFolderLimits())
    base = ModelRef(
        model_id="mod_demo",
        revision=1,
        name="demo/base",
        folder="mod_demo/1",
        signature=base_manifest.signature,
    )
    store_model(models[BASE_NAME].folder, path.store / base.folder, base_manifest)
    refs = {BASE_NAME: base}
    for name, short in ((PIRATE, "pirate"), (FORMAL, "formal")):
        folder = tmp_path / short
        shutil.copytree(REPOSITORY / "infra" / "demo" / "adapters" / short, folder)
        files = tuple(
            ModelFile(each.name, each.stat().st_size, sha256(each)) for each in sorted(folder.iterdir())
        )
        adapter = msgspec.structs.replace(base, model_id=f"mod_{short}", folder=f"mod_{short}/1")
        changed = {**base_manifest.to_json(), "files": [msgspec.to_builtins(file) for file in files]}
        store_model(folder, path.store / adapter.folder, ModelManifest.from_json(changed))
        refs[name] = on(base, adapter)
    return refs


async def ask(path: Path_, ref: ModelRef) -> OwnedStream:
    job = stub_job(path.owner.queue, path.resource_id, max_tokens=12, deadline_s=120)
    prompt = chat_tokens(MODELS_DIR / BASE_NAME, PROMPT)
    job = msgspec.structs.replace(
        job, model=ref, prompt_tokens=prompt, sampling=SamplingParams(temperature=0.0)
    )
    return await path.owner.submit(job, path.queue)


async def test_the_demos_adapters_answer_beside_their_base_from_one_copy_of_its_weights(
    path: Path_, demo_refs: dict[str, ModelRef]
) -> None:
    async with reports_of(path) as heard:
        path.worker(module="services.worker", max_batch=8)
        names = [PIRATE, FORMAL, BASE_NAME]
        streams = [await ask(path, demo_refs[name]) for name in names]
        results = await asyncio.wait_for(asyncio.gather(*map(read, streams)), 120)
        tokenizer = Tokenizer.from_file(str(MODELS_DIR / BASE_NAME / "tokenizer.json"))
        answers = [tokenizer.decode(tokens) for _, tokens, _ in results]
        assert [classify(answer) for answer in answers] == names, answers
        await until(lambda: heard and len([m for m in heard[-1].models if m.state == "ready"]) == 3)
        sizes = {model.model_id: model.weight_bytes for model in heard[-1].models}
        assert max(sizes["mod_pirate"], sizes["mod_formal"]) * 20 < sizes["mod_demo"]
        histories = [history_of(heard[-1], model) for model in ("mod_demo", "mod_pirate", "mod_formal")]
        assert [history and history.loads for history in histories] == [1, 1, 1]
