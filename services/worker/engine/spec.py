"""A decoder described by values: read from a checkpoint's config.json, refused when it asks for what we do not do.

A new model type starts here: a new field where it differs, a new row in `_FAMILIES`. Weights and arithmetic are
elsewhere (`weights.py`, `decoder.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .api import ModelRefusal


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position encoding of a head's first `rotary_dim` channels.

    kind: "default", "linear" (factor) or "llama3" (all five). is_interleaved: channels 2i and 2i + 1 turn together
    (GPT-J, CodeGen) instead of i and i + rotary_dim / 2.
    """

    theta: float
    rotary_dim: int
    is_interleaved: bool = False
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Shapes and arithmetic of one pre-norm decoder.

    norm: "rms" or "layer" (with bias). position: "rope", "learned" (a table added to the embedding) or "alibi" (a slope
    per head, added to the scores). activation: "silu", "gelu", "gelu_pytorch_tanh" or "relu". is_gated: the MLP multiplies
    activation(gate) by up.
    residual: "sequential" (x += attention(norm(x)); x += mlp(norm(x))), "parallel" (one norm feeds both:
    x += attention(n) + mlp(n)) or "parallel_two_norms" (both read x, each through its own norm).
    max_positions: the longest sequence the arithmetic is right for; a sliding window shortens it, since attention here
    always sees everything.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: str
    norm_eps: float
    activation: str
    is_gated: bool
    residual: str
    position: str
    rope: RopeSpec | None
    has_embedding_norm: bool
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """What models must share to share a KV pool: (layers, kv_heads, head_dim)."""
        return self.layers, self.kv_heads, self.head_dim


@dataclass(frozen=True, slots=True)
class _Family:
    """What a model type fixes in its code and therefore does not say in config.json. None: config.json says it."""

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(qkv_bias=False, output_bias=False, mlp_bias=False),
    "qwen2": _Family(qkv_bias=True, output_bias=False, mlp_bias=False),
    "qwen3": _Family(mlp_bias=False, qk_norm=True),
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}


def read_spec(folder: Path) -> DecoderSpec:
    """Reads config.json and, where there is one, generation_config.json. Raises ModelRefusal."""
    config = _read_json(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    return spec_from_config(config, generation)


def spec_from_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> DecoderSpec:
    """generation: generation_config.json, whose eos_token_id wins over config.json's. Raises ModelRefusal."""
    model_type = config.get("model_type")
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise ModelRefusal(
            f"config.json: model_type {model_type!r} is not served; known: {', '.join(_FAMILIES)}"
        )
    activation = str(config.get("hidden_act", "silu"))
    if activation not in _ACTIVATIONS:
        raise ModelRefusal(
            f"config.json: hidden_act {activation!r} is not served; known: {', '.join(_ACTIVATIONS)}"
        )
    heads = _positive(config, "num_attention_heads")
    kv_heads = _positive(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelRefusal(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
    hidden_size = _positive(config, "hidden_size")
    head_dim = _positive(config, "head_dim", hidden_size // heads)
    attention_bias = bool(config.get("attention_bias", False))
    return DecoderSpec(
        model_type=str(model_type),
        vocab_size=_positive(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(config, "intermediate_size"),
        layers=_positive(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm="rms",
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=_ACTIVATIONS[activation],
        is_gated=True,
        residual="sequential",
        position="rope",
        rope=_rope(config, head_dim),
        has_embedding_norm=False,
        max_positions=_max_positions(config),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
        head_bias=False,
        qk_norm=family.qk_norm,
        eos_token_ids=_token_ids(generation.get("eos_token_id")) or _token_ids(config.get("eos_token_id")),
    )


def rotary_frequencies(rope: RopeSpec) -> list[float]:
    """Radians per position for each of the rotary_dim / 2 pairs.

    Source: RoFormer (arXiv 2104.09864) section 3.4.2; "linear" divides every frequency by the factor (arXiv 2306.15595);
    "llama3" divides the slow ones only and blends between, as Llama 3.1's published config defines.
    """
    frequencies = [rope.theta ** (-pair / rope.rotary_dim) for pair in range(0, rope.rotary_dim, 2)]
    if rope.kind == "linear":
        return [frequency / rope.factor for frequency in frequencies]
    if rope.kind == "llama3":
        return [_llama3_frequency(frequency, rope) for frequency in frequencies]
    return frequencies


def _llama3_frequency(frequency: float, rope: RopeSpec) -> float:
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    if turns > rope.high_freq_factor:
        return frequency
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - share) * frequency / rope.factor + share * frequency


def _rope(config: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """Newer checkpoints say `rope_parameters`, older ones `rope_theta` and `rope_scaling` with `type` or `rope_type`."""
    parameters = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if kind not in ("default", "linear", "llama3"):
        raise ModelRefusal(f"config.json: rope type {kind!r} is not served; known: default, linear, llama3")
    if float(parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ModelRefusal("config.json: partial_rotary_factor other than 1 is not served")
    if kind == "default":
        return RopeSpec(theta, head_dim)
    try:
        if kind == "linear":
            return RopeSpec(theta, head_dim, kind=kind, factor=float(parameters["factor"]))
        return RopeSpec(
            theta,
            head_dim,
            kind=kind,
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(parameters["original_max_position_embeddings"]),
        )
    except KeyError as missing:
        raise ModelRefusal(f"config.json: rope type {kind!r} without {missing}") from missing


def _max_positions(config: Mapping[str, Any]) -> int:
    positions = _positive(config, "max_position_embeddings", 2048)
    window = config.get("sliding_window")
    if isinstance(window, int) and config.get("use_sliding_window", True):
        return min(positions, window)
    return positions


def _positive(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelRefusal(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, int):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return tuple(value)
    raise ModelRefusal(f"eos_token_id must be an integer or a list of integers, got {value!r}")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelRefusal(f"{path.name}: {problem}") from problem
    if not isinstance(value, dict):
        raise ModelRefusal(f"{path.name}: must hold a JSON object")
    return value
