"""Builds tiny model folders of the Llama family, sound ones and the pieces of hostile ones, without torch."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shared.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shared.model_folder import ModelManifest
from shared.model_type import describe_model_type

VOCABULARY = 258  # 256 bytes, and two special tokens
TEMPLATE = "{% for m in messages %}<|s|>{{ m['role'] }}: {{ m['content'] }}<|e|>{% endfor %}"
Json = dict[str, Any]


def make_config(**changes: Any) -> Json:
    config: Json = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": 257,
    }
    return {key: value for key, value in (config | changes).items() if value is not ...}


@functools.cache
def _tokenizer_text() -> str:
    return make_tokenizer().to_str()


def make_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|s|>", "<|e|>"])
    return tokenizer


Tensors = dict[str, tuple[str, tuple[int, ...]]]
ITEM_BYTES = {"BF16": 2, "F32": 4, "I8": 1}


def make_tensors(config: Json) -> Tensors:
    return {name: ("BF16", shape) for name, shape in describe_model_type(config).tensors.items()}


def safetensors_bytes(tensors: Tensors) -> bytes:
    header: Json = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = ITEM_BYTES[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return raw_safetensors(json.dumps(header).encode(), b"\0" * offset)


def raw_safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


def make_folder(folder: Path, **config_changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = make_config(**config_changes)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [257, 256]})
    write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE, "eos_token": "<|e|>"})
    (folder / "tokenizer.json").write_text(_tokenizer_text())
    (folder / "model.safetensors").write_bytes(safetensors_bytes(make_tensors(config)))
    return folder


def shard(folder: Path) -> None:
    tensors = make_tensors(make_config())
    names = list(tensors)
    halves = {"model-1-of-2.safetensors": names[:5], "model-2-of-2.safetensors": names[5:]}
    (folder / "model.safetensors").unlink()
    for file, members in halves.items():
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in members}))
    weight_map = {name: file for file, members in halves.items() for name in members}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def edit_config(folder: Path, **changes: Any) -> None:
    write_json(folder / "config.json", make_config(**changes))


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


ADAPTER: Json = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "init_lora_weights": True,
}


def make_adapter_folder(folder: Path, **config_changes: Any) -> Path:
    """An adapter on the model that `make_folder` makes."""
    folder.mkdir(exist_ok=True)
    config = ADAPTER | config_changes
    write_json(folder / ADAPTER_CONFIG, config)
    tensors: Tensors = {}
    for layer in range(2):
        for module, outputs in (("q_proj", 8), ("v_proj", 4)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = ("F32", (config["r"], 8))
            tensors[f"{name}.lora_B.weight"] = ("F32", (outputs, config["r"]))
    (folder / ADAPTER_WEIGHTS).write_bytes(safetensors_bytes(tensors))
    return folder


def make_base(folder: Path, config: Json) -> Path:
    """As much of a checked model's folder as the check of an adapter reads."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    kind = describe_model_type(config)
    manifest = ModelManifest(
        files=(), architecture=kind.architecture, signature=kind.signature, canonical_config=kind.canonical,
        context_tokens=kind.context_tokens, vocab_size=kind.vocab_size, eos_token_ids=(257,), parameter_count=1,
        has_chat_template=True,
    )  # fmt: skip
    write_json(folder / "manifest.json", manifest.to_json())
    return folder
