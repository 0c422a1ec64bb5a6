"""Rows of a step together: each as if alone, over many steps, after a resume, with tokens unread; against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.worker.engine import Sampling
from services.worker.engine.draw_batch import cut_tensors, thresholds
from services.worker.engine.draw_rows import Cut, cut_of, threshold
from services.worker.engine.sampling import SampledToken, Sampler, SamplingState, make_state, sample_on_device
from services.worker.engine.scoring import score_tokens

CPU = torch.device("cpu")
VOCABULARY = 300
ENDING = (5, 6)

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from((0.0, 1e-30, 0.4, 1.0, 1.7)),
    top_k=st.sampled_from((0, 1, 7, 299, 300, 5000)),
    top_p=st.sampled_from((1.0, 0.95, 0.5, 1e-9)),
    min_p=st.sampled_from((0.0, 0.02, 1.0)),
    repetition_penalty=st.sampled_from((1.0, 1.3, 0.8)),
    presence_penalty=st.sampled_from((0.0, 0.6)),
    frequency_penalty=st.sampled_from((0.0, 0.5, -0.5)),
    logit_bias=st.sampled_from(((), ((3, 4.0), (3, 1.0), (9, -100.0)))),
    bad_words=st.sampled_from(((), ((1,), (2,)), ((4, 8), (7,)))),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.sampled_from((None, 0, 1, 5)),
    min_tokens=st.integers(0, 3),
)


@pytest.fixture(params=["row by row", "whole batch"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return Sampler(VOCABULARY, CPU, row_by_row=request.param == "row by row")


def logits_at(step: int, row: int) -> torch.Tensor:
    """What a model would say: coarse, so that ties are common."""
    generator = torch.Generator().manual_seed(1000 * row + step)
    return ((torch.randn(VOCABULARY, generator=generator) * 3) * 8).round() / 8


def states_of(wishes: list[Sampling]) -> list[SamplingState]:
    return [make_state(wish, prompt_of(row), ENDING) for row, wish in enumerate(wishes)]


def prompt_of(row: int) -> tuple[int, ...]:
    """Of lengths that differ, as the lists of seen tokens then do."""
    return (row, 10, 11, 10, *range(20, 20 + 7 * row))


def step_of(sampler: Sampler, states: list[SamplingState], rows: list[int], step: int) -> list[SampledToken]:
    outcomes = sampler.sample(
        torch.stack([logits_at(step, row) for row in rows]), [states[row] for row in rows]
    )
    sampled = [outcome for outcome in outcomes if outcome is not None]
    assert len(sampled) == len(rows)
    for row, outcome in zip(rows, sampled, strict=True):
        states[row].note(outcome.token)
    return sampled


def alone(wish: Sampling, row: int, steps: int, row_by_row: bool) -> list[SampledToken]:
    """A row by itself, with nothing kept from step to step."""
    states = states_of([wish] * (row + 1))
    return [step_of(Sampler(VOCABULARY, CPU, row_by_row), states, [row], step)[0] for step in range(steps)]


@settings(max_examples=40, deadline=None)
@given(
    wishes=st.lists(samplings, min_size=1, max_size=6),
    leaving=st.lists(st.integers(0, 5), max_size=4),
    row_by_row=st.booleans(),
)
def test_a_row_is_the_same_to_the_bit_whoever_comes_and_goes_beside_it(
    wishes: list[Sampling], leaving: list[int], row_by_row: bool
) -> None:
    """Every step another set of rows may be there; what is kept from the last one must fit."""
    sampler = Sampler(VOCABULARY, CPU, row_by_row)
    states = states_of(wishes)
    seen: dict[int, list[SampledToken]] = {row: [] for row in range(len(wishes))}
    for step in range(6):
        absent = leaving[step % len(leaving)] if leaving else None
        rows = [row for row in range(len(wishes)) if row != absent]
        if step % 2:
            rows.reverse()
        if rows:
            # Rows are at different tokens of their answers.
            outcomes = sampler.sample(
                torch.stack([logits_at(len(seen[row]), row) for row in rows]), [states[row] for row in rows]
            )
            for row, outcome in zip(rows, outcomes, strict=True):
                assert outcome is not None
                states[row].note(outcome.token)
                seen[row].append(outcome)
    for row, wish in enumerate(wishes):
        assert seen[row] == alone(wish, row, len(seen[row]), row_by_row)


@settings(max_examples=40, deadline=None)
@given(wish=samplings)
def test_both_ways_of_drawing_choose_the_same_token(wish: Sampling) -> None:
    by_rows, whole = (alone(wish, 3, 4, row_by_row) for row_by_row in (True, False))
    assert [each.token for each in by_rows] == [each.token for each in whole]


@settings(max_examples=100, deadline=None)
@given(
    cuts=st.lists(
        st.builds(
            Cut,
            temperature=st.floats(0.1, 3.0),
            top_k=st.sampled_from((0, 1, 5, 50)),
            top_p=st.floats(0.01, 1.0),
            min_p=st.sampled_from((0.0, 0.1, 1.0)),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_both_ways_cut_at_the_same_score(cuts: list[Cut]) -> None:
    scores = torch.stack([logits_at(1, row) for row in range(len(cuts))])
    scores -= scores.amax(dim=-1, keepdim=True)
    assume(not any(ends_on_a_border(row, cut) for row, cut in zip(scores, cuts, strict=True)))
    whole = thresholds(scores, cut_tensors(cuts, CPU))
    work = torch.empty(VOCABULARY).numpy()
    by_rows = [threshold(row.numpy(), cut, work) for row, cut in zip(scores, cuts, strict=True)]
    for row, ours, theirs in zip(scores, by_rows, whole, strict=True):
        assert torch.equal(row >= ours, row >= theirs)


def ends_on_a_border(scores: torch.Tensor, cut: Cut) -> bool:
    """Whether rounding decides if one token more belongs to top_p: the two ways add up in different orders."""
    descending = scores.double().sort(descending=True).values
    if cut.top_k:
        descending = descending[descending >= descending[cut.top_k - 1]]
    shares = descending.exp().cumsum(0) / descending.exp().sum()
    return bool(((shares - cut.top_p).abs() < 1e-5).any())


def test_a_resumed_answer_goes_on_as_the_unbroken_one(sampler: Sampler) -> None:
    wishes = [
        Sampling(
            seed=row, temperature=1.2, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2
        )
        for row in range(4)
    ]
    unbroken = states_of(wishes)
    tokens = [[each.token for each in step_of(sampler, unbroken, [0, 1, 2, 3], step)] for step in range(8)]
    resumed = states_of(wishes)
    for step in range(5):
        for state, token in zip(resumed, tokens[step], strict=True):
            state.note(token)
    again = [[each.token for each in step_of(sampler, resumed, [0, 1, 2, 3], step)] for step in range(5, 8)]
    assert again == tokens[5:]


def test_a_pass_that_is_repeated_counts_no_token_twice(sampler: Sampler) -> None:
    """The device has counted what the first try drew; the host never heard of it."""
    states = states_of([Sampling(temperature=0.0, frequency_penalty=50.0, repetition_penalty=3.0)] * 2)
    first = step_of(sampler, states, [0, 1], 0)
    rows = torch.stack([logits_at(1, 0), logits_at(1, 1)])
    lost = sampler.sample(rows.clone(), states)
    again = [sampler.sample(rows[row : row + 1].clone(), [states[row]])[0] for row in (0, 1)]
    assert again == lost
    assert first == [alone(states[row].sampling, row, 1, True)[0] for row in (0, 1)]


def test_steps_may_start_before_the_last_ones_tokens_are_read(sampler: Sampler) -> None:
    wishes = [
        Sampling(
            seed=row, temperature=0.9 * (row % 2), repetition_penalty=1.5, frequency_penalty=0.5, logprobs=2
        )
        for row in range(5)
    ]
    states = states_of(wishes)
    batch = sampler.prepare(states[:4])
    first = sample_on_device(torch.stack([logits_at(0, row) for row in range(4)]), batch)
    # Unread: row 1 has left, row 4 comes in with its first token.
    rows = [3, 0, 2, 4]
    batch = sampler.prepare([states[row] for row in rows], unread=[1, 1, 1, 0])
    second = sample_on_device(torch.stack([logits_at(int(row != 4), row) for row in rows]), batch)
    by_row = {row: alone(wishes[row], row, 2, True) for row in range(5)}
    read = [each for each in first.read() if each is not None]
    assert [each.token for each in read] == [by_row[row][0].token for row in range(4)]
    read = [each for each in second.read() if each is not None]
    assert [each.token for each in read] == [by_row[row][int(row != 4)].token for row in rows]


@pytest.mark.parametrize("is_longest_first", [True, False])
def test_penalties_stay_right_when_the_longest_history_leaves_or_comes(
    sampler: Sampler, is_longest_first: bool
) -> None:
    """The short row's few seen tokens move within a table that gets narrower, or wider."""
    short = make_state(Sampling(temperature=0.0, presence_penalty=100.0), (), ())
    long = make_state(Sampling(temperature=0.0, repetition_penalty=1.5), tuple(range(100, 200)), ())
    logits = logits_at(0, 0)
    drawn = []
    for step in range(6):
        rows = [short, long] if is_longest_first == (step < 3) else [short]
        outcomes = sampler.sample(logits.repeat(len(rows), 1), rows)
        for state, outcome in zip(rows, outcomes, strict=True):
            assert outcome is not None
            state.note(outcome.token)
        drawn.append(short.answer[-1])
    # A token that was drawn is as good as forbidden, so the same logits give the next best each time.
    assert drawn == logits.sort(descending=True, stable=True).indices[:6].tolist()


def test_what_looks_at_unread_tokens_is_refused(sampler: Sampler) -> None:
    penalised, worded = states_of(
        [Sampling(temperature=0.0, presence_penalty=1.0), Sampling(temperature=0.0, bad_words=((4, 8),))]
    )
    with pytest.raises(ValueError, match="the last batch does not hold"):
        sampler.prepare([penalised], unread=[1])
    sampler.sample(logits_at(0, 0).unsqueeze(0), [worded])
    with pytest.raises(ValueError, match="bad words"):
        sampler.prepare([worded], unread=[1])


def test_the_same_rows_are_prepared_once(sampler: Sampler) -> None:
    states = states_of([Sampling(temperature=0.0)] * 3)
    batch = sampler.prepare(states)
    sampler.sample(torch.stack([logits_at(0, row) for row in range(3)]), states)
    for state in states:
        state.note(1)
    assert sampler.prepare(states) is batch
    assert sampler.prepare(states[:2]) is not batch


def test_rows_beyond_the_batch_are_ignored(sampler: Sampler) -> None:
    """A captured graph computes a whole bucket."""
    logits = torch.stack([logits_at(0, 0), torch.full((VOCABULARY,), math.nan)])
    (outcome,) = sampler.sample(logits, states_of([Sampling(seed=1)]))
    assert outcome is not None


def test_seen_tokens_take_no_more_room_than_the_longest_history(sampler: Sampler) -> None:
    """Rows that come and go for long, always some of them staying, must not pile up what earlier ones left."""
    wish = Sampling(temperature=0.0, repetition_penalty=1.2)
    states = [make_state(wish, (1, 2, 3), ENDING) for _ in range(2)]
    for step in range(400):
        states = [states[1], make_state(wish, (1, 2, 3), ENDING)] if step % 3 == 0 else states
        for state, outcome in zip(
            states,
            sampler.sample(torch.stack([logits_at(step, row) for row in range(2)]), states),
            strict=True,
        ):
            assert outcome is not None
            state.note(outcome.token)
    table = sampler.prepare(states).penalties
    assert table is not None and table.listed_tokens < 3 + 12


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("knobs", [{}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.05}])
def test_draws_follow_the_distribution_by_chi_square(
    sampler: Sampler, temperature: float, knobs: dict[str, Any]
) -> None:
    draws = 4000
    # Without ties, where transformers' top-p drops some of equal tokens.
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(5)) * 1.5
    wish = Sampling(temperature=temperature, seed=3, **knobs)
    states = [make_state(wish, (), ()) for _ in range(draws)]
    for index, state in enumerate(states):
        state.index = index
    outcomes = sampler.sample(logits.repeat(draws, 1), states)
    counts = torch.bincount(
        torch.tensor([each.token for each in outcomes if each is not None]), minlength=VOCABULARY
    )
    expected = torch.softmax(warped(logits, wish, ()), dim=-1) * draws
    assert not counts[expected == 0].any()
    common = expected >= 5
    chi_square = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    rest = float(expected[~common].sum())
    if rest > 0:
        chi_square += (float(counts[~common].sum()) - rest) ** 2 / rest
    freedom = int(common.sum()) - (rest == 0)
    # Wilson and Hilferty's cube root is normal: five standard deviations.
    deviation = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviation < 5


def warped(logits: torch.Tensor, wish: Sampling, seen: tuple[int, ...]) -> torch.Tensor:
    """transformers' processors, in the order of its `generate`."""
    chain = LogitsProcessorList()
    if wish.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(wish.repetition_penalty))
    chain.append(TemperatureLogitsWarper(wish.temperature))
    if wish.top_k:
        chain.append(TopKLogitsWarper(wish.top_k))
    if wish.top_p < 1.0:
        chain.append(TopPLogitsWarper(wish.top_p))
    if wish.min_p:
        chain.append(MinPLogitsWarper(wish.min_p))
    result: torch.Tensor = chain(torch.tensor([seen], dtype=torch.long), logits.clone().unsqueeze(0))[0]
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from((0.5, 1.0, 1.8)),
    top_k=st.sampled_from((0, 1, 20)),
    top_p=st.sampled_from((1.0, 0.9, 0.3)),
    min_p=st.sampled_from((0.0, 0.03)),
    repetition_penalty=st.sampled_from((1.0, 1.4)),
    row_by_row=st.booleans(),
)
def test_what_may_be_drawn_is_what_transformers_keeps(
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    row_by_row: bool,
) -> None:
    """Without ties, where transformers drops some of equal tokens and we keep all."""
    wish = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    seen = (4, 9, 9, 250)
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    expected = warped(logits, wish, seen)
    batch = Sampler(VOCABULARY, CPU).prepare([make_state(wish, seen, ())])
    adjusted = logits.clone().unsqueeze(0)
    batch.adjust(adjusted)
    scores = (adjusted - adjusted.amax()) / temperature
    cut = cut_of(wish, VOCABULARY)
    if row_by_row:
        lowest = threshold(scores[0].numpy(), cut, torch.empty(VOCABULARY).numpy())
    else:
        lowest = float(thresholds(scores, cut_tensors([cut], CPU)))
    kept = scores[0] >= lowest
    assert torch.equal(kept, expected > -math.inf)
    ours, theirs = (torch.log_softmax(each[kept], dim=-1) for each in (scores[0], expected))
    torch.testing.assert_close(ours, theirs)


def test_a_row_whose_tokens_are_all_forbidden_fails_alone(sampler: Sampler) -> None:
    banned = tuple((token,) for token in range(VOCABULARY))
    for temperature in (0.0, 1.0):
        states = states_of([Sampling(temperature=temperature, bad_words=banned), Sampling(seed=4)])
        lost, kept = sampler.sample(torch.stack([logits_at(0, 0), logits_at(0, 1)]), states)
        assert lost is None
        assert kept == alone(Sampling(seed=4), 1, 1, True)[0]


def test_equal_logits_go_to_the_lowest_token_also_among_the_most_likely(sampler: Sampler) -> None:
    row = torch.zeros(VOCABULARY)
    row[[7, 3, 250, 90]] = 2.0
    (outcome,) = sampler.sample(row.unsqueeze(0), states_of([Sampling(temperature=0.0, logprobs=3)]))
    assert outcome is not None and outcome.logprob is not None
    assert outcome.token == 3
    assert [token for token, _ in outcome.logprob.top] == [3, 7, 90]


def test_each_row_gets_as_many_alternatives_as_it_asked_for(sampler: Sampler) -> None:
    wishes = [Sampling(temperature=0.0, logprobs=count) for count in (3, None, 0, 400, 1)]
    logits = torch.stack([logits_at(0, row) for row in range(5)])
    expected = torch.log_softmax(logits, dim=-1)
    outcomes = sampler.sample(logits, states_of(wishes))
    for row, (outcome, wish) in enumerate(zip(outcomes, wishes, strict=True)):
        assert outcome is not None
        if wish.logprobs is None:
            assert outcome.logprob is None
            continue
        assert outcome.logprob is not None
        assert outcome.logprob.logprob == pytest.approx(expected[row, outcome.token].item(), abs=1e-6)
        best = expected[row].sort(descending=True, stable=True)
        count = min(wish.logprobs, VOCABULARY)
        assert [token for token, _ in outcome.logprob.top] == best.indices[:count].tolist()
        assert [value for _, value in outcome.logprob.top] == pytest.approx(
            best.values[:count].tolist(), abs=1e-6
        )


def test_prompt_tokens_are_scored_many_at_once() -> None:
    logprobs = torch.log_softmax(torch.stack([logits_at(0, row) for row in range(3)]), dim=-1)
    scores = score_tokens(logprobs, [4, 5, 6], 2)
    assert [score.token for score in scores] == [4, 5, 6]
    for row, score in zip(logprobs, scores, strict=True):
        assert score.logprob == row[score.token].item()
        assert [value for _, value in score.top] == row.sort(descending=True).values[:2].tolist()
    assert [score.top for score in score_tokens(logprobs, [4, 5, 6], None)] == [(), (), ()]
