"""Three readers of one config must agree: the registration check, the engine and transformers.

Where they do not, a model is registered that no worker can load, or two models share a GPU process and compute differently.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from services.worker.engine.spec import spec_from_config
from shared.model_folder import ModelFolderLimits, inspect_model_folder
from shared.model_type import ACTIVATIONS, ARCHITECTURES, ROPE_PARAMETERS, ModelTypeError, describe_model_type
from tests.model_folders import TEMPLATE, VOCABULARY, make_tokenizer, write_json

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"tie_word_embeddings": True, "head_dim": 16}),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    ("MistralForCausalLM", {"sliding_window": None}),
    ("MistralForCausalLM", {"sliding_window": 16}),
    ("Qwen2ForCausalLM", {}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ("Qwen3ForCausalLM", {"head_dim": 16}),
    ("Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": True}),
]
IDS = [f"{name}-{index}" for index, (name, _) in enumerate(CASES)]


def save_by_transformers(
    folder: Path, architecture: str, changes: dict[str, Any], shard_size: str = "1GB"
) -> None:
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**(SIZES | changes))
    torch.manual_seed(0)
    model_class(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE})


@pytest.mark.parametrize(("architecture", "changes"), CASES, ids=IDS)
def test_folder_saved_by_transformers_passes_with_its_parameter_count(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    save_by_transformers(tmp_path, architecture, changes)

    manifest = inspect_model_folder(tmp_path, ModelFolderLimits())

    loaded = getattr(transformers, architecture).from_pretrained(tmp_path)
    assert manifest.parameter_count == sum(parameter.numel() for parameter in loaded.parameters())


def test_shards_saved_by_transformers_pass(tmp_path: Path) -> None:
    save_by_transformers(tmp_path, "LlamaForCausalLM", {}, shard_size="20KB")

    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    inspect_model_folder(tmp_path, ModelFolderLimits())


@pytest.mark.parametrize(("architecture", "changes"), CASES, ids=IDS)
def test_engine_reads_a_registered_config_the_same_way(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    save_by_transformers(tmp_path, architecture, changes)
    config = json.loads((tmp_path / "config.json").read_text())

    ours = describe_model_type(config)
    spec = spec_from_config(config, {})

    shapes = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim")
    arithmetic = ("norm_eps", "activation", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")
    same = shapes + arithmetic
    assert {name: ours.canonical[name] for name in same} == {name: getattr(spec, name) for name in same}
    assert (ours.vocab_size, ours.tied_embeddings) == (spec.vocab_size, spec.tied_embeddings)
    assert ours.context_tokens == spec.max_positions
    assert spec.rope is not None
    rope = dataclasses.asdict(spec.rope)
    rope["original_max_position_embeddings"] = float(rope.pop("original_max_positions"))
    assert ours.canonical["rope"] == {key: rope[key] for key in ours.canonical["rope"]}


def test_engine_serves_every_activation_rope_and_architecture_that_registers() -> None:
    for name, architecture in ARCHITECTURES.items():
        config = SIZES | {"architectures": [name], "model_type": architecture.model_type}
        config |= {"sliding_window": None, "use_sliding_window": False, "head_dim": 8, "rope_theta": 1e4}
        for activation in ACTIVATIONS:
            describe_model_type(config | {"hidden_act": activation})
            spec_from_config(config | {"hidden_act": activation}, {})
        for kind in ROPE_PARAMETERS:
            rope = {**LLAMA3_ROPE, "rope_type": kind}
            rope = {key: rope[key] for key in ("rope_type", "rope_theta", *ROPE_PARAMETERS[kind])}
            describe_model_type(config | {"rope_parameters": rope})
            spec_from_config(config | {"rope_parameters": rope}, {})


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_rope_that_the_engine_lacks_does_not_register(kind: str) -> None:
    config = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}

    with pytest.raises(ModelTypeError):
        describe_model_type(
            config | {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}}
        )
