"""GPT-J, CodeGen, GPT-NeoX, GPT-2, OPT and BLOOM: what their configs mean, and the tensors that their checkpoints hold.

All have layer norms, plain MLPs and a key head for each head; rows of data say where they differ. The engine's `families.py`
says the same to the workers; a contract test compares both with transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    Keys,
    Shape,
    flag,
    invalid,
    named,
    number,
    read_rope,
    size,
    unsupported,
)

# Names that mean the same arithmetic are one name in the signature.
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
_OPT_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class GptArchitecture:
    """One decoder class.

    Keys: config names that mean the same. inner_size, activation, norm_eps: () where the code fixes it.
    position: "rope", "learned" or "alibi". rotary: "dim" (rotary_dim; neighbouring channels turn together) or "share"
    (rotary_pct or rope settings; halves turn together). *_bias: whether it is there, or the flag and default that say so.
    fixed: what the config must say, or leave out: otherwise it is another computation.
    attention: the projections, each name -> (rows, columns) in multiples of the hidden size. norms: of a layer.
    position_offset: rows of the position table before the first position.
    """

    model_type: str
    hidden_size: Keys
    layers: Keys
    heads: Keys
    inner_size: Keys
    positions: Keys
    activation: Keys
    norm_eps: Keys
    residual: str
    position: str
    prefixes: tuple[str, ...]
    embedding: str
    final_norm: str
    layer: str
    norms: tuple[str, ...]
    qkv: tuple[str, ...]
    attention_output: str
    mlp: tuple[str, str]
    default_activation: str
    rotary: str = ""
    required: Keys = ()
    head_groups: int = 1
    qkv_bias: bool | tuple[str, bool] = False
    output_bias: bool | tuple[str, bool] = False
    mlp_bias: bool | tuple[str, bool] = True
    has_head_bias: bool = False
    is_tied_by_default: bool = False
    is_transposed: bool = False
    position_table: str = ""
    position_offset: int = 0
    default_positions: int | None = None
    embedding_norm: str = ""
    heads_named: tuple[str, ...] = ("lm_head",)
    ignored: tuple[str, ...] = ()
    ignored_outside: tuple[str, ...] = ()
    fixed: Mapping[str, bool] = field(default_factory=dict)
    as_hidden_size: Keys = ()


def describe_gpt(config: Json, row: GptArchitecture) -> Description:
    """Raises ModelTypeError. Sizes are integers in range and fit together; nothing changes the computation of the row."""
    for key, value in row.fixed.items():
        if flag(config, key, value) != value:
            raise unsupported(f"{key} other than {str(value).lower()} is not served")
    hidden_size = size(config, row.hidden_size, MAX_HIDDEN_SIZE)
    for key in row.as_hidden_size:
        if config.get(key) not in (None, hidden_size):
            raise unsupported(f"{key} other than the hidden size is not served")
    heads = size(config, row.heads, MAX_HEADS)
    if hidden_size % heads or hidden_size // heads > MAX_HEAD_DIM:
        raise invalid(
            f"{row.hidden_size[0]} must be a multiple of {row.heads[0]}, at most {MAX_HEAD_DIM} times"
        )
    if heads % row.head_groups:
        raise invalid(f"{row.heads[0]} must be a multiple of {row.head_groups}")
    head_dim = hidden_size // heads
    positions = size(config, row.positions, MAX_CONTEXT_TOKENS, row.default_positions)
    is_sequential = row.residual == "parallel_two_norms" and not flag(config, "use_parallel_residual", True)
    canonical: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": size(config, row.inner_size, MAX_INTERMEDIATE_SIZE, 4 * hidden_size)
        if row.inner_size
        else 4 * hidden_size,
        "layers": size(config, row.layers, MAX_LAYERS),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "activation": _activation(config, row),
        "norm": "layer",
        "norm_eps": number(row.norm_eps[0], config.get(row.norm_eps[0], 1e-5))
        if row.norm_eps
        else _OPT_NORM_EPS,
        "is_gated": False,
        "residual": "sequential" if is_sequential else row.residual,
        "position": row.position,
        "rope": _rope(config, row, head_dim),
        # A learned table is a weight, and models of one type have weights of one shape.
        "positions": positions if row.position_table else None,
        "windows": None,
        "embedding_norm": bool(row.embedding_norm),
        "qkv_bias": _bias(config, row.qkv_bias),
        "output_bias": _bias(config, row.output_bias),
        "mlp_bias": _bias(config, row.mlp_bias),
        "head_bias": row.has_head_bias,
        "qk_norm": False,
    }
    tied = flag(config, "tie_word_embeddings", row.is_tied_by_default)
    vocab_size = size(config, "vocab_size", MAX_VOCABULARY)
    prefix = row.prefixes[0]
    ignored = {prefix + name for name in row.ignored_outside}
    for index in range(canonical["layers"]):
        ignored |= {f"{prefix}{row.layer}{index}.{name}" for name in row.ignored}
    return Description(
        canonical=canonical,
        context_tokens=positions,
        tied_embeddings=tied,
        tensors=_tensors(canonical, row, vocab_size, positions, tied),
        names=CheckpointNames(
            f"{prefix}{row.embedding}.weight", row.prefixes, row.heads_named, frozenset(ignored)
        ),
    )


def _activation(config: Json, row: GptArchitecture) -> str:
    name = named(config, row.activation)
    name = row.default_activation if name is None else name
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise unsupported(f"{row.activation[0]} must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _bias(config: Json, bias: bool | tuple[str, bool]) -> bool:
    return bias if isinstance(bias, bool) else flag(config, *bias)


def _rope(config: Json, row: GptArchitecture, head_dim: int) -> dict[str, Any] | None:
    if not row.rotary:
        return None
    if row.rotary == "dim":
        rope: dict[str, Any] = {"kind": "default", "theta": 10_000.0}
        rotary_dim = size(config, "rotary_dim", MAX_HEAD_DIM)
    else:
        rope, share = read_rope(config, "rotary_emb_base")
        share = number("rotary_pct", config.get("rotary_pct", 0.25)) if share is None else share
        rotary_dim = int(head_dim * min(share, 2.0))
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise invalid(f"cannot turn {rotary_dim} of a head's {head_dim} channels in pairs")
    return rope | {"rotary_dim": rotary_dim, "is_interleaved": row.rotary == "dim"}


def _tensors(
    canonical: Mapping[str, Any], row: GptArchitecture, vocab_size: int, positions: int, tied: bool
) -> dict[str, Shape]:
    hidden, inner = canonical["hidden_size"], canonical["intermediate_size"]
    qkv_rows = 3 * hidden // len(row.qkv)
    # Projection -> (rows, columns, has a bias).
    projections = {name: (qkv_rows, hidden, canonical["qkv_bias"]) for name in row.qkv}
    projections |= {
        row.attention_output: (hidden, hidden, canonical["output_bias"]),
        row.mlp[0]: (inner, hidden, canonical["mlp_bias"]),
        row.mlp[1]: (hidden, inner, canonical["mlp_bias"]),
    }
    layer: dict[str, Shape] = {}
    for name, (rows, columns, has_bias) in projections.items():
        layer[f"{name}.weight"] = (columns, rows) if row.is_transposed else (rows, columns)
        if has_bias:
            layer[f"{name}.bias"] = (rows,)
    for name in row.norms:
        layer |= _norm(name, hidden)
    base: dict[str, Shape] = {f"{row.embedding}.weight": (vocab_size, hidden)} | _norm(row.final_norm, hidden)
    if row.position_table:
        base[f"{row.position_table}.weight"] = (positions + row.position_offset, hidden)
    if row.embedding_norm:
        base |= _norm(row.embedding_norm, hidden)
    for index in range(canonical["layers"]):
        base |= {f"{row.layer}{index}.{name}": shape for name, shape in layer.items()}
    tensors = {row.prefixes[0] + name: shape for name, shape in base.items()}
    if not tied:
        tensors[f"{row.heads_named[0]}.weight"] = (vocab_size, hidden)
    if row.has_head_bias:
        tensors[f"{row.heads_named[0]}.bias"] = (vocab_size,)
    return tensors


def _norm(name: str, hidden: int) -> dict[str, Shape]:
    return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}


_GPT: dict[str, Any] = {
    "hidden_size": ("n_embd", "hidden_size"),
    "layers": ("n_layer", "num_hidden_layers"),
    "heads": ("n_head", "num_attention_heads"),
    "inner_size": ("n_inner",),
    "positions": ("n_positions", "max_position_embeddings"),
    "activation": ("activation_function",),
    "norm_eps": ("layer_norm_epsilon",),
    "prefixes": ("transformer.", ""),
    "embedding": "wte",
    "final_norm": "ln_f",
    "layer": "h.",
    "default_activation": "gelu_new",
}
_GPTJ: dict[str, Any] = {
    **_GPT,
    "residual": "parallel",
    "position": "rope",
    "rotary": "dim",
    "required": ("rotary_dim",),
    "norms": ("ln_1",),
    "attention_output": "attn.out_proj",
    "mlp": ("mlp.fc_in", "mlp.fc_out"),
    "has_head_bias": True,
}
_PLAIN: dict[str, Any] = {
    "hidden_size": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "positions": ("max_position_embeddings",),
}

GPT_ARCHITECTURES: Mapping[str, GptArchitecture] = {
    "GPTJForCausalLM": GptArchitecture(
        **_GPTJ,
        model_type="gptj",
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        ignored=("attn.bias", "attn.masked_bias", "attn.embed_positions"),
    ),
    "CodeGenForCausalLM": GptArchitecture(
        **_GPTJ,
        model_type="codegen",
        qkv=("attn.qkv_proj",),
        head_groups=4,
        ignored=("attn.bias", "attn.masked_bias", "attn.causal_mask", "attn.embed_positions"),
    ),
    "GPTNeoXForCausalLM": GptArchitecture(
        **_PLAIN,
        model_type="gpt_neox",
        inner_size=("intermediate_size",),
        activation=("hidden_act",),
        default_activation="gelu",
        norm_eps=("layer_norm_eps",),
        residual="parallel_two_norms",
        position="rope",
        rotary="share",
        qkv_bias=("attention_bias", True),
        output_bias=("attention_bias", True),
        prefixes=("gpt_neox.", ""),
        embedding="embed_in",
        final_norm="final_layer_norm",
        layer="layers.",
        norms=("input_layernorm", "post_attention_layernorm"),
        qkv=("attention.query_key_value",),
        attention_output="attention.dense",
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        heads_named=("embed_out", "lm_head"),
        ignored=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
        ignored_outside=("rotary_emb.inv_freq",),
    ),
    "GPT2LMHeadModel": GptArchitecture(
        **_GPT,
        model_type="gpt2",
        residual="sequential",
        position="learned",
        position_table="wpe",
        is_transposed=True,
        is_tied_by_default=True,
        qkv_bias=True,
        output_bias=True,
        norms=("ln_1", "ln_2"),
        qkv=("attn.c_attn",),
        attention_output="attn.c_proj",
        mlp=("mlp.c_fc", "mlp.c_proj"),
        ignored=("attn.bias", "attn.masked_bias"),
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
    ),
    "OPTForCausalLM": GptArchitecture(
        **_PLAIN,
        model_type="opt",
        inner_size=("ffn_dim",),
        activation=("activation_function",),
        default_activation="relu",
        norm_eps=(),
        residual="sequential",
        position="learned",
        position_table="embed_positions",
        position_offset=2,
        is_tied_by_default=True,
        qkv_bias=("enable_bias", True),
        output_bias=("enable_bias", True),
        mlp_bias=("enable_bias", True),
        prefixes=("model.decoder.", "decoder.", ""),
        embedding="embed_tokens",
        final_norm="final_layer_norm",
        layer="layers.",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_output="self_attn.out_proj",
        mlp=("fc1", "fc2"),
        ignored_outside=("version",),
        fixed={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
        },
        as_hidden_size=("word_embed_proj_dim",),
    ),
    "BloomForCausalLM": GptArchitecture(
        model_type="bloom",
        hidden_size=("n_embed", "hidden_size"),
        layers=("n_layer", "num_hidden_layers"),
        heads=("n_head", "num_attention_heads"),
        inner_size=(),
        positions=("seq_length",),
        # Alibi knows no end; beyond this the published models were not trained.
        default_positions=2048,
        activation=(),
        default_activation="gelu_pytorch_tanh",
        norm_eps=("layer_norm_epsilon",),
        residual="sequential",
        position="alibi",
        is_tied_by_default=True,
        qkv_bias=True,
        output_bias=True,
        prefixes=("transformer.", ""),
        embedding="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        final_norm="ln_f",
        layer="h.",
        norms=("input_layernorm", "post_attention_layernorm"),
        qkv=("self_attention.query_key_value",),
        attention_output="self_attention.dense",
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        fixed={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},
    ),
}
