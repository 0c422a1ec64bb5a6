"""The Llama family: what its configs mean, and the tensors that its checkpoints hold.

Rms norms, gated MLPs, rope over whole heads. The engine's `families.py` says the same to the workers; a contract test compares
both with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.model_config import (
    MAX_CONTEXT_TOKENS,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_INTERMEDIATE_SIZE,
    MAX_LAYERS,
    MAX_VOCABULARY,
    CheckpointNames,
    Description,
    Json,
    Shape,
    flag,
    invalid,
    positive,
    read_rope,
    size,
    unsupported,
)

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
ATTENTION_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class LlamaArchitecture:
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


def describe_llama(config: Json, row: LlamaArchitecture) -> Description:
    """Raises ModelTypeError.

    1. Nothing that changes the weights' meaning and is not served: tensor-parallel pretraining, partial rotary.
    2. Sizes are integers in range and fit together.
    3. The canonical config holds shapes and all that changes the arithmetic; whether the head is tied is left out: the engine
       makes tied heads real.
    """
    if config.get("pretraining_tp", 1) != 1:  # 1
        raise unsupported("pretraining_tp other than 1 is not served")
    rope, share = read_rope(config)
    if config.get("partial_rotary_factor") not in (None, 1.0) or share not in (None, 1.0):
        raise unsupported("partial_rotary_factor other than 1 is not served")
    heads = size(config, "num_attention_heads", MAX_HEADS)  # 2
    hidden_size = size(config, "hidden_size", MAX_HIDDEN_SIZE)
    layers = size(config, "num_hidden_layers", MAX_LAYERS)
    context_tokens = size(config, "max_position_embeddings", MAX_CONTEXT_TOKENS)
    head_dim = _head_dim(config, hidden_size, heads)
    kv_heads = size(config, "num_key_value_heads", MAX_HEADS, heads)
    if heads % kv_heads:
        raise invalid("num_attention_heads is not a multiple of num_key_value_heads")
    windows = row.windows(config, layers)
    attention_bias = row.has_attention_bias_switch and flag(config, "attention_bias", False)
    canonical: dict[str, Any] = {  # 3
        "hidden_size": hidden_size,
        "intermediate_size": size(config, "intermediate_size", MAX_INTERMEDIATE_SIZE),
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "activation": _activation(config),
        "norm_eps": positive(config, "rms_norm_eps", 1e-6),
        "rope": rope,
        # A window at least as long as the context never cuts anything off.
        "windows": None if all(w is None or w >= context_tokens for w in windows) else list(windows),
        "qkv_bias": row.qkv_bias or attention_bias,
        "output_bias": attention_bias,
        "mlp_bias": row.has_mlp_bias_switch and flag(config, "mlp_bias", False),
        "qk_norm": row.qk_norm,
    }
    tied = flag(config, "tie_word_embeddings", False)
    buffers = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq" for index in range(layers)}
    return Description(
        canonical=canonical,
        # The engine attends to everything, which is right up to the length of the shortest window.
        context_tokens=min([context_tokens, *(window for window in windows if window is not None)]),
        tied_embeddings=tied,
        tensors=_tensors(canonical, size(config, "vocab_size", MAX_VOCABULARY), tied),
        names=CheckpointNames(
            embedding="model.embed_tokens.weight",
            prefixes=("model.", ""),
            ignored=frozenset(buffers | {"model.rotary_emb.inv_freq"}),
        ),
    )


def _head_dim(config: Json, hidden_size: int, heads: int) -> int:
    if config.get("head_dim") is None and hidden_size % heads:
        raise invalid("hidden_size is not a multiple of num_attention_heads")
    head_dim = size(config, "head_dim", MAX_HEAD_DIM, hidden_size // heads)
    if head_dim % 2:
        raise invalid("head_dim must be even: rotary embeddings turn pairs")
    return head_dim


def _activation(config: Json) -> str:
    name = config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise unsupported(f"hidden_act must be one of {', '.join(ACTIVATIONS)}")
    return name


def _no_windows(config: Json, layers: int) -> tuple[int | None, ...]:
    if config.get("sliding_window") is not None:
        raise invalid(f"{config['architectures'][0]} has no sliding_window")
    return (None,) * layers


def _mistral_windows(config: Json, layers: int) -> tuple[int | None, ...]:
    if config["sliding_window"] is None:
        return (None,) * layers
    return (size(config, "sliding_window", MAX_CONTEXT_TOKENS),) * layers


def _qwen_windows(config: Json, layers: int) -> tuple[int | None, ...]:
    """`layer_types` says it when it is there; else layers from `max_window_layers` on slide, if `use_sliding_window`."""
    if not flag(config, "use_sliding_window", False):
        return (None,) * layers
    window = size(config, "sliding_window", MAX_CONTEXT_TOKENS)
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise invalid("max_window_layers must be an integer of at least 0")
        return tuple(window if index >= first else None for index in range(layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not all(kind in ATTENTION_KINDS for kind in kinds)
    ):
        raise invalid("layer_types must say full_attention or sliding_attention for each layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


LLAMA_ARCHITECTURES: Mapping[str, LlamaArchitecture] = {
    "LlamaForCausalLM": LlamaArchitecture(
        model_type="llama",
        required=(),
        has_attention_bias_switch=True,
        has_mlp_bias_switch=True,
        qkv_bias=False,
        qk_norm=False,
        windows=_no_windows,
    ),
    "MistralForCausalLM": LlamaArchitecture(
        model_type="mistral",
        required=("num_key_value_heads", "sliding_window"),
        has_attention_bias_switch=False,
        has_mlp_bias_switch=False,
        qkv_bias=False,
        qk_norm=False,
        windows=_mistral_windows,
    ),
    "Qwen2ForCausalLM": LlamaArchitecture(
        model_type="qwen2",
        required=("num_key_value_heads", "use_sliding_window"),
        has_attention_bias_switch=False,
        has_mlp_bias_switch=False,
        qkv_bias=True,
        qk_norm=False,
        windows=_qwen_windows,
    ),
    "Qwen3ForCausalLM": LlamaArchitecture(
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
