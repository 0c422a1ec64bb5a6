"""What splits a model type and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from shared.model_config import ModelTypeError
from shared.model_type import describe_model_type

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def signature(config: dict[str, Any], **changes: Any) -> str:
    return describe_model_type(config | changes).signature


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 128},
        {"intermediate_size": 256},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 2, "head_dim": 16},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"vocab_size": 1025},
        {"rms_norm_eps": 1e-6},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_theta": 500000.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": LLAMA3_ROPE},
    ],
    ids=str,
)
def test_signature_changes_with_shapes_and_arithmetic(changes: dict[str, Any]) -> None:
    assert signature(LLAMA, **changes) != signature(LLAMA)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 1001},  # one added token
        {"vocab_size": 1024},
        {"tie_word_embeddings": True},
        {"max_position_embeddings": 1024},
        {"eos_token_id": 7},
        {"torch_dtype": "float32"},
        {"dtype": "float16"},
        {"transformers_version": "4.0"},
        {"rope_theta": 10000},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"head_dim": 16},
        {"head_dim": None},
    ],
    ids=str,
)
def test_signature_stays_for_what_does_not_change_the_arithmetic(changes: dict[str, Any]) -> None:
    assert signature(LLAMA, **changes) == signature(LLAMA)


def test_signature_is_the_same_for_older_and_newer_spelling_of_rope() -> None:
    older = signature(LLAMA, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE)
    newer = signature(LLAMA, rope_theta=None, rope_parameters=LLAMA3_ROPE | {"rope_theta": 500000.0})

    assert older == newer


def test_signature_is_pinned() -> None:
    # Stored with every registered model: a change here needs a new SIGNATURE_VERSION and a migration.
    assert signature(LLAMA) == "1386a513aeeedcda"


def test_architectures_have_different_signatures() -> None:
    assert len({signature(config) for config in (LLAMA, MISTRAL, QWEN2, QWEN3)}) == 4


def test_window_splits_a_type_and_bounds_the_context_only_when_it_cuts() -> None:
    cutting = describe_model_type(MISTRAL | {"sliding_window": 128})
    idle = describe_model_type(MISTRAL | {"sliding_window": 512})
    full = describe_model_type(MISTRAL)

    assert cutting.signature != full.signature
    assert idle.signature == full.signature
    assert (cutting.context_tokens, idle.context_tokens, full.context_tokens) == (128, 512, 512)


def test_qwen_windows_follow_max_window_layers_or_layer_types() -> None:
    by_count = describe_model_type(
        QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    )
    kinds = ["full_attention", "sliding_attention"]
    by_list = describe_model_type(
        QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "layer_types": kinds}
    )

    assert by_count.canonical["windows"] == [None, 64]
    assert by_list.signature == by_count.signature


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA, {"sliding_window": 128}),
        (LLAMA, {"pretraining_tp": 2}),
        (LLAMA, {"partial_rotary_factor": 0.5}),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8}}),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}),
        (LLAMA, {"rope_scaling": "linear"}),
        (LLAMA, {"rms_norm_eps": None}),
        (LLAMA, {"rms_norm_eps": True}),
        (LLAMA, {"attention_bias": "yes"}),
        (MISTRAL, {"sliding_window": 0}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64, "layer_types": [{}, []]}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_config_is_refused(config: dict[str, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(ModelTypeError):
        describe_model_type(config | changes)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (MISTRAL, "sliding_window"),
        (MISTRAL, "num_key_value_heads"),
        (QWEN2, "use_sliding_window"),
        (QWEN3, "head_dim"),
    ],
)
def test_key_that_readers_default_differently_must_be_given(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelTypeError, match=key):
        describe_model_type({name: value for name, value in config.items() if name != key})


GPTJ: dict[str, Any] = {
    "architectures": ["GPTJForCausalLM"],
    "model_type": "gptj",
    "vocab_size": 1000,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "rotary_dim": 8,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
CODEGEN = GPTJ | {"architectures": ["CodeGenForCausalLM"], "model_type": "codegen"}
GPT2 = GPTJ | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
NEOX = LLAMA | {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "rotary_pct": 0.25}
NEOX |= {"hidden_act": "gelu", "attention_bias": True}
OPT: dict[str, Any] = LLAMA | {"architectures": ["OPTForCausalLM"], "model_type": "opt", "ffn_dim": 256}
BLOOM: dict[str, Any] = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "vocab_size": 1000,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 4,
}
GPT_LIKE = (GPTJ, CODEGEN, GPT2, NEOX, OPT, BLOOM)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (GPTJ, {"rotary_dim": 16}),
        (GPTJ, {"n_inner": 128}),
        (GPTJ, {"n_head": 2}),
        (GPTJ, {"activation_function": "gelu"}),
        (GPTJ, {"layer_norm_epsilon": 1e-6}),
        (NEOX, {"rotary_pct": 0.5}),
        (NEOX, {"rotary_emb_base": 500.0}),
        (NEOX, {"use_parallel_residual": False}),
        (NEOX, {"attention_bias": False}),
        (NEOX, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        (NEOX, {"layer_norm_eps": 1e-6}),
        (GPT2, {"n_positions": 1024}),  # the table is a weight
        (OPT, {"max_position_embeddings": 1024}),
        (OPT, {"enable_bias": False}),
        (OPT, {"activation_function": "gelu"}),
        (BLOOM, {"n_head": 8}),
        (BLOOM, {"layer_norm_epsilon": 1e-6}),
    ],
    ids=str,
)
def test_signature_of_gpt_types_changes_with_shapes_and_arithmetic(
    config: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert signature(config, **changes) != signature(config)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (GPTJ, {"n_positions": 1024}),
        (GPTJ, {"tie_word_embeddings": True}),
        (GPTJ, {"n_inner": None}),
        (GPTJ, {"n_inner": 256}),
        (GPTJ, {"activation_function": "gelu_pytorch_tanh"}),
        (GPTJ, {"hidden_size": 64, "attn_pdrop": 0.1, "use_cache": False}),
        (NEOX, {"rotary_pct": 0.9, "rope_parameters": {"partial_rotary_factor": 0.25}}),
        (NEOX, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}),
        (GPT2, {"scale_attn_weights": True}),
        (OPT, {"word_embed_proj_dim": 64, "dropout": 0.0}),
        (BLOOM, {"seq_length": 512, "pretraining_tp": 4}),
        (BLOOM, {"hidden_size": None, "n_embed": 64, "n_head": None, "num_attention_heads": 4}),
    ],
    ids=str,
)
def test_signature_of_gpt_types_stays_for_what_does_not_change_the_arithmetic(
    config: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert signature(config, **changes) == signature(config)


def test_signatures_of_gpt_types_are_pinned() -> None:
    # As above: stored with every registered model.
    assert [signature(config) for config in GPT_LIKE] == [
        "a6cdccf3818254cb",
        "72be175fb453abe6",
        "cbdc014116f4e8bb",
        "f2d0db8b8128e83a",
        "11d2e446db8a23e5",
        "782000766c445170",
    ]


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (GPTJ, {"rotary_dim": None}, "rotary_dim"),
        (GPTJ, {"rotary_dim": 7}, "in pairs"),
        (GPTJ, {"rotary_dim": 32}, "in pairs"),
        (GPTJ, {"n_embd": 66}, "multiple of n_head"),
        (GPTJ, {"hidden_size": 128}, "mean the same and differ"),
        (GPTJ, {"activation_function": "quick_gelu"}, "activation_function"),
        (GPTJ, {"activation_function": ["gelu"]}, "activation_function"),
        (CODEGEN, {"n_head": 2}, "multiple of 4"),
        (NEOX, {"rotary_pct": 7}, "in pairs"),
        (NEOX, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type"),
        (NEOX, {"use_parallel_residual": 1}, "true or false"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2, {"quantization_config": {"bits": 4}}, "quantized"),
        (OPT, {"do_layer_norm_before": False}, "do_layer_norm_before"),
        (OPT, {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        (BLOOM, {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        (LLAMA, {"architectures": ["GPTNeoForCausalLM"]}, "cannot be registered"),
        (LLAMA, {"architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_config_of_a_gpt_type_is_refused_with_the_reason(
    config: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelTypeError, match=reason):
        describe_model_type(config | changes)
