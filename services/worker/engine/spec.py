"""A decoder described by values: read from a checkpoint's config.json, refused when it asks for what we do not do.

Which keys of the config mean what stands in `families.py`; weights and arithmetic are elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .api import ModelRefusal
from .config_file import Config, flag, named, number, positive, read_json, token_ids
from .families import FAMILIES, Family


class ModelSpec(Protocol):
    """What the engine asks of any model, however it is computed."""

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def kv_shape(self) -> tuple[int, int, int]: ...


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


class NotDescribed(ModelRefusal):
    """Our decoders have no description of this computation; transformers' own module may serve it."""


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
_ROPE_KINDS = ("default", "linear", "llama3")


def read_configs(folder: Path) -> tuple[Config, Config]:
    """config.json and, where there is one, generation_config.json. Raises ModelRefusal."""
    generation_path = folder / "generation_config.json"
    return read_json(folder / "config.json"), read_json(generation_path) if generation_path.exists() else {}


def spec_from_config(config: Config, generation: Config) -> DecoderSpec:
    """generation: generation_config.json, whose eos_token_id wins over config.json's.

    Raises NotDescribed for what transformers may still compute, ModelRefusal for what nobody should.
    """
    family = _family(config)
    keys = family.keys
    heads = positive(config, keys.heads)
    kv_heads = positive(config, keys.kv_heads, heads) if keys.kv_heads else heads
    if heads % kv_heads:
        raise ModelRefusal(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
    if heads % family.qkv_groups:
        raise ModelRefusal(f"config.json: {heads} attention heads do not make {family.qkv_groups} groups")
    hidden_size = positive(config, keys.hidden_size)
    head_dim = (
        positive(config, keys.head_dim, hidden_size // heads) if keys.head_dim else hidden_size // heads
    )
    if not keys.head_dim and hidden_size % heads:
        raise ModelRefusal(
            f"config.json: {heads} attention heads do not divide the hidden size {hidden_size}"
        )
    for key in family.as_hidden_size:
        if config.get(key) not in (None, hidden_size):
            raise NotDescribed(
                f"config.json: {key} {config[key]!r} other than the hidden size is not described"
            )
    layers = positive(config, keys.layers)
    is_parallel = family.residual != "parallel_two_norms" or flag(config, "use_parallel_residual", True)
    return DecoderSpec(
        model_type=str(config["model_type"]),
        vocab_size=positive(config, ("vocab_size",)),
        hidden_size=hidden_size,
        intermediate_size=positive(config, keys.intermediate_size or ("",), 4 * hidden_size),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm=family.norm,
        norm_eps=number(config, keys.norm_eps, family.norm_eps_default),
        activation=_activation(config, family),
        is_gated=family.is_gated,
        residual=family.residual if is_parallel else "sequential",
        position=family.position,
        rope=_rope(config, family, head_dim) if family.position == "rope" else None,
        has_embedding_norm=family.names.embedding_norm is not None,
        max_positions=_max_positions(config, family, layers),
        tied_embeddings=flag(config, "tie_word_embeddings", family.is_tied_by_default),
        qkv_bias=_bias(config, family.qkv_bias),
        output_bias=_bias(config, family.output_bias),
        mlp_bias=_bias(config, family.mlp_bias),
        head_bias=family.head_bias,
        qk_norm=family.qk_norm,
        eos_token_ids=token_ids(generation.get("eos_token_id")) or token_ids(config.get("eos_token_id")),
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


def alibi_slopes(heads: int) -> list[float]:
    """What each head subtracts from a score per token of distance.

    Source: ALiBi (arXiv 2108.12409) section 3 for powers of two; other counts take the next power's odd ones, as the
    paper's published code and BLOOM do.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (index + 1) / power) for index in range(power)]
    return slopes + [2.0 ** (-4.0 * (2 * index + 1) / power) for index in range(heads - power)]


def _llama3_frequency(frequency: float, rope: RopeSpec) -> float:
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    if turns > rope.high_freq_factor:
        return frequency
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - share) * frequency / rope.factor + share * frequency


def _family(config: Config) -> Family:
    if config.get("quantization_config") is not None:
        raise ModelRefusal(
            "config.json: quantized checkpoints are not served; bring the full-precision weights"
        )
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise NotDescribed(
            f"config.json: model_type {model_type!r} is not described; known: {', '.join(FAMILIES)}"
        )
    for key, value in family.fixed.items():
        if flag(config, key, value) != value:
            raise NotDescribed(f"config.json: {key} {config[key]!r} is not described for {model_type}")
    return family


def _activation(config: Config, family: Family) -> str:
    name = named(config, family.keys.activation) or family.activation_default
    if name not in _ACTIVATIONS:
        raise NotDescribed(
            f"config.json: {family.keys.activation[0]} {name!r} is not described; known: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _bias(config: Config, bias: bool | tuple[str, bool]) -> bool:
    return bias if isinstance(bias, bool) else flag(config, *bias)


def _rope(config: Config, family: Family, head_dim: int) -> RopeSpec:
    if family.rope == "gptj":
        # null would turn all of the hidden size as if it were one head; nothing is published that way.
        return RopeSpec(
            10000.0, _rotary_dim(positive(config, ("rotary_dim",)), head_dim), is_interleaved=True
        )
    settings = _rope_settings(config)
    if family.rope == "neox":
        theta = number(config, ("rotary_emb_base",), 10000.0)
        share = number(settings, ("partial_rotary_factor",), number(config, ("rotary_pct",), 0.25))
    else:
        theta = number(config, ("rope_theta",), 10000.0)
        share = number(settings, ("partial_rotary_factor",), number(config, ("partial_rotary_factor",), 1.0))
        if share != 1.0:
            raise NotDescribed("config.json: partial_rotary_factor other than 1 is not described")
    return _scaled_rope(
        settings, number(settings, ("rope_theta",), theta), _rotary_dim(int(head_dim * share), head_dim)
    )


def _rope_settings(config: Config) -> Config:
    """Newer checkpoints say `rope_parameters`, older ones `rope_scaling`; which wins, readers do not agree on."""
    newer, older = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if newer and older and newer != older:
        raise ModelRefusal("config.json: rope_parameters and rope_scaling differ")
    settings = newer or older
    if not isinstance(settings, dict):
        raise ModelRefusal("config.json: rope settings must be an object")
    return settings


def _scaled_rope(settings: Config, theta: float, rotary_dim: int) -> RopeSpec:
    kind = str(settings.get("rope_type", settings.get("type", "default")))
    if kind not in _ROPE_KINDS:
        raise NotDescribed(
            f"config.json: rope type {kind!r} is not described; known: {', '.join(_ROPE_KINDS)}"
        )
    if kind == "default":
        return RopeSpec(theta, rotary_dim)
    try:
        if kind == "linear":
            return RopeSpec(theta, rotary_dim, kind=kind, factor=float(settings["factor"]))
        return RopeSpec(
            theta,
            rotary_dim,
            kind=kind,
            factor=float(settings["factor"]),
            low_freq_factor=float(settings["low_freq_factor"]),
            high_freq_factor=float(settings["high_freq_factor"]),
            original_max_positions=int(settings["original_max_position_embeddings"]),
        )
    except KeyError as missing:
        raise ModelRefusal(f"config.json: rope type {kind!r} without {missing}") from missing
    except (TypeError, ValueError) as problem:
        raise ModelRefusal(f"config.json: rope type {kind!r}: {problem}") from problem


def _rotary_dim(rotary_dim: int, head_dim: int) -> int:
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise ModelRefusal(f"config.json: cannot turn {rotary_dim} of a head's {head_dim} channels in pairs")
    return rotary_dim


def _max_positions(config: Config, family: Family, layers: int) -> int:
    positions = positive(config, family.keys.positions, family.positions_default)
    return min([positions, *_windows(config, family, layers)])


def _windows(config: Config, family: Family, layers: int) -> list[int]:
    """Lengths of the sliding windows of those layers that have one."""
    if family.windows == "mistral":
        # Left out is not the same as null.
        has_window = config.get("sliding_window", 4096) is not None
        return [positive(config, ("sliding_window",), 4096)] if has_window else []
    if family.windows == "qwen" and flag(config, "use_sliding_window", False):
        kinds = config.get("layer_types")
        if kinds is None:
            first = config.get("max_window_layers", 28)
            has_window = type(first) is not int or first < layers
        else:
            has_window = "sliding_attention" in kinds
        return [positive(config, ("sliding_window",), 4096)] if has_window else []
    return []
