"""Model folders: what is read from them, and each way in which one is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.worker.engine import ModelRefusal
from services.worker.engine.spec import DecoderSpec, RopeSpec, rotary_frequencies, spec_from_config
from tests.unit.worker.engine.builders import make_engine, make_request, run_all, tiny_config
from tests.unit.worker.engine.conftest import TinyModel


def spec_of(generation: dict[str, Any] | None = None, **changes: Any) -> DecoderSpec:
    return spec_from_config({**tiny_config().to_dict(), **changes}, generation or {})


def test_spec_reads_shapes_and_defaults() -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    spec = spec_from_config(config, {})
    assert (spec.kv_heads, spec.head_dim, spec.kv_shape) == (4, 16, (2, 4, 16))
    assert (spec.rope, spec.activation, spec.tied_embeddings) == (RopeSpec(10000.0, 16), "silu", False)
    assert (spec.eos_token_ids, spec.max_positions) == ((), 2048)


@pytest.mark.parametrize(
    ("config_eos", "generation", "expected"),
    [
        (2, {}, (2,)),
        (2, {"eos_token_id": [5, 6]}, (5, 6)),
        ([2, 3], {"eos_token_id": None}, (2, 3)),
        (None, {}, ()),
        (None, {"eos_token_id": 0}, (0,)),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    config_eos: Any, generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert spec_of(generation, eos_token_id=config_eos).eos_token_ids == expected


SLIDING = {"use_sliding_window": True, "max_window_layers": 3}


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"max_position_embeddings": 300}, 300),
        ({"model_type": "mistral", "sliding_window": 100}, 100),
        ({"model_type": "mistral", "sliding_window": None}, 512),
        # transformers' default for a key left out.
        ({"model_type": "mistral", "max_position_embeddings": 8192}, 4096),
        ({"model_type": "qwen2", "sliding_window": 100, "use_sliding_window": False}, 512),
        ({"model_type": "qwen2", "sliding_window": 100}, 512),
        ({"model_type": "qwen2", "sliding_window": 100, **SLIDING}, 512),
        ({"model_type": "qwen2", "sliding_window": 100, **SLIDING, "max_window_layers": 2}, 100),
        (
            {"model_type": "qwen3", "sliding_window": 100, **SLIDING, "layer_types": ["full_attention"] * 3},
            512,
        ),
    ],
)
def test_sequences_stay_within_positions_and_sliding_window(changes: dict[str, Any], positions: int) -> None:
    assert spec_of(**changes).max_positions == positions


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_parameters": None, "rope_theta": 5e5}, RopeSpec(5e5, 16)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, RopeSpec(7.0, 16)),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeSpec(10000.0, 16, kind="linear", factor=2.0),
        ),
    ],
)
def test_rope_is_read_from_old_and_new_configs(changes: dict[str, Any], expected: RopeSpec) -> None:
    assert spec_of(**changes).rope == expected


def test_llama3_frequencies_keep_the_fast_slow_the_slow_and_blend_between() -> None:
    plain = rotary_frequencies(RopeSpec(500000.0, 128))
    scaled = rotary_frequencies(RopeSpec(500000.0, 128, False, "llama3", 8.0, 1.0, 4.0, 8192))
    ratios = [before / after for before, after in zip(plain, scaled, strict=True)]
    assert ratios[0] == 1.0
    assert ratios[-1] == pytest.approx(8.0)
    assert ratios == sorted(ratios)
    assert any(1.01 < ratio < 7.99 for ratio in ratios)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt_bigcode"}, "model_type 'gpt_bigcode'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "relu6"}, "hidden_act"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": 4}, "cannot share"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"eos_token_id": "2"}, "eos_token_id"),
    ],
)
def test_config_that_asks_for_what_is_not_served_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelRefusal, match=reason):
        spec_of(**changes)


def copy_of(tiny: TinyModel, folder: Path) -> Path:
    for path in tiny.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    # Independent of the mapped file that is about to be replaced.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))


def add_a_tensor(folder: Path) -> None:
    rewrite_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)})
    )


def reshape_a_tensor(folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(47)}))


def make_a_tensor_integer(folder: Path) -> None:
    rewrite_tensors(
        folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)})
    )


def point_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_the_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def leave_only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "safetensors"),
        (drop_a_tensor, "up_proj.weight is missing"),
        (add_a_tensor, "does not explain 1 tensors, such as model.layers.0.self_attn.q_proj.bias"),
        (reshape_a_tensor, r"model.norm.weight has shape \(47,\)"),
        (make_a_tensor_integer, "not floating"),
        (point_outside, "not a file name"),
        (break_the_index, "index.json"),
        (leave_only_a_pickle, "neither model.safetensors nor its index"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "JSON object"),
    ],
)
def test_damaged_folder_is_refused_with_the_reason_and_the_engine_goes_on(
    tmp_path: Path, tiny: TinyModel, damage: Callable[[Path], object], reason: str
) -> None:
    damage(copy_of(tiny, tmp_path))
    engine = make_engine(tiny.folder)
    with pytest.raises(ModelRefusal, match=reason):
        engine.load_model("damaged", tmp_path)
    assert len(run_all(engine, [make_request("a", [5], 3)])["a"].tokens) == 3
    engine.load_model("damaged", tiny.folder)


def test_sharded_checkpoint_answers_as_the_single_file_does(tmp_path: Path, tiny: TinyModel) -> None:
    copy_of(tiny, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, shard_names in shards.items():
        save_file({name: tensors[name].clone() for name in shard_names}, tmp_path / shard)
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: shard for shard, shard_names in shards.items() for name in shard_names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    request = make_request("a", [5, 6, 7], 12)
    sharded = run_all(make_engine(tmp_path), [request])["a"]
    assert sharded.tokens == run_all(make_engine(tiny.folder), [request])["a"].tokens


def test_engine_does_not_import_transformers() -> None:
    import subprocess
    import sys

    code = "import sys, services.worker.engine; print([m for m in ('transformers', 'shared') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
