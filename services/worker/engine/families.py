"""One row for each model type that our decoders describe: its config keys, its fixed arithmetic, its tensor names.

Data only. `spec.py` reads a config by it, `family_weights.py` a checkpoint. A new model type starts with a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Keys = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Where config.json says a value: names that mean the same, of which at least one is there.

    kv_heads, head_dim: () where the type has none of its own. intermediate_size: absent or null is 4 x hidden.
    """

    hidden_size: Keys = ("hidden_size",)
    layers: Keys = ("num_hidden_layers",)
    heads: Keys = ("num_attention_heads",)
    kv_heads: Keys = ()
    head_dim: Keys = ()
    intermediate_size: Keys = ("intermediate_size",)
    positions: Keys = ("max_position_embeddings",)
    activation: Keys = ("hidden_act",)
    norm_eps: Keys = ("layer_norm_eps",)


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names below the base model's prefix; those of a layer below `layer` and the layer's number.

    heads: names of the output head, of which a checkpoint has one; it stands below no prefix. qkv, mlp_in: tensors whose rows are joined in this order. mlp_norm: None where one norm feeds both.
    ignored: derived values that old checkpoints store in a layer; ignored_outside: those outside layers.
    """

    embedding: str
    final_norm: str
    layer: str
    attention_norm: str
    qkv: Keys
    attention_output: str
    mlp_norm: str | None
    mlp_in: Keys
    mlp_out: str
    heads: Keys = ("lm_head",)
    position_table: str | None = None
    embedding_norm: str | None = None
    query_norm: str = ""
    key_norm: str = ""
    ignored: Keys = ()
    ignored_outside: Keys = ()


@dataclass(frozen=True, slots=True)
class Family:
    """What a model type's code fixes and config.json therefore does not say.

    prefixes: what stands before the base model's tensors, the usual one first; checkpoints of the bare base model lack it.
    qkv_layout: "rows" (all query heads, then keys, then values), "heads" (each head's query, key, value together) or
    "groups" (`qkv_groups` groups of heads, each with all its queries, then values, then keys).
    is_transposed: weights are stored (inputs, outputs).
    rope: "plain", "neox" (rotary_pct) or "gptj" (rotary_dim, channels turn in neighbouring pairs); windows: "mistral" or
    "qwen", how a sliding window is said.
    qkv_bias, output_bias, mlp_bias: a flag's name and default where config.json says it.
    fixed: what config.json must say, or leave out, for the row to hold; a model that says otherwise is another computation
    under the same name. as_hidden_size: sizes that must be the hidden size, for the same reason.
    """

    keys: ConfigKeys
    names: TensorNames
    prefixes: tuple[str, ...]
    norm: str = "layer"
    is_gated: bool = False
    residual: str = "sequential"
    position: str = "rope"
    rope: str = "plain"
    windows: str = ""
    qkv_layout: str = "rows"
    qkv_groups: int = 1
    is_transposed: bool = False
    activation_default: str | None = None
    is_tied_by_default: bool = False
    qkv_bias: bool | tuple[str, bool] = False
    output_bias: bool | tuple[str, bool] = False
    mlp_bias: bool | tuple[str, bool] = False
    head_bias: bool = False
    qk_norm: bool = False
    norm_eps_default: float = 1e-5
    positions_default: int | None = None
    position_offset: int = 0
    fixed: Mapping[str, bool] = field(default_factory=dict)
    as_hidden_size: Keys = ()


_LLAMA_KEYS = ConfigKeys(
    kv_heads=("num_key_value_heads",), head_dim=("head_dim",), norm_eps=("rms_norm_eps",)
)
_GPT_KEYS = ConfigKeys(
    hidden_size=("n_embd", "hidden_size"),
    layers=("n_layer", "num_hidden_layers"),
    heads=("n_head", "num_attention_heads"),
    intermediate_size=("n_inner",),
    positions=("n_positions", "max_position_embeddings"),
    activation=("activation_function",),
    norm_eps=("layer_norm_epsilon",),
)
_LLAMA_NAMES = TensorNames(
    embedding="embed_tokens",
    final_norm="norm",
    layer="layers.",
    attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    attention_output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    ignored=("self_attn.rotary_emb.inv_freq",),
    ignored_outside=("rotary_emb.inv_freq",),
)


def _llama_like(**changes: Any) -> Family:
    values: dict[str, Any] = {
        "keys": _LLAMA_KEYS,
        "names": _LLAMA_NAMES,
        "prefixes": ("model.", ""),
        "norm": "rms",
        "is_gated": True,
        "activation_default": "silu",
        "norm_eps_default": 1e-6,
    }
    return Family(**{**values, **changes})


FAMILIES: Mapping[str, Family] = {
    "llama": _llama_like(
        qkv_bias=("attention_bias", False),
        output_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
        positions_default=2048,
    ),
    "mistral": _llama_like(windows="mistral"),
    "qwen2": _llama_like(qkv_bias=True, windows="qwen"),
    "qwen3": _llama_like(
        qkv_bias=("attention_bias", False),
        output_bias=("attention_bias", False),
        qk_norm=True,
        windows="qwen",
    ),
    "gptj": Family(
        keys=_GPT_KEYS,
        names=TensorNames(
            embedding="wte",
            final_norm="ln_f",
            layer="h.",
            attention_norm="ln_1",
            qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            attention_output="attn.out_proj",
            mlp_norm=None,
            mlp_in=("mlp.fc_in",),
            mlp_out="mlp.fc_out",
            ignored=("attn.bias", "attn.masked_bias", "attn.embed_positions"),
        ),
        prefixes=("transformer.", ""),
        residual="parallel",
        rope="gptj",
        activation_default="gelu_new",
        mlp_bias=True,
        head_bias=True,
    ),
    "codegen": Family(
        keys=_GPT_KEYS,
        names=TensorNames(
            embedding="wte",
            final_norm="ln_f",
            layer="h.",
            attention_norm="ln_1",
            qkv=("attn.qkv_proj",),
            attention_output="attn.out_proj",
            mlp_norm=None,
            mlp_in=("mlp.fc_in",),
            mlp_out="mlp.fc_out",
            ignored=("attn.bias", "attn.masked_bias", "attn.causal_mask", "attn.embed_positions"),
        ),
        prefixes=("transformer.", ""),
        residual="parallel",
        rope="gptj",
        # It was trained on four chips, and its checkpoints still hold their parts one after another.
        qkv_layout="groups",
        qkv_groups=4,
        activation_default="gelu_new",
        mlp_bias=True,
        head_bias=True,
    ),
    "gpt_neox": Family(
        keys=ConfigKeys(),
        names=TensorNames(
            embedding="embed_in",
            heads=("embed_out", "lm_head"),
            final_norm="final_layer_norm",
            layer="layers.",
            attention_norm="input_layernorm",
            qkv=("attention.query_key_value",),
            attention_output="attention.dense",
            mlp_norm="post_attention_layernorm",
            mlp_in=("mlp.dense_h_to_4h",),
            mlp_out="mlp.dense_4h_to_h",
            ignored=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
            ignored_outside=("rotary_emb.inv_freq",),
        ),
        prefixes=("gpt_neox.", ""),
        # `use_parallel_residual: false` makes it sequential.
        residual="parallel_two_norms",
        rope="neox",
        qkv_layout="heads",
        activation_default="gelu",
        qkv_bias=("attention_bias", True),
        output_bias=("attention_bias", True),
        mlp_bias=True,
    ),
    "gpt2": Family(
        keys=_GPT_KEYS,
        names=TensorNames(
            embedding="wte",
            position_table="wpe",
            final_norm="ln_f",
            layer="h.",
            attention_norm="ln_1",
            qkv=("attn.c_attn",),
            attention_output="attn.c_proj",
            mlp_norm="ln_2",
            mlp_in=("mlp.c_fc",),
            mlp_out="mlp.c_proj",
            ignored=("attn.bias", "attn.masked_bias"),
        ),
        prefixes=("transformer.", ""),
        position="learned",
        is_transposed=True,
        activation_default="gelu_new",
        is_tied_by_default=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
    ),
    "opt": Family(
        keys=ConfigKeys(intermediate_size=("ffn_dim",), activation=("activation_function",), norm_eps=()),
        names=TensorNames(
            embedding="embed_tokens",
            position_table="embed_positions",
            final_norm="final_layer_norm",
            layer="layers.",
            attention_norm="self_attn_layer_norm",
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            attention_output="self_attn.out_proj",
            mlp_norm="final_layer_norm",
            mlp_in=("fc1",),
            mlp_out="fc2",
            ignored_outside=("version",),
        ),
        prefixes=("model.decoder.", "decoder.", ""),
        position="learned",
        position_offset=2,
        activation_default="relu",
        is_tied_by_default=True,
        qkv_bias=("enable_bias", True),
        output_bias=("enable_bias", True),
        mlp_bias=("enable_bias", True),
        fixed={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
        },
        as_hidden_size=("word_embed_proj_dim",),
    ),
    "bloom": Family(
        keys=ConfigKeys(
            hidden_size=("n_embed", "hidden_size"),
            layers=("n_layer", "num_hidden_layers"),
            heads=("n_head", "num_attention_heads"),
            # Four times the hidden size, whatever config.json says.
            intermediate_size=(),
            positions=("seq_length",),
            activation=(),
            norm_eps=("layer_norm_epsilon",),
        ),
        names=TensorNames(
            embedding="word_embeddings",
            embedding_norm="word_embeddings_layernorm",
            final_norm="ln_f",
            layer="h.",
            attention_norm="input_layernorm",
            qkv=("self_attention.query_key_value",),
            attention_output="self_attention.dense",
            mlp_norm="post_attention_layernorm",
            mlp_in=("mlp.dense_h_to_4h",),
            mlp_out="mlp.dense_4h_to_h",
        ),
        prefixes=("transformer.", ""),
        position="alibi",
        qkv_layout="heads",
        activation_default="gelu_pytorch_tanh",
        is_tied_by_default=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        # Alibi knows no end; beyond this the published models were not trained.
        positions_default=2048,
        fixed={
            "apply_residual_connection_post_layernorm": False,
            "slow_but_exact": False,
        },
    ),
}
