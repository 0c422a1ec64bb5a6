"""Sampling: each knob's meaning, noise that is a pure function, and draws that follow the distribution."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from services.worker.engine import Sampling
from services.worker.engine.noise import gumbel_noise, hash_32, noise_key
from services.worker.engine.sampling import Sampler, SamplingState, make_state

CPU = torch.device("cpu")
VOCABULARY = 3000


@pytest.fixture(params=["row by row", "whole batch"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    """As on a CPU, and as on a GPU: what holds, holds for both."""
    return Sampler(VOCABULARY, CPU, row_by_row=request.param == "row by row")


def state_of(
    index: int = 0,
    prompt: tuple[int, ...] = (),
    answer: tuple[int, ...] = (),
    ending: tuple[int, ...] = (),
    **knobs: Any,
) -> SamplingState:
    state = make_state(Sampling(**knobs), prompt, ending)
    for token in answer:
        state.note(token)
    state.index += index
    return state


def logits_of(values: dict[int, float], rest: float = -20.0) -> torch.Tensor:
    row = torch.full((VOCABULARY,), rest)
    for token, value in values.items():
        row[token] = value
    return row


def chosen(sampler: Sampler, row: torch.Tensor, state: SamplingState) -> int:
    (outcome,) = sampler.sample(row.clone().unsqueeze(0), [state])
    assert outcome is not None
    return outcome.token


def frequencies(sampler: Sampler, row: torch.Tensor, draws: int, **knobs: Any) -> Counter[int]:
    states = [state_of(index=index, seed=7, **knobs) for index in range(draws)]
    return Counter(
        outcome.token for outcome in sampler.sample(row.repeat(draws, 1), states) if outcome is not None
    )


def test_temperature_zero_takes_the_maximum(sampler: Sampler) -> None:
    assert chosen(sampler, logits_of({5: 3.0, 6: 3.1}), state_of(temperature=0.0)) == 6


def test_draws_follow_the_softmax_at_the_given_temperature(sampler: Sampler) -> None:
    row = logits_of({1: 2.0, 2: 1.0, 3: 0.0})
    for temperature in (0.7, 1.0, 1.6):
        counts = frequencies(sampler, row, 3000, temperature=temperature)
        weights = [math.exp(value / temperature) for value in (2.0, 1.0, 0.0)]
        for token, weight in zip((1, 2, 3), weights, strict=True):
            share = weight / sum(weights)
            # Five standard deviations of a binomial share.
            assert counts[token] / 3000 == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 3000))


def test_draws_reach_the_whole_vocabulary_when_logits_are_flat(sampler: Sampler) -> None:
    counts = frequencies(sampler, torch.zeros(VOCABULARY), 2000)
    mean_token = sum(token * count for token, count in counts.items()) / 2000
    assert len(counts) > 0.4 * VOCABULARY
    assert mean_token == pytest.approx(VOCABULARY / 2, rel=0.07)


def test_draw_equals_the_argmax_over_the_noise_of_every_token(sampler: Sampler) -> None:
    """The shortlist and the bound on hashes are only a shorter way."""
    generator = torch.Generator().manual_seed(3)
    for spread in (0.0, 0.3, 2.0, 6.0):
        rows = torch.randn(40, VOCABULARY, generator=generator) * spread
        states = [state_of(index=index, seed=11) for index in range(40)]
        everything = torch.arange(VOCABULARY)
        scores = rows - rows.amax(dim=-1, keepdim=True)
        naive = [
            int(
                (
                    row.double() + gumbel_noise(hash_32(torch.tensor(noise_key(11, index)), everything))
                ).argmax()
            )
            for index, row in enumerate(scores)
        ]
        assert [outcome.token for outcome in sampler.sample(rows, states) if outcome] == naive


def test_draw_depends_on_its_own_row_only(sampler: Sampler) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(12, VOCABULARY, generator=generator) * 3
    knobs: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.3},
        {"top_k": 40},
        {"top_p": 0.7},
        {"min_p": 0.05},
        {"top_k": 7, "top_p": 0.9, "temperature": 0.5},
    ]
    states = [state_of(index=row, seed=row, **knobs[row % len(knobs)]) for row in range(12)]
    together = [outcome.token for outcome in sampler.sample(rows.clone(), states) if outcome]
    assert together == [chosen(sampler, row, state) for row, state in zip(rows, states, strict=True)]
    backwards = [
        outcome.token for outcome in sampler.sample(rows.flip(0).contiguous(), states[::-1]) if outcome
    ]
    assert together == backwards[::-1]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 12345678901234567890123])
def test_any_integer_is_a_seed(sampler: Sampler, seed: int) -> None:
    assert -(2**63) <= noise_key(seed, 0) < 2**63
    assert 0 <= chosen(sampler, torch.zeros(VOCABULARY), state_of(seed=seed)) < VOCABULARY


def test_noise_differs_by_seed_and_by_index_and_repeats_for_both() -> None:
    keys = {noise_key(seed, index) for seed in range(50) for index in range(50)}
    assert len(keys) == 2500
    tokens = torch.arange(VOCABULARY)
    one, other = (hash_32(torch.tensor(noise_key(5, index)), tokens) for index in (8, 9))
    assert (one != other).float().mean().item() > 0.99
    # Fixed for good: a resume may happen on another release of the engine.
    assert hash_32(torch.tensor(noise_key(42, 7)), torch.arange(3)).tolist() == [
        250014405,
        3491965934,
        3923218728,
    ]


def test_noise_is_gumbel() -> None:
    noise = gumbel_noise(hash_32(torch.tensor(noise_key(1, 1)), torch.arange(100_000)))
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)


def test_noise_is_finite_at_both_ends_of_the_hash() -> None:
    assert torch.isfinite(gumbel_noise(torch.tensor([0, 2**32 - 1]))).all()


def test_top_k_draws_among_the_k_best_only(sampler: Sampler) -> None:
    row = logits_of({token: 1.0 - token / 100 for token in range(20)})
    assert set(frequencies(sampler, row, 300, top_k=3)) == {0, 1, 2}


def test_top_p_keeps_the_fewest_tokens_that_reach_the_share(sampler: Sampler) -> None:
    row = logits_of({1: math.log(0.5), 2: math.log(0.3), 3: math.log(0.15), 4: math.log(0.05)}, rest=-60.0)
    for top_p, kept in (
        (0.4, {1}),
        (0.49, {1}),
        (0.55, {1, 2}),
        (0.79, {1, 2}),
        (0.9, {1, 2, 3}),
        (0.99, {1, 2, 3, 4}),
    ):
        assert set(frequencies(sampler, row, 400, top_p=top_p)) == kept, top_p
    assert set(frequencies(sampler, row, 50, top_p=1e-9)) == {1}


def test_top_p_is_right_beyond_its_shortlist(sampler: Sampler) -> None:
    """Flat logits: 0.9 of 3000 equal tokens are 2700, more than the shortlist holds; ties all stay."""
    row = -torch.arange(VOCABULARY) * 1e-4
    probabilities = torch.softmax(row, dim=-1)
    kept = int((probabilities.cumsum(0) - probabilities < 0.9).sum())
    counts = frequencies(sampler, row, 1000, top_p=0.9)
    assert 1024 < max(counts) < kept
    assert max(counts) > 0.98 * kept


def test_min_p_drops_what_is_unlikely_beside_the_best(sampler: Sampler) -> None:
    row = logits_of({1: 0.0, 2: math.log(0.3), 3: math.log(0.05)}, rest=-60.0)
    assert set(frequencies(sampler, row, 500, min_p=0.1)) == {1, 2}


def test_tiny_temperature_is_greedy_and_finite(sampler: Sampler) -> None:
    assert chosen(sampler, logits_of({9: 4.0, 10: 3.999}), state_of(temperature=1e-30)) == 9


@pytest.mark.parametrize(
    ("knobs", "prompt", "answer", "expected"),
    [
        ({}, (), (), 1),
        ({"logit_bias": ((2, 1.0),)}, (), (), 2),
        ({"logit_bias": ((1, -100.0), (2, -100.0))}, (), (), 3),
        ({"repetition_penalty": 2.0}, (1,), (), 2),
        ({"repetition_penalty": 2.0}, (), (1,), 2),
        ({"repetition_penalty": 2.0}, (1, 2), (3,), 1),
        ({"presence_penalty": 0.7}, (1,), (), 1),
        ({"presence_penalty": 0.7}, (), (1,), 2),
        ({"presence_penalty": 0.7}, (), (1, 1, 1, 2), 3),
        ({"frequency_penalty": 0.3}, (), (1,), 1),
        ({"frequency_penalty": 0.3}, (), (1, 1), 2),
        ({"frequency_penalty": -0.6}, (), (3, 3), 3),
    ],
)
def test_penalties_and_bias_change_the_greedy_choice(
    sampler: Sampler, knobs: dict[str, Any], prompt: tuple[int, ...], answer: tuple[int, ...], expected: int
) -> None:
    row = logits_of({1: 3.0, 2: 2.5, 3: 2.4})
    assert chosen(sampler, row, state_of(temperature=0.0, prompt=prompt, answer=answer, **knobs)) == expected


def test_repetition_penalty_pushes_negative_logits_down(sampler: Sampler) -> None:
    row = logits_of({1: -1.0, 2: -1.5})
    assert chosen(sampler, row, state_of(temperature=0.0, prompt=(1,), repetition_penalty=2.0)) == 2


def test_ending_tokens_cannot_be_drawn_before_min_tokens(sampler: Sampler) -> None:
    row = logits_of({0: 9.0, 4: 8.0})
    picks = [
        chosen(sampler, row, state_of(index=index, temperature=0.0, ending=(0,), min_tokens=2))
        for index in range(4)
    ]
    assert picks == [4, 4, 0, 0]


def test_row_that_is_not_finite_fails_alone(sampler: Sampler) -> None:
    rows = torch.stack(
        [logits_of({1: 5.0}), logits_of({2: math.nan}), logits_of({3: math.inf}), logits_of({4: 5.0})]
    )
    outcomes = sampler.sample(
        rows, [state_of(temperature=0.0, logprobs=2), state_of(), state_of(), state_of(seed=1)]
    )
    assert [outcome.token if outcome else None for outcome in outcomes] == [1, None, None, 4]


def test_logprobs_are_of_the_raw_distribution(sampler: Sampler) -> None:
    row = logits_of({1: 2.0, 2: 1.0}, rest=-30.0)
    expected = torch.log_softmax(row, dim=-1)
    state = state_of(temperature=0.2, logit_bias=((2, 50.0),), logprobs=2)
    (outcome,) = sampler.sample(row.clone().unsqueeze(0), [state])
    assert outcome is not None and outcome.logprob is not None
    assert outcome.token == 2
    assert outcome.logprob.logprob == pytest.approx(expected[2].item())
    assert [token for token, _ in outcome.logprob.top] == [1, 2]


def test_logprobs_zero_gives_the_chosen_token_alone(sampler: Sampler) -> None:
    (outcome,) = sampler.sample(logits_of({1: 2.0}).unsqueeze(0), [state_of(temperature=0.0, logprobs=0)])
    assert outcome is not None and outcome.logprob is not None
    assert outcome.logprob.top == ()
