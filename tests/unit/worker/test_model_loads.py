"""From image or folder, with the real engine on its thread: each damage is found, told once, and nothing is kept of it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from services.worker.engine import Delta, Engine, StepReport
from services.worker.engine.images import image_file
from services.worker.engine.images.convert import convert
from services.worker.engine.native.build import load_library
from services.worker.engine_thread import EngineThread
from services.worker.held import model_handle
from services.worker.image_store import HeldImage, ImageStore
from services.worker.model_files import ModelUnavailable
from services.worker.model_loads import ModelLoads
from services.worker.residency import Residency
from shared.messages import ModelRef
from tests.unit.worker.engine.builders import make_request
from tests.unit.worker.store_builders import CONFIG, put_model

pytestmark = pytest.mark.skipif(load_library().library is None, reason="images are of the C kernels")

REF = ModelRef(model_id="mod_1", revision=1, name="team/model", folder="mod_1/1", signature="s")
KEY = ("mod_1", 1)


class Bench:
    """A store with one model, its images, and what was said of damage."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = put_model(tmp_path / "store", REF.folder)
        self.engine = Engine(CONFIG)
        self.deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self.thread = EngineThread(
            self.engine,
            self._note,
            lambda sequence, refusal: None,
        )
        self.images = ImageStore(tmp_path / "images", 10**9, CONFIG)
        self.damage: list[str] = []
        self.damaged: dict[str, str] = {}
        self.loads = ModelLoads(
            self.thread, tmp_path / "store", self.images, lambda ref, reason: self.damage.append(reason)
        )

    def _note(self, report: StepReport) -> None:
        self.damaged |= report.damaged
        for delta in report.deltas:
            self.deltas.put_nowait(delta)

    @property
    def image_files(self) -> list[Path]:
        return list((self.folder.parents[2] / "images").glob("*.image"))

    async def image(self) -> Path:
        """The model's image, once it is made."""
        async with asyncio.timeout(60):
            while not self.image_files:
                await asyncio.sleep(0.05)
        return self.image_files[0]

    async def cached_tokens(self, name: str) -> int:
        """Of a prompt that is the same each time: what the engine found instead of computing it."""
        self.thread.add(make_request(name, list(range(5, 45)), 1, model=model_handle(KEY)))
        async with asyncio.timeout(60):
            delta = await self.deltas.get()
        assert (delta.sequence_id, delta.error) == (name, None)
        return delta.cached_prompt_tokens


def damage(image: Path) -> None:
    data = bytearray(image.read_bytes())
    data[-5000] ^= 1
    image.unlink()
    image.write_bytes(data)


@asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    bench.thread.start()
    making = asyncio.create_task(bench.loads.make_images(lambda: False))
    try:
        yield bench
    finally:
        making.cancel()
        await asyncio.wait({making})
        await bench.thread.stop()


async def test_the_first_load_is_from_the_folder_and_the_next_from_the_image_made_of_it(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as bench:
        await bench.loads.load(REF)
        await bench.image()
        await bench.loads.unload(KEY)
        (bench.folder / "model.safetensors").unlink()  # only an image can answer now
        await bench.loads.load(REF)
        assert bench.damage == []


async def test_a_model_that_may_be_asked_for_gets_its_image_before(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.loads.prepare([REF])
        bench.loads.prepare([REF])
        await bench.image()
        (bench.folder / "model.safetensors").unlink()
        await bench.loads.load(REF)


async def test_what_was_computed_is_kept_while_a_model_is_away_until_one_is_found_damaged(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as bench:
        await bench.loads.load(REF)
        image = await bench.image()
        assert await bench.cached_tokens("a") == 0
        await bench.loads.unload(KEY)
        await bench.loads.load(REF)
        kept_tokens = await bench.cached_tokens("b")
        assert kept_tokens >= CONFIG.block_tokens
        await bench.loads.unload(KEY)
        damage(image)
        with pytest.raises(ModelUnavailable):
            await bench.loads.load(REF)
        await bench.loads.load(REF)  # the folder is as it was
        assert await bench.cached_tokens("c") == 0


async def test_a_damaged_image_takes_the_model_out_and_the_next_try_has_the_folder(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.loads.prepare([REF])
        path = await bench.image()
        damage(path)
        with pytest.raises(ModelUnavailable, match="image is damaged"):
            await bench.loads.load(REF)
        assert len(bench.damage) == 1 and "chunk" in bench.damage[0]
        assert bench.image_files == []
        await bench.loads.load(REF)
        assert len(bench.damage) == 1


async def test_a_model_whose_first_pass_finds_damage_goes_when_its_sequences_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_file, "_CHUNK_BYTES", 4096)  # else all of so small a model is read at the load
    async with running(tmp_path) as bench:
        residency = Residency(bench.loads, "fp32")
        key = bench.images.key(REF, bench.folder)
        image = tmp_path / "images" / f"{key}.image"
        convert(bench.folder, image, key, CONFIG)
        await residency.load(REF)  # with its canary
        await residency.evict(KEY)
        damage(image)
        await residency.load(REF)
        assert bench.damage == [] and residency.is_ready(KEY)
        for name in ("a", "b"):
            bench.thread.add(make_request(name, list(range(5, 45)), 4, model=model_handle(KEY)))
        for _ in range(2):
            delta = await asyncio.wait_for(bench.deltas.get(), 60)
            assert delta.error is not None and delta.tokens == ()
        assert set(bench.damaged) == {model_handle(KEY)}
        await asyncio.gather(*(residency.take_out(KEY, bench.damaged[model_handle(KEY)]) for _ in range(3)))
        assert bench.damage == ["its weights differ from what was written"] and bench.image_files == []
        assert residency.failure(KEY) == "the model's image is damaged"
        assert bench.engine._models == {}
        await residency.load(REF)  # the folder is as it was
        assert await bench.cached_tokens("c") == 0


async def test_a_damaged_folder_is_told_and_not_served(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        weights = bench.folder / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-10] ^= 1
        weights.write_bytes(data)
        with pytest.raises(ModelUnavailable, match=r"model\.safetensors differs"):
            await bench.loads.load(REF)
        assert len(bench.damage) == 1
        assert bench.engine._models == {} and bench.image_files == []


async def test_a_vanished_file_is_not_served_and_comes_back_with_it(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        weights = bench.folder / "model.safetensors"
        away = weights.with_name("away")
        os.rename(weights, away)
        with pytest.raises(FileNotFoundError):
            await bench.loads.load(REF)
        os.rename(away, weights)
        await bench.loads.load(REF)


async def test_a_resident_models_image_is_held_until_it_is_evicted(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.loads.prepare([REF])
        await bench.image()
        await bench.loads.load(REF)
        assert [each.is_held for each in bench.images._stored()] == [True]
        await bench.loads.unload(KEY)
        assert [each.is_held for each in bench.images._stored()] == [False]


async def test_a_second_load_into_the_same_place_is_refused_and_holds_nothing(tmp_path: Path) -> None:
    """Two at once: one is ready, the other says so, and an eviction frees all of it."""
    async with running(tmp_path) as bench:
        bench.loads.prepare([REF])
        await bench.image()
        outcomes = await asyncio.gather(*(bench.loads.load(REF) for _ in range(2)), return_exceptions=True)
        assert sorted(type(each).__name__ for each in outcomes) == ["ModelInfo", "ValueError"]
        await bench.loads.unload(KEY)
        assert [each.is_held for each in bench.images._stored()] == [False]


async def test_the_canary_is_asked_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    async with running(tmp_path) as bench:
        load_image = bench.engine.load_image

        def spy(handle: str, path: Path, key: str, *, ask_canary: bool) -> object:
            asked.append(ask_canary)
            return load_image(handle, path, key, ask_canary=ask_canary)

        monkeypatch.setattr(bench.engine, "load_image", spy)
        bench.loads.prepare([REF])
        await bench.image()
        for _ in range(3):
            await bench.loads.load(REF)
            await bench.loads.unload(KEY)
    assert asked == [True, False, False]


async def test_an_image_that_is_removed_between_its_choice_and_its_load_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as bench:
        bench.loads.prepare([REF])
        path = await bench.image()
        hold = bench.images.hold

        def hold_and_lose(key: str) -> HeldImage | None:
            held = hold(key)
            path.unlink(missing_ok=True)
            return held

        monkeypatch.setattr(bench.images, "hold", hold_and_lose)
        await bench.loads.load(REF)
        assert bench.damage == []
        assert bench.image_files == []


async def test_a_model_goes_while_another_comes_and_one_that_comes_does_not_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = msgspec.structs.replace(REF, model_id="mod_2", folder="mod_2/1")
    gate = threading.Event()
    async with running(tmp_path) as bench:
        put_model(tmp_path / "store", other.folder, seed=2)
        await bench.loads.load(REF)
        load_decoder = bench.engine._loader.load

        def load_slowly(handle: str, folder: Path) -> object:
            gate.wait()
            return load_decoder(handle, folder)

        monkeypatch.setattr(bench.engine._loader, "load", load_slowly)
        coming = asyncio.create_task(bench.loads.load(other))
        try:
            with pytest.raises(ValueError, match="not loaded"):
                await bench.loads.unload(("mod_2", 1))
            await bench.loads.unload(KEY)
        finally:
            gate.set()
        assert (await coming).handle == "mod_2@1"
        await bench.loads.unload(("mod_2", 1))
        with pytest.raises(ValueError, match="not loaded"):
            await bench.loads.unload(KEY)
