"""Slots and the host tier, in host memory: what is in a slot is what was in the image, and both are bounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.worker.engine.api import EngineConfig
from services.worker.engine.cuda.decoder import CudaDecoder
from services.worker.engine.cuda.placement import ARENA, Placement, pack_arena
from services.worker.engine.cuda.slots import Slots, content_sum
from services.worker.engine.family_weights import FamilyWeights
from services.worker.engine.images.convert import convert
from services.worker.engine.images.host_images import HostImages
from services.worker.engine.images.image_file import ImageDamaged, open_image, write_image
from services.worker.engine.images.model_image import open_model_image
from services.worker.engine.spec import DecoderSpec, spec_from_config
from services.worker.engine.weights import Checkpoint
from tests.unit.worker.engine.builders import save_model, tiny_config
from tests.unit.worker.engine.cuda.interpreted import run_checks

CPU = torch.device("cpu")
SPEC = replace(spec_from_config(tiny_config().to_dict(), {}), max_positions=64)


def config_of(host_bytes: int = 10**9) -> EngineConfig:
    return EngineConfig(
        device="cuda", precision="bf16", max_batch=4, max_context_tokens=64, host_image_bytes=host_bytes
    )


def make(spec: DecoderSpec) -> CudaDecoder:
    return CudaDecoder(spec, "bf16", CPU, 4, 64)


def content_of(number: int, spec: DecoderSpec = SPEC) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    size = len(make(spec).arena.memory)
    return torch.randint(0, 255, (size,), generator=generator, dtype=torch.uint8)


def test_models_that_take_turns_in_a_slot_answer_as_plain_torch() -> None:
    run_checks("tests.unit.worker.engine.cuda.placement_checks")


def test_a_slot_that_was_left_is_taken_again_at_the_same_address() -> None:
    slots = Slots(CPU, make)
    first = slots.place(SPEC, content_of(1))
    second = slots.place(SPEC, content_of(2))
    assert first is not second
    address = first.arena.memory.data_ptr()
    slots.leave(first)
    other_end = replace(SPEC, eos_token_ids=(3,))
    third = slots.place(other_end, content_of(3))
    assert third is first and third.arena.memory.data_ptr() == address
    assert torch.equal(third.arena.memory, content_of(3))
    assert third.spec.eos_token_ids == (3,)
    assert torch.equal(second.arena.memory, content_of(2))


def test_another_layout_takes_another_slot() -> None:
    slots = Slots(CPU, make)
    slots.leave(slots.place(SPEC, content_of(1)))
    longer = replace(SPEC, layers=SPEC.layers + 1)
    assert len(slots.place(longer, content_of(1, longer)).arena.memory) > len(content_of(1))


def test_a_load_that_fails_leaves_the_slot_free() -> None:
    slots = Slots(CPU, make)
    decoder = slots.place(SPEC, content_of(1))
    slots.leave(decoder)
    with pytest.raises(ValueError, match="bytes of weights"):
        slots.place(SPEC, content_of(1)[:-8])
    assert slots.place(SPEC, content_of(2)) is decoder


def test_an_image_is_byte_for_byte_a_slot(tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_config(), seed=2)
    convert(tmp_path / "model", tmp_path / "x.image", "key", config_of())
    found = open_model_image(tmp_path / "x.image", "key", 64)
    with Checkpoint(tmp_path / "model") as checkpoint:
        arena = pack_arena(found.spec, FamilyWeights(found.spec, checkpoint), "bf16")
    assert torch.equal(found.weights[ARENA], arena.memory)
    placed = Placement(config_of(), CPU).load(found, lambda _: None)
    assert torch.equal(placed.arena.memory, arena.memory)
    assert found.content_sum == content_sum(arena.memory)


def test_what_arrives_wrong_is_found_and_its_slot_is_free(tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_config(), seed=2)
    convert(tmp_path / "model", tmp_path / "x.image", "key", config_of())
    found = open_model_image(tmp_path / "x.image", "key", 64)
    placement = Placement(config_of(), CPU)
    with pytest.raises(ImageDamaged, match="arrived"):
        placement.load(replace(found, content_sum=found.content_sum + 1), lambda _: None)
    decoder = placement.load(found, lambda _: None)
    placement.leave(decoder)
    assert placement.load(found, lambda _: None) is decoder


# ---- the host tier


def put(folder: Path, key: str, number: int, size_bytes: int = 800) -> Path:
    path = folder / key
    tensor = torch.full((size_bytes,), number, dtype=torch.uint8)
    write_image(path, {ARENA: tensor}, {"key": key})
    return path


class Copies:
    """Counts the chunks that were verified: none of what is in host memory already."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _bytes: int) -> None:
        self.count += 1


def test_the_longest_unused_gives_its_memory_to_the_next(tmp_path: Path) -> None:
    host, copies = HostImages(1700, is_pinned=False), Copies()
    images = {key: open_image(put(tmp_path, key, number)) for number, key in enumerate("abc", 1)}

    def get(key: str) -> torch.Tensor:
        found = host.get(key, images[key], ARENA, copies)
        assert torch.equal(found, images[key].tensors[ARENA])
        return found

    first, second = get("a"), get("b")
    assert get("a").data_ptr() == first.data_ptr() and copies.count == 2
    address = second.data_ptr()
    assert get("c").data_ptr() == address, "b was unused for longer"
    assert copies.count == 3
    assert get("a").data_ptr() == first.data_ptr() and copies.count == 3
    get("b")
    assert copies.count == 4


def test_what_does_not_fit_is_read_from_the_map(tmp_path: Path) -> None:
    host = HostImages(799, is_pinned=False)
    image = open_image(put(tmp_path, "a", 1))
    assert host.get("a", image, ARENA, Copies()).data_ptr() == image.tensors[ARENA].data_ptr()


def test_room_is_made_for_one_of_another_size(tmp_path: Path) -> None:
    host, copies = HostImages(2000, is_pinned=False), Copies()
    sizes = {"a": 800, "b": 800, "c": 1600, "d": 400}
    images = {key: open_image(put(tmp_path, key, 7, size)) for key, size in sizes.items()}
    for key in "abcd":
        assert len(host.get(key, images[key], ARENA, copies)) == sizes[key]
    host.get("c", images["c"], ARENA, copies)
    host.get("d", images["d"], ARENA, copies)
    assert copies.count == 4, "c and d fit together"


def test_a_damaged_image_does_not_stay_in_host_memory(tmp_path: Path) -> None:
    path = put(tmp_path, "a", 1)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.unlink()
    path.write_bytes(data)
    host = HostImages(1700, is_pinned=False)
    for _ in range(2):
        with pytest.raises(ImageDamaged):
            host.get("a", open_image(path), ARENA, Copies())


def test_an_image_that_is_made_anew_is_read_anew(tmp_path: Path) -> None:
    """Its key is the damaged one's, which was in host memory."""
    for seed in (2, 3):
        save_model(tmp_path / f"model{seed}", tiny_config(), seed=seed)
    placement, path = Placement(config_of(), CPU), tmp_path / "x.image"
    convert(tmp_path / "model2", path, "key", config_of())
    placement.leave(placement.load(open_model_image(path, "key", 64), lambda _: None))
    convert(tmp_path / "model3", path, "key", config_of())
    placement.forget("key")
    found = open_model_image(path, "key", 64)
    assert torch.equal(placement.load(found, lambda _: None).arena.memory, found.weights[ARENA])
