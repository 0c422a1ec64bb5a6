"""Every described model type against transformers: the same greedy tokens in fp32, close values in lower precisions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.worker.engine import Sampling
from tests.unit.worker.engine.builders import (
    VOCAB_SIZE,
    make_engine,
    make_request,
    run_all,
    save_model,
    save_varied_model,
)
from tests.unit.worker.engine.family_configs import TYPES, VARIANTS

# Around a block of 16 tokens, and beyond the smallest attention group of 128.
PROMPT_LENGTHS = (1, 15, 17, 40, 126, 140)
ANSWER_TOKENS = 12
# The normed embedding, which is the head as well, outweighs three layers of smaller weights.
SCALES = {"bloom": 25.0}
SCORED = Sampling(temperature=0.0, logprobs=3)


def random_prompts(seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]


@dataclass(frozen=True)
class Case:
    """A random model whose answers differ. expected: transformers' greedy answers to `random_prompts`."""

    folder: Path
    oracle: Any
    expected: list[list[int]]


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("variant")
    scale = SCALES.get(request.param, 12.0)
    oracle, expected = save_varied_model(
        folder, VARIANTS[request.param], random_prompts(), ANSWER_TOKENS, scale
    )
    return Case(folder, oracle, expected)


def test_greedy_equals_transformers_when_each_request_is_alone(case: Case, kernels: str) -> None:
    engine = make_engine(case.folder, kernels=kernels)
    for prompt, expected in zip(random_prompts(), case.expected, strict=True):
        answer = run_all(engine, [make_request("only", prompt, ANSWER_TOKENS)])["only"]
        assert answer.tokens == expected, f"prompt of {len(prompt)} tokens"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"prefill_chunk_tokens": 23}, id="chunks across blocks"),
        pytest.param({"prefill_chunk_tokens": 64, "kv_tokens": 256}, id="pre-emption"),
    ],
)
def test_greedy_equals_transformers_in_a_ragged_batch(
    case: Case, changes: dict[str, Any], kernels: str
) -> None:
    requests = [make_request(str(n), prompt, ANSWER_TOKENS) for n, prompt in enumerate(random_prompts())]
    answers = run_all(make_engine(case.folder, kernels=kernels, **changes), requests)
    assert [answers[str(n)].tokens for n in range(len(requests))] == case.expected


def test_logprobs_equal_transformers(case: Case, kernels: str) -> None:
    prompt = random_prompts()[5]
    request = make_request("a", prompt, 6, sampling=SCORED, echo_logprobs=True)
    answer = run_all(make_engine(case.folder, kernels=kernels), [request])["a"]
    with torch.inference_mode():
        expected = torch.log_softmax(case.oracle(torch.tensor([prompt + answer.tokens])).logits[0], dim=-1)
    scored = [*answer.prompt_logprobs, *answer.logprobs]
    assert [entry.token for entry in scored] == [*prompt[1:], *answer.tokens]
    for position, entry in enumerate(scored):
        assert entry.logprob == pytest.approx(expected[position, entry.token].item(), abs=1e-4)
        values = expected[position].topk(3).values
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.fixture(scope="module", params=TYPES)
def usual(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the type with weights of about their usual size: wide ones amplify rounding."""
    folder = tmp_path_factory.mktemp("usual")
    save_model(folder, VARIANTS[request.param], seed=5, scale=3.0)
    return folder


def scored_prompt(folder: Path, precision: str, kernels: str) -> torch.Tensor:
    request = make_request("a", random_prompts()[5], 1, sampling=SCORED, echo_logprobs=True)
    answer = run_all(make_engine(folder, precision=precision, kernels=kernels), [request])["a"]
    assert answer.error is None
    return torch.tensor([entry.logprob for entry in answer.prompt_logprobs])


def test_bf16_is_as_close_to_fp32_as_transformers_bf16_is(usual: Path, kernels: str) -> None:
    """Mean absolute errors of prompt logprobs against fp32; and neither is far from the other anywhere."""
    prompt = random_prompts()[5]
    module = AutoModelForCausalLM.from_pretrained(usual, dtype=torch.bfloat16)
    with torch.inference_mode():
        logprobs = torch.log_softmax(module(torch.tensor([prompt])).logits[0].float(), dim=-1)
    theirs = logprobs[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
    ours, exact = scored_prompt(usual, "bf16", kernels), scored_prompt(usual, "fp32", kernels)
    assert 0 < (ours - exact).abs().mean() < 1.25 * (theirs - exact).abs().mean()
    # bf16 has 8 bits: logits near 4 are 0.03 apart.
    assert (ours - theirs).abs().max().item() < 0.06


@pytest.mark.parametrize(
    ("precision", "kernels", "tolerance"),
    [("fp16", "auto", 0.002), ("int8", "torch", 0.03), ("int8", "auto", 0.03)],
)
def test_lower_precision_stays_close_to_fp32(
    usual: Path, precision: str, kernels: str, tolerance: float
) -> None:
    """Mean absolute error of prompt logprobs over their spread."""
    exact = scored_prompt(usual, "fp32", "torch")
    error = (scored_prompt(usual, precision, kernels) - exact).abs().mean() / exact.std()
    assert 0 < error.item() < tolerance
