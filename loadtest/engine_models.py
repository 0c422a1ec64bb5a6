"""The models that `loadtest.engine` measures with: SmolLM2 as set-up made it, its GGUF files, and shapes with random weights.

What is made is kept under `.local/bench/`; a folder or file appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from infra.local.bf16_safetensors import Bf16, to_bf16, write_bf16_safetensors
from infra.local.demo_model import BASE_NAME, fetch_base_gguf
from infra.local.layout import ROOT

BENCH = ROOT / ".local" / "bench"
LLAMACPP_PACKAGES = BENCH / "packages"
"""Where `make bench-engine` installs infra/requirements/bench.txt."""

SMOLLM2 = ROOT / ".local" / "models" / BASE_NAME
PROSE = ROOT / "loadtest" / "data" / "prose.txt"

WEIGHTS_SEED, WEIGHTS_STD = 4096, 0.02

# Hidden 4096 in 16 heads of 256, of which 64 turn; vocabulary 50400: GPT-J-6B's shape, with 4 of its 28 layers.
GPTJ = {"n_embd": 4096, "n_head": 16, "rotary_dim": 64, "n_layer": 4, "vocab_size": 50400}
TINY_GPTJ = {"n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_layer": 2, "vocab_size": 300}
TINY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}


class MissingModel(RuntimeError):
    """A model cannot be had here; the text is one line that says why, and what to do."""


@dataclass(frozen=True, slots=True)
class BenchModel:
    """text: tokens of the fixed text, empty where the model has no tokenizer that knows it."""

    folder: Path
    vocab_size: int
    text: tuple[int, ...]


def read_smollm2() -> BenchModel:
    """Raises MissingModel."""
    if not (SMOLLM2 / "model.safetensors").exists():
        raise MissingModel(f"{SMOLLM2.relative_to(ROOT)} is not there: run 'make up' once, which makes it")
    return _read_model(SMOLLM2)


def make_tiny_llama() -> BenchModel:
    config = {
        **TINY_LLAMA,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    return _read_model(_ensure_random_model("tiny-llama", config, _llama_tensors(TINY_LLAMA)))


def make_gptj(*, tiny: bool) -> BenchModel:
    """Four layers of the real shape hold 1.2 billion weights: 2.4 GB, written once."""
    shape = TINY_GPTJ if tiny else GPTJ
    config = {
        **shape,
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_inner": None,
        "n_positions": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    folder = _ensure_random_model("tiny-gptj" if tiny else "gptj-4-layers", config, _gptj_tensors(shape))
    return BenchModel(folder, shape["vocab_size"], ())


def ensure_ggufs() -> dict[str, Path]:
    """SmolLM2's GGUF as the demo's wheel carries it, and one of 8 bits made from its weights. Raises MissingModel."""
    if not (LLAMACPP_PACKAGES / "xllamacpp").is_dir():
        raise MissingModel("llama.cpp is not installed: 'make bench-engine' installs it")
    original, eight_bits = BENCH / "smollm2-q4_1.gguf", BENCH / "smollm2-q8_0.gguf"
    if not original.exists():
        building = BENCH / ".building-gguf"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        fetch_base_gguf(building).rename(original)
        shutil.rmtree(building)
    if not eight_bits.exists():
        building = BENCH / ".building-q8_0.gguf"
        _requantize(original, building)
        building.rename(eight_bits)
    return {"Q4_1": original, "Q8_0": eight_bits}


def _requantize(source: Path, destination: Path) -> None:
    """The same metadata and weights, its 4-bit matrices as 8-bit ones: no weight is nearer to the original model than before,
    just as our safetensors are made from the same file."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture")
    assert architecture is not None
    writer = gguf.GGUFWriter(destination, architecture.contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, eight_bits), raw_dtype=eight_bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_model(folder: Path) -> BenchModel:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokens = tokenizer.encode(PROSE.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return BenchModel(folder, config["vocab_size"], tuple(tokens))


def _ensure_random_model(name: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """The same bytes each time; made anew when the config is another."""
    folder = BENCH / name
    written = json.dumps(config, indent=2, sort_keys=True)
    config_path = folder / "config.json"
    if config_path.exists() and config_path.read_text(encoding="utf-8") == written:
        return folder
    building = BENCH / f".building-{name}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    (building / "config.json").write_text(written, encoding="utf-8")
    _make_byte_tokenizer().save(str(building / "tokenizer.json"))
    rng = np.random.default_rng(WEIGHTS_SEED)
    tensors = {tensor: _random_weight(rng, tensor, shape) for tensor, shape in shapes.items()}
    write_bf16_safetensors(building / "model.safetensors", tensors)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)
    return folder


def _random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Bf16:
    if len(shape) == 1:
        is_scale = name.endswith("weight")
        return to_bf16(np.full(shape, 1.0 if is_scale else 0.0, dtype=np.float32))
    return to_bf16(rng.standard_normal(shape, dtype=np.float32) * np.float32(WEIGHTS_STD))


def _make_byte_tokenizer() -> Tokenizer:
    """256 tokens, one for each byte; ids beyond them have no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _llama_tensors(shape: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": (hidden,) for name in _LLAMA_NORMS}
        tensors |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "o")}
        tensors |= {f"{prefix}.self_attn.{name}_proj.weight": (kv, hidden) for name in ("k", "v")}
        tensors |= {f"{prefix}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        tensors[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
    return tensors


_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")


def _gptj_tensors(shape: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, vocabulary = shape["n_embd"], shape["vocab_size"]
    tensors: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocabulary, hidden),
        "transformer.ln_f.weight": (hidden,),
        "transformer.ln_f.bias": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
        "lm_head.bias": (vocabulary,),
    }
    for layer in range(shape["n_layer"]):
        prefix = f"transformer.h.{layer}"
        tensors |= {f"{prefix}.ln_1.{kind}": (hidden,) for kind in ("weight", "bias")}
        tensors |= {f"{prefix}.attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "k", "v", "out")}
        tensors |= {
            f"{prefix}.mlp.fc_in.weight": (4 * hidden, hidden),
            f"{prefix}.mlp.fc_in.bias": (4 * hidden,),
            f"{prefix}.mlp.fc_out.weight": (hidden, 4 * hidden),
            f"{prefix}.mlp.fc_out.bias": (hidden,),
        }
    return tensors
