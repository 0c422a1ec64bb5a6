"""The engine against transformers: equal greedy tokens in fp32, close logits in bf16 and int8."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.engine import Sampling
from tests.unit.worker.engine.builders import (
    VOCAB_SIZE,
    make_engine,
    make_request,
    oracle_greedy,
    run_all,
    save_model,
    tiny_config,
)
from tests.unit.worker.engine.conftest import TinyModel

# Around the block of 16 tokens, and beyond the smallest attention group of 128.
PROMPT_LENGTHS = (1, 2, 5, 15, 16, 17, 40, 33, 120, 127, 140, 150)
ANSWER_TOKENS = 20


def random_prompts(seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def expected(tiny: TinyModel) -> list[list[int]]:
    answers = [oracle_greedy(tiny.oracle, prompt, ANSWER_TOKENS) for prompt in random_prompts()]
    assert min(len(set(answer)) for answer in answers) > 5, (
        "answers that repeat one token would prove nothing"
    )
    return answers


def test_greedy_equals_transformers_when_each_request_is_alone(
    tiny: TinyModel, expected: list[list[int]]
) -> None:
    engine = make_engine(tiny.folder)
    for number, prompt in enumerate(random_prompts()):
        answer = run_all(engine, [make_request("only", prompt, ANSWER_TOKENS)])["only"]
        assert answer.tokens == expected[number], f"prompt of {len(prompt)} tokens"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="one batch"),
        pytest.param({"max_batch": 3}, id="waiting for a place"),
        pytest.param({"prefill_chunk_tokens": 16}, id="chunks of 16"),
        pytest.param({"prefill_chunk_tokens": 7}, id="chunks across blocks"),
        pytest.param({"kv_tokens": 256}, id="pre-emption"),
    ],
)
def test_greedy_equals_transformers_in_a_ragged_batch(
    tiny: TinyModel, expected: list[list[int]], changes: dict[str, Any], kernels: str
) -> None:
    engine = make_engine(tiny.folder, kernels=kernels, **changes)
    answers = run_all(
        engine, [make_request(str(n), prompt, ANSWER_TOKENS) for n, prompt in enumerate(random_prompts())]
    )
    assert [answers[str(n)].tokens for n in range(len(expected))] == expected


def test_logprobs_equal_transformers_log_softmax(tiny: TinyModel) -> None:
    prompt = random_prompts()[6]
    sampling = Sampling(temperature=0.0, logprobs=5, repetition_penalty=1.3)
    engine = make_engine(tiny.folder)
    answer = run_all(engine, [make_request("a", prompt, 8, sampling=sampling, echo_logprobs=True)])["a"]
    with torch.inference_mode():
        logits = tiny.oracle(torch.tensor([prompt + answer.tokens])).logits[0]
    expected = torch.log_softmax(logits, dim=-1)
    scored = [*answer.prompt_logprobs, *answer.logprobs]
    assert [entry.token for entry in scored] == [*prompt[1:], *answer.tokens]
    for position, entry in enumerate(scored):
        assert entry.logprob == pytest.approx(expected[position, entry.token].item(), abs=1e-4)
        values, tokens = expected[position].topk(5)
        assert [token for token, _ in entry.top] == tokens.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_repetition_penalty_equals_transformers(tiny: TinyModel) -> None:
    prompt = random_prompts()[5]
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = tiny.oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            repetition_penalty=1.7,
            pad_token_id=0,
        )
    sampling = Sampling(temperature=0.0, repetition_penalty=1.7)
    answer = run_all(make_engine(tiny.folder), [make_request("a", prompt, 16, sampling=sampling)])["a"]
    assert answer.tokens == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("int8", 0.03)])
def test_lower_precision_stays_within_its_tolerance_of_fp32(
    tmp_path: Path, precision: str, tolerance: float, kernels: str
) -> None:
    """Mean absolute error of prompt logprobs over their spread; weights at their usual scale, not the widened one."""
    save_model(tmp_path, tiny_config(), scale=2.0)
    prompt = random_prompts()[9]
    scored = {}
    for each in ("fp32", precision):
        request = make_request(
            "a", prompt, 1, echo_logprobs=True, sampling=Sampling(temperature=0.0, logprobs=0)
        )
        answer = run_all(make_engine(tmp_path, precision=each, kernels=kernels), [request])["a"]
        scored[each] = torch.tensor([entry.logprob for entry in answer.prompt_logprobs])
    spread = scored["fp32"].std()
    assert ((scored["fp32"] - scored[precision]).abs().mean() / spread).item() < tolerance


def test_bf16_logprobs_are_close_to_transformers_bf16(tmp_path: Path, kernels: str) -> None:
    oracle = save_model(tmp_path, tiny_config(), scale=2.0).to(torch.bfloat16)
    prompt = random_prompts()[9]
    with torch.inference_mode():
        logits = oracle(torch.tensor([prompt])).logits[0].float()
    expected = torch.log_softmax(logits, dim=-1)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    request = make_request("a", prompt, 1, echo_logprobs=True, sampling=Sampling(temperature=0.0, logprobs=0))
    answer = run_all(make_engine(tmp_path, precision="bf16", kernels=kernels), [request])["a"]
    got = torch.tensor([entry.logprob for entry in answer.prompt_logprobs])
    # bf16 has 8 bits: logits near 4 are 0.03 apart.
    assert (got - expected).abs().max().item() < 0.03


def test_two_models_answer_side_by_side_as_each_does_alone(tmp_path: Path, tiny: TinyModel) -> None:
    other = save_model(tmp_path, tiny_config(), seed=11)
    engine = make_engine(tiny.folder)
    engine.load_model("other", tmp_path)
    prompts = random_prompts()[:6]
    requests = [make_request(f"m{n}", prompt, 10) for n, prompt in enumerate(prompts)]
    requests += [make_request(f"o{n}", prompt, 10, model="other") for n, prompt in enumerate(prompts)]
    answers = run_all(engine, requests)
    for number, prompt in enumerate(prompts):
        assert answers[f"m{number}"].tokens == oracle_greedy(tiny.oracle, prompt, 10)
        assert answers[f"o{number}"].tokens == oracle_greedy(other, prompt, 10)
