"""Model types without a description of ours: transformers' module in the engine's hands, equal to transformers by itself."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    T5Config,
)

from services.worker.engine import Engine, ModelRefusal, SequenceRequest
from services.worker.engine.module_decoder import ModuleDecoder, ModuleRunner
from tests.unit.worker.engine.builders import (
    EOS,
    VOCAB_SIZE,
    make_engine,
    make_request,
    oracle_greedy,
    run_all,
    save_model,
    save_tokenizer,
    save_varied_model,
    tiny_config,
)
from tests.unit.worker.engine.test_families import SCORED, random_prompts

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
}
_KV2: dict[str, Any] = {"num_key_value_heads": 2}
TYPES: dict[str, PretrainedConfig] = {
    # Every other layer sees a window of 24 tokens only.
    "gpt_neo": GPTNeoConfig(
        **_COMMON, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=24
    ),
    "gemma2": Gemma2Config(**_COMMON, **_KV2, head_dim=16, sliding_window=24, tie_word_embeddings=False),
    # One key head for all.
    "falcon": FalconConfig(**_COMMON, multi_query=True, new_decoder_architecture=False, alibi=False),
    "gpt_bigcode": GPTBigCodeConfig(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=512, eos_token_id=EOS
    ),
    "phi": PhiConfig(**_COMMON, partial_rotary_factor=0.5),
    "mixtral": MixtralConfig(**_COMMON, **_KV2, num_local_experts=4, sliding_window=None),
    # Keys are wider than values.
    "deepseek_v3": DeepseekV3Config(
        **{**_COMMON, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "opt with a norm behind": OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        word_embed_proj_dim=32,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        do_layer_norm_before=False,
        eos_token_id=EOS,
    ),
    "gpt2 with scales by layer": GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=512,
        scale_attn_by_inverse_layer_idx=True,
        eos_token_id=EOS,
    ),
    "llama with yarn": tiny_config(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    ),
}


@pytest.mark.parametrize("name", TYPES)
def test_answers_equal_transformers_in_ragged_batches_and_after_preemption(tmp_path: Path, name: str) -> None:
    prompts = random_prompts()[1:5]
    _, expected = save_varied_model(tmp_path, TYPES[name], prompts, 10)
    several: list[dict[str, Any]] = [
        {"prefill_chunk_tokens": 23},
        {"kv_tokens": 192, "prefill_chunk_tokens": 64},
    ]
    for changes in several:
        engine = make_engine(tmp_path, **changes)
        assert isinstance(engine._models["m"].decoder, ModuleDecoder)
        answers = run_all(engine, [make_request(str(n), prompt, 10) for n, prompt in enumerate(prompts)])
        assert [answers[str(n)].tokens for n in range(len(prompts))] == expected, changes


@pytest.mark.parametrize("name", ["gemma2", "gpt_neo"])
def test_logprobs_equal_transformers(tmp_path: Path, name: str) -> None:
    oracle = save_model(tmp_path, TYPES[name], seed=2, scale=10.0)
    prompt = random_prompts()[3]
    request = make_request("a", prompt, 6, sampling=SCORED, echo_logprobs=True)
    answer = run_all(make_engine(tmp_path), [request])["a"]
    with torch.inference_mode():
        expected = torch.log_softmax(oracle(torch.tensor([prompt + answer.tokens])).logits[0], dim=-1)
    for position, entry in enumerate([*answer.prompt_logprobs, *answer.logprobs]):
        assert entry.logprob == pytest.approx(expected[position, entry.token].item(), abs=1e-4)


def test_what_a_team_sent_before_is_found_again_and_changes_nothing(tmp_path: Path) -> None:
    oracle = save_model(tmp_path, TYPES["gemma2"], seed=2, scale=10.0)
    prompt = random_prompts()[4]
    engine = make_engine(tmp_path)
    for attempt, tail in enumerate(([], [], [7, 8, 9])):
        answer = run_all(engine, [make_request(str(attempt), prompt + tail, 10)])[str(attempt)]
        assert answer.tokens == oracle_greedy(oracle, prompt + tail, 10)


def test_embedding_is_transformers_last_hidden_state(tmp_path: Path) -> None:
    oracle = save_model(tmp_path, TYPES["gemma2"], seed=2, scale=10.0)
    prompt = random_prompts()[3]
    request = make_request("a", prompt, 0, pooling="mean")
    embedding = run_all_embedding(make_engine(tmp_path, prefill_chunk_tokens=16), request)
    with torch.inference_mode():
        expected = oracle.model(torch.tensor([prompt])).last_hidden_state[0].mean(dim=0)
    assert embedding == pytest.approx(expected.tolist(), abs=1e-4)


def run_all_embedding(engine: Engine, request: SequenceRequest) -> list[float]:
    engine.add(request)
    deltas = [delta for _ in range(20) for delta in engine.step().deltas]
    assert [delta.error for delta in deltas] == [None]
    return list(deltas[0].embedding)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01), ("int8", 0.05)])
def test_lower_precisions_stay_close_to_fp32(tmp_path: Path, precision: str, tolerance: float) -> None:
    """Mean absolute error of prompt logprobs over their spread."""
    save_model(tmp_path, TYPES["phi"], scale=4.0)
    scored = {}
    for each in ("fp32", precision):
        request = make_request("a", random_prompts()[4], 1, sampling=SCORED, echo_logprobs=True)
        answer = run_all(make_engine(tmp_path, precision=each), [request])["a"]
        scored[each] = torch.tensor([entry.logprob for entry in answer.prompt_logprobs])
    error = (scored["fp32"] - scored[precision]).abs().mean() / scored["fp32"].std()
    assert 0 < error.item() < tolerance


def test_a_module_that_raises_ends_only_the_sequence_it_raised_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = save_model(tmp_path, TYPES["phi"], seed=2, scale=10.0)
    engine = make_engine(tmp_path)
    free_before = engine.free_kv_tokens
    run = ModuleRunner.run

    def run_unless_poisoned(
        self: ModuleRunner, tokens: torch.Tensor, start: int, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if 77 in tokens.tolist():
            raise RuntimeError("an expert is out of range")
        return run(self, tokens, start, cache)

    monkeypatch.setattr(ModuleRunner, "run", run_unless_poisoned)
    prompts = [[5, 6, 9], [5, 77], [12, 13]]
    answers = run_all(engine, [make_request(str(n), prompt, 6) for n, prompt in enumerate(prompts)])
    assert answers["1"].error is not None and "expert" in answers["1"].error
    for number in (0, 2):
        assert answers[str(number)].tokens == [token for token in oracle_greedy(oracle, prompts[number], 6)]
    assert engine.free_kv_tokens == free_before


def test_memory_after_leaving_and_cancelling_is_the_pool_s_alone(tmp_path: Path) -> None:
    """The decoder holds nothing of any sequence between passes."""
    save_model(tmp_path, TYPES["phi"])
    engine = make_engine(tmp_path)
    free_before = engine.free_kv_tokens
    for number, prompt in enumerate(random_prompts()[2:5]):
        engine.add(make_request(str(number), prompt, 50))
    for _ in range(4):
        engine.step()
    for number in range(3):
        engine.cancel(str(number))
    assert engine.free_kv_tokens == free_before
    gc.collect()
    assert [item for item in gc.get_objects() if type(item).__name__ == "DynamicCache"] == []


REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "an encoder": (
        T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4),
        "encoder",
    ),
    "a state that is no keys and values": (
        MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, state_size=4),
        "transformers' module|state is not a key",
    ),
    "a look ahead": (BertConfig(**_COMMON), "pieces"),
    "frequencies that follow a neighbour's length": (
        tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "dynamic",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_cannot_be_served_rightly_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    config, reason = REFUSED[name]
    auto = AutoModelForSeq2SeqLM if config.model_type == "t5" else AutoModelForCausalLM
    tmp_path.mkdir(exist_ok=True)
    auto.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ModelRefusal, match=reason):
        make_engine(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"experts_implementation": "sonicmoe"}, "experts_implementation"),
        ({"text_config": [{"experts_implementation": "sonicmoe"}]}, "experts_implementation"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
        ({"model_type": "no_such_type"}, "no_such_type"),
        ({"model_type": None}, "transformers cannot load"),
        ({"num_hidden_layers": 3}, "missing_keys"),
        ({"num_hidden_layers": 1}, "unexpected_keys"),
    ],
)
def test_a_config_that_reaches_elsewhere_or_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    save_model(tmp_path, TYPES["phi"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelRefusal, match=reason):
        make_engine(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    save_model(tmp_path, TYPES["phi"])
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelRefusal, match="neither model.safetensors nor its index"):
        make_engine(tmp_path)


def test_an_adapter_s_folder_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, TYPES["phi"])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelRefusal, match="adapter"):
        make_engine(tmp_path)


def test_loading_leaves_torch_s_default_dtype_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread is computing with it."""
    save_model(tmp_path, TYPES["phi"])
    seen: list[torch.dtype] = []
    set_default = torch.set_default_dtype

    def note(dtype: torch.dtype) -> None:
        seen.append(dtype)
        set_default(dtype)

    monkeypatch.setattr(torch, "set_default_dtype", note)
    make_engine(tmp_path, precision="bf16")
    assert set(seen) <= {torch.float32}
