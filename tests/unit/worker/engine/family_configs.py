"""A tiny config of each model type that our decoders describe, and of its variants."""

from __future__ import annotations

from typing import Any

from transformers import (
    BloomConfig,
    CodeGenConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.unit.worker.engine.builders import EOS, VOCAB_SIZE, tiny_config

_COMMON: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS, "bos_token_id": None}
_GPT: dict[str, Any] = {**_COMMON, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
_NEOX: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_OPT: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
}
_BLOOM: dict[str, Any] = {**_COMMON, "n_layer": 3, "seq_length": 512}


def _rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 500.0, **settings}}


def _llama(config_class: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    return config_class(**{**tiny_config().to_dict(), "model_type": config_class.model_type, **changes})


VARIANTS: dict[str, PretrainedConfig] = {
    "llama, biases and untied head": tiny_config(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "llama, as many key heads as heads": tiny_config(num_key_value_heads=6),
    "llama, linear rope": tiny_config(**_rope(rope_type="linear", factor=4.0)),
    "llama, llama3 rope": tiny_config(
        **_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "llama, gelu": tiny_config(hidden_act="gelu_pytorch_tanh"),
    "mistral": _llama(MistralConfig, sliding_window=None),
    "qwen2": _llama(Qwen2Config),
    "qwen3": _llama(Qwen3Config),
    "gptj": GPTJConfig(**_GPT, rotary_dim=8),
    "gptj, tied, all channels turn": GPTJConfig(**_GPT, rotary_dim=16, n_inner=96, tie_word_embeddings=True),
    "codegen": CodeGenConfig(**_GPT, rotary_dim=8, n_ctx=512),
    "codegen, eight heads": CodeGenConfig(
        **{**_GPT, "n_embd": 128, "n_head": 8}, rotary_dim=4, n_ctx=512, n_inner=80
    ),
    "gpt_neox": GPTNeoXConfig(**_NEOX),
    "gpt_neox, sequential": GPTNeoXConfig(**_NEOX, use_parallel_residual=False, hidden_act="gelu_new"),
    "gpt_neox, all channels turn, tied, no attention bias": GPTNeoXConfig(
        **_NEOX,
        **_rope(rope_type="default", partial_rotary_factor=1.0),
        tie_word_embeddings=True,
        attention_bias=False,
    ),
    "gpt_neox, linear rope": GPTNeoXConfig(
        **_NEOX, **_rope(rope_type="linear", partial_rotary_factor=0.5, factor=4.0)
    ),
    "gpt2": GPT2Config(**_GPT),
    "gpt2, untied": GPT2Config(**_GPT, tie_word_embeddings=False, n_inner=100, activation_function="relu"),
    "opt": OPTConfig(**_OPT),
    "opt, untied, gelu, no biases": OPTConfig(
        **_OPT, tie_word_embeddings=False, activation_function="gelu", enable_bias=False
    ),
    "bloom": BloomConfig(**_BLOOM, hidden_size=64, n_head=4),
    # Not a power of two: the slopes come from two series.
    "bloom, six heads, untied": BloomConfig(**_BLOOM, hidden_size=96, n_head=6, tie_word_embeddings=False),
}
TYPES = ("mistral", "qwen2", "qwen3", "gptj", "codegen", "gpt_neox", "gpt2", "opt", "bloom")
