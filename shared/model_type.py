"""What a model's config says about its arithmetic: the canonical config, the type's signature and the tensors it needs.

Pure: takes the parsed config.json, opens nothing. Knows the architectures that the engine serves and no others. Called by the
folder check at registration; a GPU process may hold two models exactly when their signatures are equal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Json = Mapping[str, Any]
Shape = tuple[int, ...]

# Raised when the meaning of the canonical config changes, so that old and new signatures never compare equal by accident.
SIGNATURE_VERSION = 1
SIGNATURE_HEX_CHARS = 16
# An added token or two must not split a type: embeddings of one type are laid out for the padded size.
VOCABULARY_PADDING = 128

# Upper bounds, a few times above the largest open models: they keep hostile configs from naming absurd allocations.
MAX_HIDDEN_SIZE = 65_536
MAX_INTERMEDIATE_SIZE = 1_048_576
MAX_LAYERS = 512
MAX_HEADS = 1_024
MAX_HEAD_DIM = 1_024
MAX_VOCABULARY = 2_097_152
MAX_CONTEXT_TOKENS = 16_777_216

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")

# Rope kind -> the numbers it needs beside theta. Kinds that depend on the length of the running sequence are left out: keys in
# the cache would have to be turned again as a sequence grows.
ROPE_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"),
}

ATTENTION_KINDS = ("full_attention", "sliding_attention")


class ModelTypeErrorCode(StrEnum):
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
    UNSUPPORTED_CONFIG = "unsupported_config"
    INVALID_CONFIG = "invalid_config"


class ModelTypeError(ValueError):
    def __init__(self, code: ModelTypeErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Architecture:
    """One decoder class: what its code fixes, and what its config must say."""

    model_type: str
    # Keys whose absence readers understand differently, so that a config has to say them.
    required: tuple[str, ...]
    has_attention_bias_switch: bool  # attention_bias, on all four projections
    has_mlp_bias_switch: bool
    qkv_bias: bool  # always there
    qk_norm: bool
    # Which layers see a window only: (config, layers) -> tokens for each layer, None for full attention.
    windows: Callable[[Json, int], tuple[int | None, ...]]


@dataclass(frozen=True, slots=True)
class ModelType:
    architecture: str
    signature: str
    # What the signature is made of.
    canonical: Mapping[str, Any]
    context_tokens: int
    vocab_size: int
    tied_embeddings: bool
    # Every tensor that a checkpoint must hold, and its shape; `lm_head.weight` only when it is not tied.
    tensors: Mapping[str, Shape]


def describe_model_type(config: Json) -> ModelType:
    """Judge a parsed config.json. Raises ModelTypeError.

    1. Exactly one architecture, a known one, and the model_type that belongs to it.
    2. Nothing that changes the weights' meaning and is not served: quantized, tensor-parallel pretraining, partial rotary.
    3. Sizes are integers in range and fit together.
    4. The canonical config holds architecture, shapes and all that changes the arithmetic. The vocabulary is padded up, and
       whether the head is tied is left out: the engine makes tied heads real.
    """
    name, architecture = _architecture(config)  # 1
    _refuse_unserved(config)  # 2
    heads = _size(config, "num_attention_heads", MAX_HEADS)  # 3
    hidden_size = _size(config, "hidden_size", MAX_HIDDEN_SIZE)
    layers = _size(config, "num_hidden_layers", MAX_LAYERS)
    vocab_size = _size(config, "vocab_size", MAX_VOCABULARY)
    context_tokens = _size(config, "max_position_embeddings", MAX_CONTEXT_TOKENS)
    head_dim = _head_dim(config, hidden_size, heads)
    kv_heads = _size(config, "num_key_value_heads", MAX_HEADS, heads)
    if heads % kv_heads:
        raise _invalid("num_attention_heads is not a multiple of num_key_value_heads")
    windows = architecture.windows(config, layers)
    attention_bias = architecture.has_attention_bias_switch and _flag(config, "attention_bias", False)
    canonical: dict[str, Any] = {  # 4
        "version": SIGNATURE_VERSION,
        "architecture": name,
        "hidden_size": hidden_size,
        "intermediate_size": _size(config, "intermediate_size", MAX_INTERMEDIATE_SIZE),
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "padded_vocab_size": -(-vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING,
        "activation": _activation(config),
        "norm_eps": _positive(config, "rms_norm_eps", 1e-6),
        "rope": _rope(config),
        # A window at least as long as the context never cuts anything off.
        "windows": None if all(w is None or w >= context_tokens for w in windows) else list(windows),
        "qkv_bias": architecture.qkv_bias or attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": architecture.has_mlp_bias_switch and _flag(config, "mlp_bias", False),
        "qk_norm": architecture.qk_norm,
    }
    tied = _flag(config, "tie_word_embeddings", False)
    return ModelType(
        architecture=name,
        signature=sign_canonical_config(canonical),
        canonical=canonical,
        # The engine attends to everything, which is right up to the length of the shortest window.
        context_tokens=min([context_tokens, *(window for window in windows if window is not None)]),
        vocab_size=vocab_size,
        tied_embeddings=tied,
        tensors=_tensors(canonical, vocab_size, tied),
    )


def sign_canonical_config(canonical: Mapping[str, Any]) -> str:
    raw = json.dumps(canonical, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(raw.encode()).hexdigest()[:SIGNATURE_HEX_CHARS]


def _architecture(config: Json) -> tuple[str, Architecture]:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise _invalid("architectures must name exactly one class")
    architecture = ARCHITECTURES.get(names[0])
    if architecture is None:
        served = ", ".join(sorted(ARCHITECTURES))
        raise ModelTypeError(
            ModelTypeErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"{names[0][:80]!r} is not served; served are {served}",
        )
    if config.get("model_type") != architecture.model_type:
        raise _invalid(f"model_type must be {architecture.model_type!r} for {names[0]}")
    for key in architecture.required:
        if key not in config:
            raise _invalid(f"{key} must be given for {names[0]}")
    return names[0], architecture


def _refuse_unserved(config: Json) -> None:
    if config.get("quantization_config") is not None:
        raise _unsupported("quantized checkpoints are not served; register the full-precision weights")
    if config.get("pretraining_tp", 1) != 1:
        raise _unsupported("pretraining_tp other than 1 is not served")
    if config.get("partial_rotary_factor") not in (None, 1.0):
        raise _unsupported("partial_rotary_factor other than 1 is not served")


def _head_dim(config: Json, hidden_size: int, heads: int) -> int:
    if config.get("head_dim") is None and hidden_size % heads:
        raise _invalid("hidden_size is not a multiple of num_attention_heads")
    head_dim = _size(config, "head_dim", MAX_HEAD_DIM, hidden_size // heads)
    if head_dim % 2:
        raise _invalid("head_dim must be even: rotary embeddings turn pairs")
    return head_dim


def _activation(config: Json) -> str:
    name = config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise _unsupported(f"hidden_act must be one of {', '.join(ACTIVATIONS)}")
    return name


def _rope(config: Json) -> dict[str, Any]:
    """Kind, theta and the kind's numbers, from the newer `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    if newer and older:
        # Readers do not agree which of the two wins.
        raise _invalid("rope_parameters and rope_scaling exclude each other")
    source = newer or older or {}
    if not isinstance(source, dict):
        raise _invalid("rope settings must be an object")
    settings = dict(source)
    theta = settings.pop("rope_theta", None)
    older_kind = settings.pop("type", None)
    kind = settings.pop("rope_type", older_kind)
    if kind is None:
        kind = "default"
    if not isinstance(kind, str) or kind not in ROPE_PARAMETERS:
        raise _unsupported(f"rope type must be one of {', '.join(sorted(ROPE_PARAMETERS))}")
    if settings.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise _unsupported("partial_rotary_factor other than 1 is not served")
    unknown = settings.keys() - set(ROPE_PARAMETERS[kind])
    if unknown:
        raise _unsupported(f"rope setting {min(unknown)[:80]!r} is not served")
    if theta is None:
        theta = config.get("rope_theta", 10_000.0)
    return {
        "kind": kind,
        "theta": _number("rope_theta", theta),
        **{name: _number(name, settings.get(name)) for name in ROPE_PARAMETERS[kind]},
    }


def _no_windows(config: Json, layers: int) -> tuple[int | None, ...]:
    if config.get("sliding_window") is not None:
        raise _invalid(f"{config['architectures'][0]} has no sliding_window")
    return (None,) * layers


def _mistral_windows(config: Json, layers: int) -> tuple[int | None, ...]:
    if config["sliding_window"] is None:
        return (None,) * layers
    return (_size(config, "sliding_window", MAX_CONTEXT_TOKENS),) * layers


def _qwen_windows(config: Json, layers: int) -> tuple[int | None, ...]:
    """`layer_types` says it when it is there; else layers from `max_window_layers` on slide, if `use_sliding_window`."""
    if not _flag(config, "use_sliding_window", False):
        return (None,) * layers
    window = _size(config, "sliding_window", MAX_CONTEXT_TOKENS)
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise _invalid("max_window_layers must be an integer of at least 0")
        return tuple(window if index >= first else None for index in range(layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not all(kind in ATTENTION_KINDS for kind in kinds)
    ):
        raise _invalid("layer_types must say full_attention or sliding_attention for each layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama",
        required=(),
        has_attention_bias_switch=True,
        has_mlp_bias_switch=True,
        qkv_bias=False,
        qk_norm=False,
        windows=_no_windows,
    ),
    "MistralForCausalLM": Architecture(
        model_type="mistral",
        required=("num_key_value_heads", "sliding_window"),
        has_attention_bias_switch=False,
        has_mlp_bias_switch=False,
        qkv_bias=False,
        qk_norm=False,
        windows=_mistral_windows,
    ),
    "Qwen2ForCausalLM": Architecture(
        model_type="qwen2",
        required=("num_key_value_heads", "use_sliding_window"),
        has_attention_bias_switch=False,
        has_mlp_bias_switch=False,
        qkv_bias=True,
        qk_norm=False,
        windows=_qwen_windows,
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3",
        required=("num_key_value_heads", "head_dim", "use_sliding_window"),
        has_attention_bias_switch=True,
        has_mlp_bias_switch=False,
        qkv_bias=False,
        qk_norm=True,
        windows=_qwen_windows,
    ),
}


def _tensors(canonical: Mapping[str, Any], vocab_size: int, tied: bool) -> dict[str, Shape]:
    hidden, head_dim = canonical["hidden_size"], canonical["head_dim"]
    query, key_value = canonical["heads"] * head_dim, canonical["kv_heads"] * head_dim
    inner = canonical["intermediate_size"]
    # Projection -> (rows, columns, has a bias).
    projections: dict[str, tuple[int, int, bool]] = {
        "self_attn.q_proj": (query, hidden, canonical["qkv_bias"]),
        "self_attn.k_proj": (key_value, hidden, canonical["qkv_bias"]),
        "self_attn.v_proj": (key_value, hidden, canonical["qkv_bias"]),
        "self_attn.o_proj": (hidden, query, canonical["output_bias"]),
        "mlp.gate_proj": (inner, hidden, canonical["mlp_bias"]),
        "mlp.up_proj": (inner, hidden, canonical["mlp_bias"]),
        "mlp.down_proj": (hidden, inner, canonical["mlp_bias"]),
    }
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, columns, has_bias) in projections.items():
        layer[f"{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"{name}.bias"] = (rows,)
    if canonical["qk_norm"]:
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    tensors: dict[str, Shape] = {
        "model.embed_tokens.weight": (vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(canonical["layers"]):
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    if not tied:
        tensors["lm_head.weight"] = (vocab_size, hidden)
    return tensors


def _size(config: Json, key: str, maximum: int, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= maximum:
        raise _invalid(f"{key} must be an integer from 1 to {maximum}")
    return value


def _flag(config: Json, key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise _invalid(f"{key} must be true or false")
    return value


def _positive(config: Json, key: str, default: float) -> float:
    return _number(key, config.get(key, default))


def _number(name: str, value: object) -> float:
    # As float in any case: 10000 and 10000.0 in a config are the same arithmetic and must be the same signature.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < 1e15
        or not math.isfinite(value)
    ):
        raise _invalid(f"{name} must be a positive number")
    return float(value)


def _invalid(message: str) -> ModelTypeError:
    return ModelTypeError(ModelTypeErrorCode.INVALID_CONFIG, f"config.json: {message}")


def _unsupported(message: str) -> ModelTypeError:
    return ModelTypeError(ModelTypeErrorCode.UNSUPPORTED_CONFIG, f"config.json: {message}")
