"""An image answers as its folder does, bit for bit, and whatever is wrong with one is found before it answers."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import services.worker.engine.images.convert as images
from services.worker.engine import Engine, EngineConfig, ModelRefusal
from services.worker.engine.images import image_file
from services.worker.engine.images.canary import Canary
from services.worker.engine.images.checksums import DIGESTS
from services.worker.engine.images.image_file import ImageDamaged, open_image, write_image
from services.worker.engine.images.model_image import image_key, open_model_image
from services.worker.engine.native.build import load_library
from tests.unit.worker.engine.builders import make_engine, make_request, run_all, save_model, tiny_config
from tests.unit.worker.engine.conftest import TinyModel
from tests.unit.worker.engine.family_configs import VARIANTS

PROMPTS = ([5, 6, 7], list(range(9, 60)), [300, 301])
needs_kernels = pytest.mark.skipif(load_library().library is None, reason=load_library().reason or "has them")


def config_of(precision: str = "fp32", **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {"max_batch": 8, "max_context_tokens": 256, "kv_tokens": 2048}
    return EngineConfig(precision=precision, **{**values, **changes})


def convert(folder: Path, path: Path, config: EngineConfig) -> str:
    key = image_key("content", config)
    images.convert(folder, path, key, config)
    return key


def answers_of(engine: Engine) -> dict[str, Any]:
    return run_all(engine, [make_request(str(n), prompt, 24) for n, prompt in enumerate(PROMPTS)])


# ---- the file


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(7, 5, generator=generator),
        "nothing": torch.empty(0, dtype=torch.uint8),
        "turned": torch.randn(6, 4, generator=generator).t().bfloat16(),
        "b": torch.randint(0, 255, (3, 33), generator=generator, dtype=torch.uint8),
        "long": torch.arange(3_000_000, dtype=torch.int32),
    }


def test_what_is_mapped_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.image"
    size_bytes = write_image(path, some_tensors(), {"said": "ä"})
    image = open_image(path)
    image.verify()
    assert image.meta == {"said": "ä"}
    assert list(image.tensors) == list(some_tensors())
    for name, tensor in some_tensors().items():
        found = image.tensors[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        assert found.data_ptr() % 64 == 0 or not found.numel(), f"{name}: kernels read whole cache lines"
    assert path.stat().st_size == size_bytes
    assert path.stat().st_mode & 0o222 == 0, "nobody writes to an image"
    assert os.listdir(tmp_path) == ["x.image"], "no part is left"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("where", ["magic", "length", "header", "first", "middle", "last"])
def test_one_bit_anywhere_is_found(tmp_path: Path, where: str, threads: int) -> None:
    path = tmp_path / "x.image"
    write_image(path, some_tensors(), {})
    data = bytearray(path.read_bytes())
    body = len(data) - sum(-(-tensor.nbytes // 64) * 64 for tensor in some_tensors().values())
    places = {
        "magic": 3,
        "length": 9,
        "header": 60,
        "first": body,
        "middle": body + 5 * 1024 * 1024,
        "last": len(data) - 64,
    }
    data[places[where]] ^= 4
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(ImageDamaged):
        open_image(path).verify(threads=threads)


def test_threads_read_each_byte_once_between_them(tmp_path: Path) -> None:
    path = tmp_path / "x.image"
    write_image(path, some_tensors(), {})
    image, read = open_image(path), []
    threads = len(image.chunk_digests)
    together = threading.Barrier(threads)

    def note(count: int) -> None:
        read.append((threading.get_ident(), count))
        together.wait(10)

    image.verify(note, threads=threads)
    assert sum(count for _, count in read) == image.body.nbytes
    assert len({thread for thread, _ in read}) == threads > 1


@pytest.mark.parametrize("change", [-1, -100_000, 1])
def test_a_file_of_another_length_is_not_mapped(tmp_path: Path, change: int) -> None:
    """Reading behind the end of a mapped file ends the process."""
    path = tmp_path / "x.image"
    write_image(path, some_tensors(), {})
    os.chmod(path, 0o644)
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(ImageDamaged, match="bytes instead of"):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"RHIMAGE1", b"x" * 100, bytes(5000)])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.image"
    path.write_bytes(content)
    with pytest.raises(ImageDamaged):
        open_image(path)


def test_an_image_without_the_package_is_verified_by_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.image"
    monkeypatch.setattr(image_file, "BEST", "sha256")
    write_image(path, some_tensors(), {})
    monkeypatch.undo()
    open_image(path).verify()
    assert open_image(path).algorithm == "sha256"
    monkeypatch.delitem(DIGESTS, "sha256")
    with pytest.raises(ImageDamaged, match="sha256"):
        open_image(path)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.image"
    write_image(path, {"a": torch.ones(3)}, {})

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("services.worker.engine.images.image_file.os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_image(path, {"a": torch.zeros(3)}, {})
    assert torch.equal(open_image(path).tensors["a"], torch.ones(3))
    assert os.listdir(tmp_path) == ["x.image"]


def test_what_is_mapped_outlives_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "x.image"
    write_image(path, some_tensors(), {})
    image = open_image(path)
    write_image(path, {"a": torch.zeros(7, 5)}, {})
    path.unlink()
    image.verify()
    assert torch.equal(image.tensors["a"], some_tensors()["a"])


# ---- models


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_an_image_answers_as_its_folder_does(tmp_path: Path, variant: str, precision: str) -> None:
    folder = tmp_path / "model"
    save_model(folder, VARIANTS[variant], seed=4)
    config = config_of(precision)
    key = convert(folder, tmp_path / "x.image", config)
    by_folder = make_engine(folder, precision=precision)
    by_image = Engine(config)
    info = by_image.load_image("m", tmp_path / "x.image", key, ask_canary=True)
    shutil.rmtree(folder)  # an image stands alone
    scored = make_request("scored", PROMPTS[1], 4, echo_logprobs=True)
    assert answers_of(by_image) == answers_of(by_folder)
    assert run_all(by_image, [scored]) == run_all(by_folder, [scored]), "the same bits"
    assert info.weight_bytes == by_folder._models["m"].info.weight_bytes
    assert info.eos_token_ids == by_folder._models["m"].info.eos_token_ids


@needs_kernels
def test_swaps_between_images_keep_each_models_answers(tmp_path: Path, tiny: TinyModel) -> None:
    other = tmp_path / "other"
    save_model(other, tiny_config(), seed=1)
    config = config_of("bf16")
    keys = [convert(f, tmp_path / f"{n}.image", config) for n, f in enumerate((tiny.folder, other))]
    expected = [answers_of(make_engine(folder, precision="bf16")) for folder in (tiny.folder, other)]
    assert expected[0] != expected[1]
    engine = Engine(config)
    for turn in range(50):
        number = turn % 2
        engine.load_image("m", tmp_path / f"{number}.image", keys[number], ask_canary=turn == 0)
        assert answers_of(engine) == expected[number]
        engine.unload_model("m")


@needs_kernels
def test_fine_tunes_with_one_tokenizer_share_its_table(tmp_path: Path, tiny: TinyModel) -> None:
    config = config_of()
    key = convert(tiny.folder, tmp_path / "x.image", config)
    engine = Engine(config)
    engine.load_image("a", tmp_path / "x.image", key, ask_canary=False)
    engine.load_image("b", tmp_path / "x.image", key, ask_canary=False)
    engine.load_model("c", tiny.folder)
    tables = {id(engine._models[handle].byte_table) for handle in "abc"}
    assert len(tables) == 1


def damage_weights(path: Path, key: str) -> str:
    """As if the converter had packed wrongly: the checksums are right, the model is another."""
    image = open_image(path)
    tensors = dict(image.tensors)
    tensors["layers.0.mlp_in.packed"] = tensors["layers.0.mlp_in.packed"].flip(0).contiguous()
    write_image(path, tensors, image.meta)
    return key


def damage_config(path: Path, key: str) -> str:
    image = open_image(path)
    write_image(
        path, dict(image.tensors), {**image.meta, "config": {**image.meta["config"], "rms_norm_eps": 0.5}}
    )
    return key


def ask_another(path: Path, key: str) -> str:
    return image_key("another", config_of("bf16"))


def flip_a_bit(path: Path, key: str) -> str:
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.unlink()
    path.write_bytes(data)
    return key


@needs_kernels
@pytest.mark.parametrize("damage", [damage_weights, damage_config, ask_another, flip_a_bit])
def test_a_damaged_image_is_refused_and_the_engine_goes_on(
    tmp_path: Path, tiny: TinyModel, damage: Callable[[Path, str], str]
) -> None:
    config, path = config_of("bf16"), tmp_path / "x.image"
    key = damage(path, convert(tiny.folder, path, config))
    engine = make_engine(tiny.folder, "other", precision="bf16")
    with pytest.raises(ImageDamaged):
        engine.load_image("m", path, key, ask_canary=True)
    assert "m" not in engine._models
    engine.load_model("m", tiny.folder)
    assert answers_of(engine) == answers_of(make_engine(tiny.folder, precision="bf16"))


@needs_kernels
@pytest.mark.parametrize("place", ["layers.0.qkv.packed", "layers.1.mlp_out.packed", "head.packed"])
def test_weights_that_are_compared_in_the_first_pass_say_nothing_wrong(
    tmp_path: Path, tiny: TinyModel, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded again in a process, without its canary: most of its bytes are read by the first prompt's pass."""
    monkeypatch.setattr(image_file, "_CHUNK_BYTES", 4096)
    config, path = config_of("bf16"), tmp_path / "x.image"
    key = convert(tiny.folder, path, config)
    image = open_image(path)
    data = bytearray(path.read_bytes())
    at = len(data) - image.body.nbytes + image.offset(place) + image.tensors[place].nbytes - 1
    data[at] ^= 32
    path.unlink()
    path.write_bytes(data)
    engine = make_engine(tiny.folder, "other", precision="bf16")
    alone = run_all(engine, [make_request("x", PROMPTS[0], 8, model="other")])
    engine.load_image("m", path, key, ask_canary=False)
    engine.add(make_request("x", PROMPTS[0], 8, model="other"))
    for name in ("a", "b"):
        engine.add(make_request(name, PROMPTS[1], 8))
    tokens: dict[str, list[int]] = {"x": [], "a": [], "b": []}
    errors: dict[str, str] = {}
    damaged: dict[str, str] = {}
    while engine.has_work:
        report = engine.step()
        damaged |= report.damaged
        for delta in report.deltas:
            tokens[delta.sequence_id] += delta.tokens
            if delta.error is not None:
                errors[delta.sequence_id] = delta.error
    assert list(damaged) == ["m"] and errors.keys() == {"a", "b"}
    assert tokens == {"x": list(alone["x"].tokens), "a": [], "b": []}
    engine.add(make_request("late", PROMPTS[1], 8))
    assert engine.step().damaged.keys() == {"m"}, "until it is unloaded"
    engine.unload_model("m")
    with pytest.raises(ImageDamaged):
        engine.load_image("m", path, key, ask_canary=True)
    engine.load_model("m", tiny.folder)
    assert answers_of(engine) == answers_of(make_engine(tiny.folder, precision="bf16"))


@needs_kernels
def test_a_vanished_image_is_an_os_error_and_the_handle_is_free(tmp_path: Path, tiny: TinyModel) -> None:
    engine = Engine(config_of())
    with pytest.raises(FileNotFoundError):
        engine.load_image("m", tmp_path / "gone.image", "key", ask_canary=False)
    engine.load_model("m", tiny.folder)


@needs_kernels
def test_a_load_beside_answers_leaves_them_as_they_are(tmp_path: Path, tiny: TinyModel) -> None:
    config = config_of("bf16")
    key = convert(tiny.folder, tmp_path / "x.image", config)
    engine = make_engine(tiny.folder, precision="bf16")
    alone = answers_of(engine)

    def load(step: int) -> None:
        if step == 3:
            engine.load_image("b", tmp_path / "x.image", key, ask_canary=True)

    requests = [make_request(str(n), prompt, 24) for n, prompt in enumerate(PROMPTS)]
    assert run_all(engine, requests, before_step=load) == alone


def test_plain_torch_has_no_images(tmp_path: Path, tiny: TinyModel) -> None:
    with pytest.raises(ModelRefusal, match="TorchDecoder"):
        convert(tiny.folder, tmp_path / "x.image", config_of(kernels="torch"))
    assert os.listdir(tmp_path) == []


def test_a_key_names_content_precision_and_device() -> None:
    keys = {
        image_key(content, EngineConfig(precision=precision, device=device))
        for content in ("a", "b")
        for precision in ("bf16", "int8")
        for device in ("cpu", "cuda")
    }
    assert len(keys) == 8
    assert image_key("a", EngineConfig(device="cuda:0")) == image_key("a", EngineConfig(device="cuda:1"))
    assert image_key("a", EngineConfig(max_batch=1)) == image_key("a", EngineConfig(max_batch=9))


@needs_kernels
def test_positions_end_where_the_option_says(tmp_path: Path, tiny: TinyModel) -> None:
    """The same image serves options of different context lengths."""
    config = config_of()
    key = convert(tiny.folder, tmp_path / "x.image", config)
    assert open_model_image(tmp_path / "x.image", key, 64).spec.max_positions == 64


@pytest.mark.parametrize(
    ("greedy", "margins", "is_exact", "differs"),
    [
        pytest.param((1, 2, 3), (9.0, 9.0, 9.0), False, False, id="the same"),
        pytest.param((1, 2, 4), (9.0, 9.0, 9.0), False, True, id="a sure choice differs"),
        pytest.param((1, 2, 4), (9.0, 9.0, 0.1), False, False, id="a close one may, on a GPU"),
        pytest.param((1, 2, 4), (9.0, 9.0, 0.1), True, True, id="but not where bits are always the same"),
        pytest.param((1, 2), (9.0, 9.0), False, True, id="shorter"),
    ],
)
def test_canary(greedy: tuple[int, ...], margins: tuple[float, ...], is_exact: bool, differs: bool) -> None:
    kept = Canary((1, 2, 3), margins)
    now = Canary(greedy, margins)
    if len(greedy) == 3:
        assert kept.differs_from(now, is_exact=is_exact) is differs
    else:
        assert Canary((1, 2, 3), (9.0,) * 3).differs_from(now, is_exact=is_exact)


def test_meta_holds_no_path(tmp_path: Path, tiny: TinyModel) -> None:
    if load_library().library is None:
        pytest.skip("no kernels")
    convert(tiny.folder, tmp_path / "x.image", config_of())
    assert str(tiny.folder) not in json.dumps(open_image(tmp_path / "x.image").meta)
