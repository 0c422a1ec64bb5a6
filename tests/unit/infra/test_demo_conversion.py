"""GGUF to safetensors and LoRA merging, on tiny models, against torch and transformers as oracles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from infra.local.bf16_safetensors import read_bf16_safetensors, to_bf16, to_float32, write_bf16_safetensors
from infra.local.gguf_llama import GgufError, convert_gguf_to_folder
from infra.local.lora_merge import LoraMergeError, merge_lora
from shared.model_folder import ModelFolderLimits, inspect_model_folder

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
HEADS, KV_HEADS, HIDDEN = 4, 2, 32
# Three special tokens, 256 bytes, one merged pair.
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "hi"]
VOCABULARY = len(TOKENS)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        # Large weights: with the usual 0.02 wrong rotary rows would hardly show in the logits.
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    # Not `model.to`: that would round the rotary frequencies too.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    return model


def write_gguf(path: Path, model: LlamaForCausalLM, **metadata: Any) -> None:
    """As llama.cpp's converter writes it: rows of q and k reordered so that each rotated pair lies side by side."""
    writer = gguf.GGUFWriter(path, metadata.get("architecture", "llama"))
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (VOCABULARY - len(SPECIAL)))
    writer.add_token_merges(metadata.get("merges", ["h i"]))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        if heads is not None:
            rows, columns = values.shape
            values = (
                values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
            )
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(tmp_path: Path, model: LlamaForCausalLM, **metadata: Any) -> Path:
    write_gguf(tmp_path / "tiny.gguf", model, **metadata)
    folder = tmp_path / "tiny"
    folder.mkdir()
    convert_gguf_to_folder(tmp_path / "tiny.gguf", folder)
    return folder


def test_converted_folder_computes_what_the_original_does(
    tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    folder = convert(tmp_path, tiny_llama)

    converted = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens).logits, tiny_llama(tokens).logits, rtol=0, atol=0)


def test_converted_tokenizer_splits_digits_and_keeps_special_tokens(
    tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    tokenizer = Tokenizer.from_file(str(convert(tmp_path, tiny_llama) / "tokenizer.json"))

    encoded = tokenizer.encode("<|im_start|>hi 12<|im_end|>")

    assert encoded.tokens == ["<|im_start|>", "hi", "Ġ", "1", "2", "<|im_end|>"]
    assert (encoded.ids[0], encoded.ids[-1]) == (1, 2)
    assert tokenizer.decode(encoded.ids) == "hi 12"


def test_converted_folder_passes_the_registration_check(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    manifest = inspect_model_folder(convert(tmp_path, tiny_llama), ModelFolderLimits())

    assert (manifest.architecture, manifest.eos_token_ids) == ("LlamaForCausalLM", (2,))
    assert manifest.canonical_config["norm_eps"] == 1e-5
    assert manifest.has_chat_template


@pytest.mark.parametrize("metadata", [{"architecture": "gpt2"}, {"pre": "llama-bpe"}, {"merges": ["x y"]}])
def test_gguf_of_another_kind_is_refused(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, metadata: dict[str, Any]
) -> None:
    with pytest.raises(GgufError):
        convert(tmp_path, tiny_llama, **metadata)


def test_bf16_rounding_equals_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(10_000, generator=generator) * torch.logspace(-30, 30, 10_000)
    # 1 + 2^-8 lies half-way between two bf16 numbers.
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 0.0, -0.0])
    values = torch.cat([values, ties])

    ours = to_float32(to_bf16(values.numpy()))

    assert np.array_equal(ours, values.to(torch.bfloat16).to(torch.float32).numpy())


def test_bf16_rounding_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        to_bf16(np.array([1.0, np.inf], dtype=np.float32))


def test_written_safetensors_read_back_here_and_by_the_reference_reader(tmp_path: Path) -> None:
    tensors = {"b": to_bf16(np.ones((2, 3), np.float32)), "a": to_bf16(np.full((4,), 2.5, np.float32))}
    path = tmp_path / "x.safetensors"

    write_bf16_safetensors(path, tensors)

    ours, theirs = read_bf16_safetensors(path), load_file(path)
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(ours[name], tensor)
        assert np.array_equal(theirs[name].view(torch.uint16).numpy(), tensor)


ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}
MODULE = "model.layers.0.self_attn.q_proj"


def make_adapter(folder: Path, *, rows: int = 4, **config: Any) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A base of two tensors beside an adapter on one of them; returns (base file, A, B)."""
    generator = torch.Generator().manual_seed(5)
    down = torch.randn(2, 6, generator=generator).to(torch.bfloat16)
    up = torch.randn(rows, 2, generator=generator).to(torch.bfloat16)
    base = {f"{MODULE}.weight": torch.randn(4, 6, generator=generator), "model.norm.weight": torch.ones(6)}
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in base.items()}, folder / "base.safetensors")
    prefix = f"base_model.model.{MODULE}"
    save_file(
        {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | config))
    return folder / "base.safetensors", down, up


def test_merge_adds_the_scaled_product_and_nothing_else(tmp_path: Path) -> None:
    base, down, up = make_adapter(tmp_path)

    merged = merge_lora(base, tmp_path)

    before = load_file(base)
    expected = before[f"{MODULE}.weight"].double() + 2.0 * up.double() @ down.double()
    found = torch.from_numpy(to_float32(merged[f"{MODULE}.weight"])).double()
    # One rounding to bf16: 8 bits of mantissa, plus fp32 noise.
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-6)
    assert not np.array_equal(found, before[f"{MODULE}.weight"].double())
    assert np.array_equal(merged["model.norm.weight"], before["model.norm.weight"].view(torch.uint16).numpy())


@pytest.mark.parametrize(
    "config",
    [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"r": 3}],
)
def test_merge_refuses_an_adapter_that_means_another_sum(tmp_path: Path, config: dict[str, Any]) -> None:
    base, _, _ = make_adapter(tmp_path, **config)

    with pytest.raises(LoraMergeError):
        merge_lora(base, tmp_path)


def test_merge_refuses_an_adapter_of_another_shape(tmp_path: Path) -> None:
    base, _, _ = make_adapter(tmp_path, rows=5)

    with pytest.raises(LoraMergeError, match="shape"):
        merge_lora(base, tmp_path)
