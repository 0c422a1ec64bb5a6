"""Checkpoints as they were saved over the years: other prefixes, derived buffers, tied heads written out or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from services.worker.engine import ModelRefusal
from services.worker.engine.families import FAMILIES
from services.worker.engine.spec import DecoderSpec, NotDescribed, alibi_slopes, spec_from_config
from tests.unit.worker.engine.builders import make_engine, make_request, oracle_greedy, run_all, save_model
from tests.unit.worker.engine.family_configs import TYPES, VARIANTS

Tensors = dict[str, torch.Tensor]
PROMPT = [5, 6, 7, 40, 41]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    # Independent of the mapped file that is about to be replaced.
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(change(tensors), path)


def greedy(folder: Path) -> list[int]:
    return run_all(make_engine(folder), [make_request("a", PROMPT, 12)])["a"].tokens


def prefix_of(name: str) -> str:
    return FAMILIES[name].prefixes[0]


@pytest.mark.parametrize("name", TYPES)
def test_base_model_s_prefix_may_be_missing(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, VARIANTS[name])
    expected = greedy(tmp_path)
    rewrite(tmp_path, lambda tensors: {key.removeprefix(prefix_of(name)): tensors[key] for key in tensors})
    assert greedy(tmp_path) == expected


def test_opt_s_older_prefix_is_known(tmp_path: Path) -> None:
    save_model(tmp_path, VARIANTS["opt"])
    expected = greedy(tmp_path)
    rewrite(tmp_path, lambda tensors: {key.removeprefix("model."): tensors[key] for key in tensors})
    assert greedy(tmp_path) == expected


def test_gpt_neox_s_newer_head_name_is_known(tmp_path: Path) -> None:
    save_model(tmp_path, VARIANTS["gpt_neox"])
    expected = greedy(tmp_path)
    rewrite(tmp_path, lambda tensors: {key.replace("embed_out", "lm_head"): tensors[key] for key in tensors})
    assert greedy(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("llama, gelu", ("layers.2.self_attn.rotary_emb.inv_freq",)),
        ("gptj", ("h.0.attn.bias", "h.2.attn.masked_bias")),
        ("codegen", ("h.1.attn.causal_mask",)),
        ("gpt2", ("h.0.attn.bias", "h.2.attn.masked_bias")),
        ("gpt_neox", ("layers.0.attention.bias", "layers.1.attention.rotary_emb.inv_freq")),
    ],
)
def test_buffers_that_old_checkpoints_store_are_ignored_by_name(
    tmp_path: Path, name: str, buffers: tuple[str, ...]
) -> None:
    save_model(tmp_path, VARIANTS[name])
    expected = greedy(tmp_path)
    prefix = prefix_of(name.partition(",")[0])
    mask = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    rewrite(tmp_path, lambda tensors: tensors | {prefix + buffer: mask.clone() for buffer in buffers})
    assert greedy(tmp_path) == expected


@pytest.mark.parametrize("name", TYPES)
def test_tensor_that_the_config_does_not_explain_is_refused(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, VARIANTS[name])
    # As a buffer it would be known, but not of a layer that the model does not have.
    stray = f"{prefix_of(name)}{FAMILIES[name].names.layer}9.attn.bias"
    rewrite(tmp_path, lambda tensors: tensors | {stray: torch.zeros(1)})
    with pytest.raises(ModelRefusal, match="does not explain 1 tensors"):
        make_engine(tmp_path)


def test_tied_head_may_be_saved_as_well(tmp_path: Path) -> None:
    save_model(tmp_path, VARIANTS["gpt2"])
    expected = greedy(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()})
    assert greedy(tmp_path) == expected


def test_tied_head_that_differs_from_the_embedding_is_not_tied_as_in_transformers(tmp_path: Path) -> None:
    save_model(tmp_path, VARIANTS["gpt2"], scale=12.0)
    tied = greedy(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].roll(1, dims=0)},
    )
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert greedy(tmp_path) == oracle_greedy(oracle, PROMPT, 12) != tied


def spec_of(name: str, **changes: object) -> DecoderSpec:
    return spec_from_config({**VARIANTS[name].to_dict(), **changes}, {})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"activation_function": "quick_gelu"}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"_remove_final_layer_norm": True}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("bloom", {"slow_but_exact": True}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
        ("llama, gelu", {"rope_parameters": {"rope_type": "longrope"}}),
        ("llama, gelu", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("llama, gelu", {"model_type": "gemma"}),
    ],
)
def test_what_a_row_does_not_describe_is_left_to_transformers(name: str, changes: dict[str, object]) -> None:
    with pytest.raises(NotDescribed):
        spec_of(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gptj", {"rotary_dim": None}, "rotary_dim"),
        ("gptj", {"rotary_dim": 7}, "in pairs"),
        ("gptj", {"rotary_dim": 32}, "in pairs"),
        ("gptj", {"n_embd": 66}, "do not divide"),
        ("gptj", {"n_embd": 64, "hidden_size": 128}, "mean the same and differ"),
        ("codegen", {"n_head": 2}, "4 groups"),
        ("opt", {"enable_bias": "yes"}, "true or false"),
        ("gpt_neox", {"rope_parameters": {"rope_theta": -1.0}}, "rope_theta"),
        ("llama, gelu", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ("llama, gelu", {"quantization_config": {"bits": 4}}, "quantized"),
        ("llama, gelu", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "differ"),
    ],
)
def test_config_that_nobody_should_compute_is_refused(
    name: str, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ModelRefusal, match=reason) as refusal:
        spec_of(name, **changes)
    assert not isinstance(refusal.value, NotDescribed)


def test_older_configs_say_the_same_by_other_names() -> None:
    common = {"vocab_size": 100, "tie_word_embeddings": True}
    neox = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    }
    pythia = spec_from_config(
        {**common, **neox, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 500}, {}
    )
    assert pythia.rope is not None
    assert (pythia.rope.rotary_dim, pythia.rope.theta, pythia.residual) == (8, 500.0, "parallel_two_norms")
    bloom = spec_from_config(
        {**common, "model_type": "bloom", "n_embed": 64, "n_layer": 2, "num_attention_heads": 4}, {}
    )
    assert (bloom.hidden_size, bloom.heads, bloom.intermediate_size, bloom.max_positions) == (
        64,
        4,
        256,
        2048,
    )


def test_alibi_slopes_are_the_published_ones() -> None:
    assert alibi_slopes(8) == [2.0**-power for power in range(1, 9)]
    assert alibi_slopes(12) == pytest.approx(
        [2.0**-power for power in range(1, 9)] + [2.0 ** -(power + 0.5) for power in range(4)]
    )
