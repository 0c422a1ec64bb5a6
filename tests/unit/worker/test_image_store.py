"""A host's folder of images: made by a real child process, held by locks that other processes see, bounded."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from services.worker.engine import Engine, EngineConfig
from services.worker.engine.images.image_file import open_image
from services.worker.engine.native.build import load_library
from services.worker.image_store import ImageNotMade, ImageStore
from shared.messages import ModelRef
from tests.unit.worker.store_builders import CONFIG, put_model

pytestmark = pytest.mark.skipif(load_library().library is None, reason="images are of the C kernels")


REF = ModelRef(model_id="mod_1", revision=1, name="team/model", folder="mod_1/1", signature="s")


def put_image(folder: Path, key: str, size_bytes: int, age_s: float) -> Path:
    path = folder / f"{key}.image"
    path.write_bytes(bytes(size_bytes))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


async def test_a_child_makes_an_image_that_the_engine_takes(tmp_path: Path) -> None:
    model = put_model(tmp_path / "store", "mod_1/1")
    store = ImageStore(tmp_path / "images", 10**9, CONFIG)
    key = store.key(REF, model)
    assert store.hold(key) is None
    await store.make(key, model, 100_000)
    held = store.hold(key)
    assert held is not None
    Engine(CONFIG).load_image("m", held.path, key, ask_canary=True)
    held.close()
    made = held.path.stat().st_ino
    await store.make(key, model, 100_000)
    assert held.path.stat().st_ino == made, "made once"


async def test_two_stores_that_want_one_image_make_it_once(tmp_path: Path) -> None:
    model = put_model(tmp_path / "store", "mod_1/1")
    stores = [ImageStore(tmp_path / "images", 10**9, CONFIG) for _ in range(2)]
    key = stores[0].key(REF, model)
    inodes = []

    async def make(store: ImageStore) -> None:
        await store.make(key, model, 100_000)
        inodes.append((tmp_path / "images" / f"{key}.image").stat().st_ino)

    await asyncio.gather(*map(make, stores))
    assert inodes[0] == inodes[1]


async def test_a_damaged_folder_gets_no_image_and_a_reason(tmp_path: Path) -> None:
    model = put_model(tmp_path / "store", "mod_1/1")
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1
    weights.write_bytes(data)
    store = ImageStore(tmp_path / "images", 10**9, CONFIG)
    with pytest.raises(ImageNotMade, match=r"model\.safetensors differs"):
        await store.make(store.key(REF, model), model, 100_000)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["make.lock"]


async def test_room_is_made_of_what_nobody_holds(tmp_path: Path) -> None:
    """The holder is another process: its lock is seen all the same."""
    model = put_model(tmp_path / "store", "mod_1/1")
    images = tmp_path / "images"
    store = ImageStore(images, 3_000_000, CONFIG)
    oldest, newer = put_image(images, "a" * 32, 1_400_000, 500), put_image(images, "b" * 32, 1_400_000, 100)
    hold = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_SH);"
        " print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(oldest)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        await store.make("c" * 32, model, 1_000_000)
        assert oldest.exists() and not newer.exists()
        with pytest.raises(ImageNotMade, match="do not fit"):
            await store.make("d" * 32, model, 2_900_000)
        assert oldest.exists() and store.has("c" * 32), "what does not help is not removed"
    finally:
        holder.communicate()
    await store.make("d" * 32, model, 2_900_000)
    assert not oldest.exists()


async def test_holding_is_using(tmp_path: Path) -> None:
    images = tmp_path / "images"
    store = ImageStore(images, 10**9, CONFIG)
    path = put_image(images, "a" * 32, 10, age_s=500)
    held = store.hold("a" * 32)
    assert held is not None and time.time() - path.stat().st_mtime < 100
    store.discard("a" * 32)
    assert store.hold("a" * 32) is None
    held.close()


async def test_parts_of_killed_children_go(tmp_path: Path) -> None:
    model = put_model(tmp_path / "store", "mod_1/1")
    images = tmp_path / "images"
    store = ImageStore(images, 10**9, CONFIG)
    old, young = images / ".image-old", images / ".image-young"
    for part in (old, young):
        part.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    await store.make("a" * 32, model, 1000)
    assert not old.exists() and young.exists(), "a young one may be a running child's"


async def test_a_cancelled_make_leaves_no_child(tmp_path: Path) -> None:
    model = put_model(tmp_path / "store", "mod_1/1")
    store = ImageStore(tmp_path / "images", 10**9, CONFIG)
    making = asyncio.create_task(store.make("a" * 32, model, 1000))
    await asyncio.sleep(0.3)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    children = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "make_image"], capture_output=True, text=True, check=False
    )
    assert children.stdout == ""
    await store.make("a" * 32, model, 1000)
    open_image(tmp_path / "images" / f"{'a' * 32}.image").verify()


def test_another_precision_is_another_image(tmp_path: Path) -> None:
    model = put_model(tmp_path / "store", "mod_1/1")
    one = ImageStore(tmp_path, 1, EngineConfig(precision="bf16"))
    other = ImageStore(tmp_path, 1, EngineConfig(precision="int8"))
    assert one.key(REF, model) != other.key(REF, model)


def test_the_name_says_whose_an_image_is(tmp_path: Path) -> None:
    """Two teams' models of the same files have two."""
    model = put_model(tmp_path / "store", "mod_1/1")
    store = ImageStore(tmp_path, 1, CONFIG)
    key = store.key(REF, model)
    assert re.fullmatch("mod_1-1-[0-9a-f]{32}", key)
    other = store.key(msgspec.structs.replace(REF, model_id="mod_2"), model)
    assert other.rpartition("-")[2] != key.rpartition("-")[2]
