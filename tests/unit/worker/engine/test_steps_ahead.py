"""A step launched before the last one's tokens are read gives the same answers, and nobody gets a token too many."""

from __future__ import annotations

import dataclasses
import gc
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.engine import Engine, Sampling, SequenceRequest
from services.worker.engine.kv_cache import BLOCK_TOKENS
from services.worker.engine.packing import PackedTokens
from tests.unit.worker.engine.builders import (
    EOS,
    GREEDY,
    VOCAB_SIZE,
    Answer,
    make_engine,
    make_request,
    run_all,
)
from tests.unit.worker.engine.conftest import TinyModel

KNOBS = (
    GREEDY,
    Sampling(temperature=0.0, logprobs=3),
    Sampling(temperature=1.0, seed=3, min_tokens=5),
    Sampling(temperature=0.8, top_p=0.9, seed=4, logprobs=0),
    Sampling(temperature=1.2, top_k=20, repetition_penalty=1.3, seed=5),
    Sampling(temperature=0.9, presence_penalty=0.5, frequency_penalty=0.4, seed=6),
    Sampling(temperature=1.0, seed=7, bad_words=((9, 11), (40,))),
)


def requests_of(seed: int, count: int, knobs: tuple[Sampling, ...] = KNOBS) -> list[SequenceRequest]:
    rng = random.Random(seed)
    return [
        make_request(
            f"s{number}",
            [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice((1, 3, 16, 31, 50, 90)))],
            rng.randrange(1, 40),
            sampling=rng.choice(knobs),
            stop=rng.choice(((), ("e",), ("th", "ü"))),
            echo_logprobs=rng.random() < 0.2,
            isolation_key=rng.choice(("a", "b")),
        )
        for number in range(count)
    ]


def run_ahead(
    folder: Path, requests: list[SequenceRequest], **changes: Any
) -> tuple[Engine, dict[str, Answer]]:
    engine = make_engine(folder, steps_ahead=1, **changes)
    answers = run_all(engine, requests)
    assert engine.free_kv_tokens == engine.config.kv_tokens
    return engine, answers


def note_drawn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many unread tokens each pass takes, filled as passes run."""
    taken: list[int] = []
    decoder = engine._models["m"].decoder
    forward = decoder.forward

    def noting_forward(batch: PackedTokens, *rest: Any) -> torch.Tensor:
        taken.append(sum(token < 0 for token in batch.tokens))
        return forward(batch, *rest)

    monkeypatch.setattr(decoder, "forward", noting_forward)
    return taken


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kv_tokens", [160, 2048])
def test_answers_are_those_of_one_step_at_a_time(tiny: TinyModel, seed: int, kv_tokens: int) -> None:
    requests = requests_of(seed, 20)
    plain = run_all(make_engine(tiny.folder, kv_tokens=kv_tokens), requests)
    _, ahead = run_ahead(tiny.folder, requests, kv_tokens=kv_tokens)
    assert ahead == plain


def test_arrivals_and_cancels_at_any_time_change_no_answer(tiny: TinyModel) -> None:
    requests = requests_of(5, 24)
    plain = run_all(make_engine(tiny.folder), requests)
    for seed in range(6):
        rng = random.Random(seed)
        left = list(requests)
        rng.shuffle(left)
        engine = make_engine(
            tiny.folder, steps_ahead=1, max_batch=rng.choice((2, 5)), kv_tokens=rng.choice((160, 640))
        )
        cancelled: set[str] = set()

        def before_step(
            _step: int,
            rng: random.Random = rng,
            left: list[SequenceRequest] = left,
            engine: Engine = engine,
            cancelled: set[str] = cancelled,
        ) -> None:
            for _ in range(rng.randrange(3)):
                if left:
                    engine.add(left.pop())
            if rng.random() < 0.15:
                victim = f"s{rng.randrange(24)}"
                engine.cancel(victim)
                cancelled.add(victim)

        while left or engine.has_work:
            for sequence_id, answer in run_all(engine, before_step=before_step).items():
                if sequence_id in cancelled and answer.finish_reason is None:
                    assert answer.tokens == plain[sequence_id].tokens[: len(answer.tokens)]
                else:
                    assert answer == plain[sequence_id]
        assert engine.free_kv_tokens == engine.config.kv_tokens


def test_steps_are_in_fact_launched_before_tokens_are_read(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny.folder, steps_ahead=1)
    taken = note_drawn(engine, monkeypatch)
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    run_all(
        engine, [make_request("a", [5], 6, sampling=sampling), make_request("b", [6], 4, sampling=sampling)]
    )
    # The prompts, then each step from tokens unread; "b" leaves with its length known, without a token too many.
    assert taken == [0, 2, 2, 2, 1, 1]


def test_sequence_that_ended_unexpectedly_discards_its_extra_token(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny.folder, steps_ahead=1)
    taken = note_drawn(engine, monkeypatch)
    sampling = Sampling(temperature=0.0, logit_bias=((EOS, 1e4),), min_tokens=2)
    answer = run_all(engine, [make_request("a", [5], 20, sampling=sampling)])["a"]
    assert (len(answer.tokens), answer.tokens[-1], answer.finish_reason) == (3, EOS, "stop")
    assert len(taken) == 4
    assert not engine.has_work and engine.free_kv_tokens == engine.config.kv_tokens
    engine.unload_model("m")


def test_bad_words_of_several_tokens_are_read_before_the_next_step(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny.folder, steps_ahead=1)
    taken = note_drawn(engine, monkeypatch)
    sampling = Sampling(temperature=0.0, bad_words=((9, 11),), ignore_eos=True)
    run_all(engine, [make_request("a", [5], 5, sampling=sampling)])
    assert taken == [0] * 5


def test_id_of_a_cancelled_sequence_can_be_used_again_at_once(tiny: TinyModel) -> None:
    expected = run_all(make_engine(tiny.folder), [make_request("a", [7, 8, 9], 8)])["a"]
    engine = make_engine(tiny.folder, steps_ahead=1)
    engine.add(make_request("a", [5] * 20, 30))
    for _ in range(4):
        engine.step()
    engine.cancel("a")
    assert run_all(engine, [make_request("a", [7, 8, 9], 8)])["a"] == expected


def test_pass_that_breaks_ahead_fails_only_the_sequence_that_breaks_it(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = tuple(dataclasses.replace(knob, bad_words=()) for knob in KNOBS)
    requests = [dataclasses.replace(each, echo_logprobs=False) for each in requests_of(9, 5, knobs)]
    expected = run_all(make_engine(tiny.folder), requests)
    engine = make_engine(tiny.folder, steps_ahead=1)
    decoder = engine._models["m"].decoder
    forward = decoder.forward

    def forward_out_of_memory(batch: PackedTokens, *rest: Any) -> torch.Tensor:
        if list(batch.tokens).count(99) > 10:
            raise RuntimeError("CUDA out of memory")
        return forward(batch, *rest)

    monkeypatch.setattr(decoder, "forward", forward_out_of_memory)
    culprit = make_request("culprit", [99] * 30, 6)

    def before_step(step: int) -> None:
        if step == 3:
            engine.add(culprit)

    answers = run_all(engine, requests, before_step=before_step)
    assert answers["culprit"].error is not None and "memory" in answers["culprit"].error
    assert {key: answer for key, answer in answers.items() if key != "culprit"} == expected
    assert engine.free_kv_tokens == engine.config.kv_tokens


def test_preempted_sequences_keep_the_token_that_was_in_flight(tiny: TinyModel) -> None:
    requests = [
        make_request(f"s{n}", [10 + n] * 20, 60, sampling=Sampling(seed=n, ignore_eos=True)) for n in range(6)
    ]
    plain = run_all(make_engine(tiny.folder), requests)
    engine = make_engine(tiny.folder, steps_ahead=1, kv_tokens=12 * BLOCK_TOKENS)
    preemptions: dict[str, int] = {}

    def note(_step: int) -> None:
        for sequence in (*engine._residents.running.values(), *engine._residents.waiting.values()):
            preemptions[sequence.sequence_id] = sequence.view.preemptions

    ahead = run_all(engine, requests, before_step=note)
    tokens = {key: (answer.tokens, answer.text) for key, answer in ahead.items()}
    assert tokens == {key: (answer.tokens, answer.text) for key, answer in plain.items()}
    assert 0 < max(preemptions.values()) <= 2


def test_a_pass_that_nobody_waits_for_keeps_no_model_alive(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, steps_ahead=1)
    engine.add(make_request("a", [5, 6, 7], 20))
    for _ in range(3):
        engine.step()
    decoder = weakref.ref(engine._models["m"].decoder)
    engine.cancel("a")
    engine.unload_model("m")
    gc.collect()
    assert decoder() is None
