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
from safetensors.torch import load_file, save_file

from services.worker.engine import Engine, EngineConfig, ModelRefusal
from services.worker.engine.families import FAMILIES
from services.worker.engine.spec import spec_from_config
from shared import gpt_types, llama_types
from shared.llama_types import LLAMA_ARCHITECTURES
from shared.model_config import ROPE_PARAMETERS, ModelTypeError
from shared.model_folder import ModelFolderError, ModelFolderLimits, inspect_model_folder
from shared.model_type import ARCHITECTURES, describe_model_type
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
GPT_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "eos_token_id": 257,
    "bos_token_id": 256,
}
GPT_CASES: list[tuple[str, dict[str, Any]]] = [
    ("GPTJForCausalLM", {**GPT_SIZES, "rotary_dim": 4}),
    ("GPTJForCausalLM", {**GPT_SIZES, "rotary_dim": 8, "n_inner": 48, "tie_word_embeddings": True}),
    ("CodeGenForCausalLM", {**GPT_SIZES, "rotary_dim": 4}),
    ("GPTNeoXForCausalLM", {**SIZES}),
    ("GPTNeoXForCausalLM", {**SIZES, "use_parallel_residual": False, "attention_bias": False}),
    (
        "GPTNeoXForCausalLM",
        {
            **SIZES,
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 500.0,
                "factor": 2.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    ("GPT2LMHeadModel", {**GPT_SIZES}),
    ("GPT2LMHeadModel", {**GPT_SIZES, "tie_word_embeddings": False, "activation_function": "relu"}),
    ("OPTForCausalLM", {**SIZES, "ffn_dim": 48, "pad_token_id": 1}),
    ("OPTForCausalLM", {**SIZES, "ffn_dim": 48, "enable_bias": False, "tie_word_embeddings": False}),
    ("BloomForCausalLM", {**GPT_SIZES, "hidden_size": 32}),
    ("BloomForCausalLM", {**GPT_SIZES, "hidden_size": 32, "seq_length": 64, "layer_norm_epsilon": 1e-3}),
]
ALL_CASES = CASES + GPT_CASES
ALL_IDS = [f"{name}-{index}" for index, (name, _) in enumerate(ALL_CASES)]
IDS = [f"{name}-{index}" for index, (name, _) in enumerate(CASES)]


def save_by_transformers(
    folder: Path, architecture: str, changes: dict[str, Any], shard_size: str = "1GB"
) -> None:
    model_class = getattr(transformers, architecture)
    sizes = SIZES if architecture in LLAMA_ARCHITECTURES else {}
    config = model_class.config_class(**(sizes | changes))
    torch.manual_seed(0)
    model_class(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE})


@pytest.mark.parametrize(("architecture", "changes"), ALL_CASES, ids=ALL_IDS)
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


@pytest.mark.parametrize(("architecture", "changes"), ALL_CASES, ids=ALL_IDS)
def test_engine_loads_a_registered_folder(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    save_by_transformers(tmp_path, architecture, changes)
    inspect_model_folder(tmp_path, ModelFolderLimits())

    engine = Engine(EngineConfig(kv_tokens=256))

    assert engine.load_model("m", tmp_path).vocab_size == VOCABULARY


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


@pytest.mark.parametrize(("architecture", "changes"), GPT_CASES, ids=ALL_IDS[len(CASES) :])
def test_engine_reads_a_registered_gpt_config_the_same_way(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    save_by_transformers(tmp_path, architecture, changes)
    config = json.loads((tmp_path / "config.json").read_text())

    ours = describe_model_type(config)
    spec = spec_from_config(config, {})

    shapes = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim")
    arithmetic = ("norm", "norm_eps", "activation", "is_gated", "residual", "position", "qk_norm")
    biases = ("qkv_bias", "output_bias", "mlp_bias", "head_bias")
    same = shapes + arithmetic + biases
    assert {name: ours.canonical[name] for name in same} == {name: getattr(spec, name) for name in same}
    assert ours.canonical["embedding_norm"] == spec.has_embedding_norm
    assert (ours.vocab_size, ours.tied_embeddings) == (spec.vocab_size, spec.tied_embeddings)
    assert ours.context_tokens == spec.max_positions
    assert ours.canonical["positions"] == (spec.max_positions if spec.position == "learned" else None)
    rope = None if spec.rope is None else dataclasses.asdict(spec.rope)
    expected = ours.canonical["rope"]
    assert expected == (None if rope is None else {key: rope[key] for key in expected})


@pytest.mark.parametrize(
    ("architecture", "changes", "prefix", "buffer"),
    [
        ("GPT2LMHeadModel", GPT_SIZES, "transformer.", "h.1.attn.bias"),
        ("GPTNeoXForCausalLM", SIZES, "gpt_neox.", "layers.2.attention.masked_bias"),
        ("BloomForCausalLM", {**GPT_SIZES, "hidden_size": 32}, "transformer.", None),
        ("OPTForCausalLM", {**SIZES, "ffn_dim": 48, "pad_token_id": 1}, "model.", None),
    ],
)
@pytest.mark.parametrize("is_sound", [True, False])
def test_old_names_and_buffers_register_where_the_engine_loads_them_and_nothing_else_does(
    tmp_path: Path,
    architecture: str,
    changes: dict[str, Any],
    prefix: str,
    buffer: str | None,
    is_sound: bool,
) -> None:
    save_by_transformers(tmp_path, architecture, changes)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix(prefix): tensor.clone() for name, tensor in load_file(path).items()}
    if buffer is not None:
        tensors[buffer] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    if not is_sound:
        tensors["h.9.attn.bias"] = torch.ones(1)
    path.unlink()
    save_file(tensors, path)
    engine = Engine(EngineConfig(kv_tokens=256))

    if is_sound:
        inspect_model_folder(tmp_path, ModelFolderLimits())
        engine.load_model("m", tmp_path)
    else:
        with pytest.raises(ModelFolderError, match="h.9.attn.bias"):
            inspect_model_folder(tmp_path, ModelFolderLimits())
        with pytest.raises(ModelRefusal, match="h.9.attn.bias"):
            engine.load_model("m", tmp_path)


def test_engine_describes_every_type_that_registers_and_no_other() -> None:
    assert {row.model_type for row in ARCHITECTURES.values()} == set(FAMILIES)


def test_engine_serves_every_activation_that_registers_for_gpt_types() -> None:
    for activation in gpt_types.ACTIVATIONS:
        config = {**GPT_SIZES, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        config["activation_function"] = activation
        ours = describe_model_type(config).canonical["activation"]
        assert ours == spec_from_config(config, {}).activation


def test_engine_serves_every_activation_rope_and_architecture_that_registers() -> None:
    for name, architecture in LLAMA_ARCHITECTURES.items():
        config = SIZES | {"architectures": [name], "model_type": architecture.model_type}
        config |= {"sliding_window": None, "use_sliding_window": False, "head_dim": 8, "rope_theta": 1e4}
        for activation in llama_types.ACTIVATIONS:
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
