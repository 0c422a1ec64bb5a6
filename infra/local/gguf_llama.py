"""Turns a GGUF file of a Llama-family model into a Hugging Face folder: config, tokenizer, bf16 safetensors.

Knows the GGUF names and layouts of this one family and of the "smollm" byte-level BPE, and refuses any other. Called once by
the set-up of the demo models; the platform itself reads safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from infra.local.bf16_safetensors import Bf16, Float32, to_bf16, write_bf16_safetensors

# GGUF's name of a tensor within a block -> the checkpoint's.
BLOCK_TENSORS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # token_type of special tokens in GGUF's vocabulary


class GgufError(ValueError):
    """The file is not a GGUF that this converter knows."""


def convert_gguf_to_folder(gguf_path: Path, folder: Path) -> None:
    """Write the model's seven files into the existing `folder`; the same bytes each time. Raises GgufError."""
    reader = gguf.GGUFReader(gguf_path)
    metadata = _Metadata(reader)
    if metadata["general.architecture"] != "llama":
        raise GgufError(f"architecture {metadata['general.architecture']!r} instead of 'llama'")
    config = _build_config(metadata)
    tokens = [str(token) for token in metadata["tokenizer.ggml.tokens"]]
    kinds = metadata["tokenizer.ggml.token_type"]
    special = {token_id: tokens[token_id] for token_id, kind in enumerate(kinds) if kind == CONTROL_TOKEN}
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    (folder / "tokenizer.json").write_text(
        _build_tokenizer(metadata, tokens, special).to_str(), encoding="utf-8"
    )
    token_names = {
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
    }
    _write_json(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": list(special.values()), **token_names},
    )
    _write_json(
        folder / "tokenizer_config.json", _build_tokenizer_config(metadata, config, special, token_names)
    )
    write_bf16_safetensors(folder / "model.safetensors", _read_tensors(reader, config))


class _Metadata:
    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._reader = reader

    def __getitem__(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise GgufError(f"metadata {key!r} is missing")
        return field.contents()


def _build_config(metadata: _Metadata) -> dict[str, Any]:
    hidden_size = metadata["llama.embedding_length"]
    heads = metadata["llama.attention.head_count"]
    head_dim = hidden_size // heads
    if metadata["llama.rope.dimension_count"] != head_dim:
        raise GgufError("partial rotary embeddings are not a Llama's")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        # GGUF keeps float32: the shortest decimal that means the same float32 is what the author wrote (1e-05).
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "vocab_size": metadata["llama.vocab_size"],
    }


def _build_tokenizer(metadata: _Metadata, tokens: list[str], special: Mapping[int, str]) -> Tokenizer:
    """Byte-level BPE that splits every digit by itself first: what GGUF's pre-tokenizer name "smollm" stands for."""
    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise GgufError(f"tokenizer {kind} instead of ('gpt2', 'smollm')")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    if len(vocabulary) != metadata["llama.vocab_size"] or any(len(merge) != 2 for merge in merges):
        raise GgufError("the vocabulary or the merges are damaged")
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False)
    except Exception as error:  # the library raises nothing more precise
        raise GgufError(f"the vocabulary and the merges do not fit: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in special.values()]
    )
    for token_id, text in special.items():
        # The weights know it by this id.
        if tokenizer.token_to_id(text) != token_id:
            raise GgufError(f"special token {text!r} lost its id {token_id}")
    return tokenizer


def _build_tokenizer_config(
    metadata: _Metadata, config: dict[str, Any], special: Mapping[int, str], token_names: dict[str, str]
) -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token_id, text in special.items()
        },
        "additional_special_tokens": list(special.values()),
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        **token_names,
    }


def _read_tensors(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Bf16]:
    tensors: dict[str, Bf16] = {}
    for tensor in reader.tensors:
        name = _checkpoint_name(tensor.name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(int(size) for size in reversed(tensor.shape))
        )
        if name.endswith("q_proj.weight"):
            values = unpermute_rotary(values, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            values = unpermute_rotary(values, config["num_key_value_heads"])
        tensors[name] = to_bf16(values)
    expected = 2 + len(BLOCK_TENSORS) * config["num_hidden_layers"]
    if len(tensors) != expected:
        raise GgufError(f"{len(tensors)} tensors instead of {expected}")
    return tensors


def _checkpoint_name(gguf_name: str) -> str:
    if gguf_name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if gguf_name == "output_norm.weight":
        return "model.norm.weight"
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK_TENSORS and parts[3] == "weight":
        return f"model.layers.{int(parts[1])}.{BLOCK_TENSORS[parts[2]]}.weight"
    raise GgufError(f"unknown tensor {gguf_name!r}")


def unpermute_rotary(values: Float32, heads: int) -> Float32:
    """Give the rows of a query or key projection back in the checkpoint's order.

    GGUF interleaves the two halves of each head, for a rotation of neighbouring pairs; the checkpoint rotates halves.
    values: (heads * head_dim, hidden_size).
    """
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(
        json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
    )
