"""The engine as a whole: who starts and waits, what leaves, and that neighbours never change an answer."""

from __future__ import annotations

import dataclasses
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from services.worker.engine import (
    Engine,
    EngineConfig,
    EngineRefusal,
    ModelRefusal,
    Sampling,
    SequenceRequest,
)
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
    save_model,
    save_poisoned,
    tiny_config,
)
from tests.unit.worker.engine.conftest import TinyModel

KNOBS: tuple[Sampling, ...] = (
    GREEDY,
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_p=0.9, seed=4),
    Sampling(temperature=1.2, top_k=20, repetition_penalty=1.2, seed=5),
    Sampling(temperature=0.9, presence_penalty=0.5, frequency_penalty=0.4, seed=6, min_tokens=4),
)
STOPS: tuple[tuple[str, ...], ...] = ((), ("e",), ("th", "ü"), ("\n", "ab"))


def random_requests(seed: int, count: int) -> list[SequenceRequest]:
    rng = random.Random(seed)
    return [
        make_request(
            f"s{number}",
            [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice((1, 3, 16, 31, 50, 90)))],
            rng.randrange(1, 40),
            sampling=rng.choice(KNOBS),
            stop=rng.choice(STOPS),
        )
        for number in range(count)
    ]


def assert_empty(engine: Engine) -> None:
    assert not engine.has_work
    assert (engine.active_sequences, engine.waiting_sequences) == (0, 0)
    assert engine.free_kv_tokens == engine.config.kv_tokens


@pytest.fixture(scope="module")
def alone(tiny: TinyModel) -> dict[str, Answer]:
    """Each request's answer with the engine to itself."""
    engine = make_engine(tiny.folder)
    answers: dict[str, Answer] = {}
    for request in random_requests(seed=1, count=24):
        answers.update(run_all(engine, [request]))
    assert_empty(engine)
    assert {answer.finish_reason for answer in answers.values()} == {"stop", "length"}
    return answers


@pytest.mark.parametrize("seed", range(6))
def test_any_arrival_order_and_any_cancel_gives_the_same_answers(
    tiny: TinyModel, alone: dict[str, Answer], seed: int
) -> None:
    rng = random.Random(seed)
    requests = random_requests(seed=1, count=24)
    rng.shuffle(requests)
    engine = make_engine(
        tiny.folder,
        max_batch=rng.choice((2, 5, 8)),
        kv_tokens=rng.choice((160, 320, 2048)),
        prefill_chunk_tokens=rng.choice((8, 32, 256)),
        block_tokens=rng.choice((4, 16, 32)),
    )
    cancelled: set[str] = set()

    def before_step(_step: int) -> None:
        for _ in range(rng.randrange(3)):
            if requests:
                engine.add(requests.pop())
        if rng.random() < 0.1:
            victim = f"s{rng.randrange(24)}"
            engine.cancel(victim)
            cancelled.add(victim)
        assert 0 <= engine.free_kv_tokens <= engine.config.kv_tokens

    while requests or engine.has_work:
        for sequence_id, answer in run_all(engine, before_step=before_step).items():
            if answer.finish_reason is not None:
                assert (answer.tokens, answer.text, answer.finish_reason) == (
                    alone[sequence_id].tokens,
                    alone[sequence_id].text,
                    alone[sequence_id].finish_reason,
                )
            else:
                assert sequence_id in cancelled
                assert answer.tokens == alone[sequence_id].tokens[: len(answer.tokens)]
    assert_empty(engine)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_neighbours_change_no_bit_of_an_answer(tiny: TinyModel, precision: str) -> None:
    """Logprobs are compared as they are: a scale or a sum shared with a neighbour would show in the last digits."""
    sampling = Sampling(temperature=0.8, seed=1, logprobs=2)
    mine = make_request("mine", list(range(5, 60)), 30, sampling=sampling)
    reference = run_all(make_engine(tiny.folder, precision=precision), [mine])["mine"]
    for seed in range(3):
        engine = make_engine(tiny.folder, precision=precision, prefill_chunk_tokens=256)
        neighbours = [
            dataclasses.replace(request, isolation_key="other team")
            for request in random_requests(seed, count=7)
        ]
        answer = run_all(engine, [*neighbours[:4], mine, *neighbours[4:]])["mine"]
        assert answer.tokens == reference.tokens
        assert answer.logprobs == reference.logprobs


@pytest.mark.parametrize("sampling", KNOBS)
@pytest.mark.parametrize("stop", STOPS)
def test_resume_at_any_token_continues_the_unbroken_answer(
    tiny: TinyModel, sampling: Sampling, stop: tuple[str, ...]
) -> None:
    engine = make_engine(tiny.folder, max_batch=16)
    whole_request = make_request("whole", [7, 8, 9, 10], 24, sampling=sampling, stop=stop)
    whole = run_all(engine, [whole_request])["whole"]
    resumed = run_all(
        engine,
        [
            dataclasses.replace(whole_request, sequence_id=str(cut), prior_tokens=whole.tokens[:cut])
            for cut in range(len(whole.tokens) + 1)
        ],
    )
    for cut in range(len(whole.tokens) + 1):
        rest = resumed[str(cut)]
        assert rest.tokens == whole.tokens[cut:], cut
        assert "".join(whole.pieces[:cut]) + rest.text == whole.text, cut
        assert rest.finish_reason == whole.finish_reason


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_resume_continues_bit_for_bit_in_low_precision(tiny: TinyModel, precision: str) -> None:
    """Rounding is coarse here: recomputing the answer by other arithmetic than decoding's would show."""
    engine = make_engine(tiny.folder, precision=precision, max_batch=16)
    sampling = Sampling(temperature=0.0, ignore_eos=True, logprobs=0)
    whole_request = make_request("whole", list(range(7, 27)), 90, sampling=sampling)
    whole = run_all(engine, [whole_request])["whole"]
    cuts = (1, 2, 17, 64, 65, 80)
    resumed = run_all(
        engine,
        [
            dataclasses.replace(whole_request, sequence_id=str(cut), prior_tokens=whole.tokens[:cut])
            for cut in cuts
        ],
    )
    for cut in cuts:
        assert resumed[str(cut)].tokens == whole.tokens[cut:], cut
        assert resumed[str(cut)].logprobs == whole.logprobs[cut:], cut


def test_first_delta_of_a_resume_is_numbered_after_the_prior_tokens(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    engine.add(make_request("a", [5, 6], 10, prior_tokens=(9, 10, 11)))
    deltas = [delta for _ in range(2) for delta in engine.step().deltas]  # the prompt, then the prior tokens
    assert [delta.token_start for delta in deltas] == [3]


def test_preempted_sequences_come_back_with_the_same_answer_and_at_most_two_recomputes(
    tiny: TinyModel,
) -> None:
    requests = [
        make_request(f"s{n}", [10 + n] * 20, 60, sampling=Sampling(seed=n, ignore_eos=True)) for n in range(6)
    ]
    roomy = run_all(make_engine(tiny.folder), requests)
    engine = make_engine(tiny.folder, kv_tokens=12 * BLOCK_TOKENS)
    preemptions: dict[str, int] = {}

    def note(_step: int) -> None:
        for sequence in engine._live():
            preemptions[sequence.sequence_id] = sequence.view.preemptions

    tight = run_all(engine, requests, before_step=note)
    assert {key: (a.tokens, a.text) for key, a in tight.items()} == {
        key: (a.tokens, a.text) for key, a in roomy.items()
    }
    assert 0 < max(preemptions.values()) <= 2
    assert_empty(engine)


def test_sequence_that_does_not_fit_waits_and_holds_its_place_in_the_queue(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, kv_tokens=8 * BLOCK_TOKENS)
    engine.add(make_request("first", [5] * 60, 4))
    engine.add(make_request("large", [6] * 100, 4))
    engine.add(make_request("small", [7], 2))
    engine.step()
    assert (engine.active_sequences, engine.waiting_sequences) == (1, 2)
    order = list(run_all(engine))
    assert order.index("large") < order.index("small")
    assert_empty(engine)


def test_cancel_frees_the_place_at_once_and_later_deltas_never_come(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, max_batch=1)
    engine.add(make_request("gone", [5] * 40, 50))
    engine.add(make_request("next", [6], 3))
    engine.step()
    engine.cancel("gone")
    assert engine.free_kv_tokens == engine.config.kv_tokens
    assert {delta.sequence_id for delta in engine.step().deltas} == {"next"}
    engine.cancel("gone")
    engine.cancel("never was")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "other"}, "unknown_model"),
        ({"sequence_id": "here"}, "duplicate_sequence"),
        ({"prompt_tokens": []}, "invalid_token_id"),
        ({"prompt_tokens": [5, VOCAB_SIZE]}, "invalid_token_id"),
        ({"prompt_tokens": [-1]}, "invalid_token_id"),
        ({"prior_tokens": [VOCAB_SIZE]}, "invalid_token_id"),
        ({"stop_token_ids": (VOCAB_SIZE,)}, "invalid_token_id"),
        ({"sampling": Sampling(logit_bias=((VOCAB_SIZE, 1.0),))}, "invalid_token_id"),
        ({"prompt_tokens": [5] * 200, "max_tokens": 57}, "context_length_exceeded"),
    ],
)
def test_request_that_can_never_be_served_is_refused_and_leaves_nothing(
    tiny: TinyModel, changes: dict[str, Any], code: str
) -> None:
    engine = make_engine(tiny.folder)
    engine.add(make_request("here", [5], 3))
    with pytest.raises(EngineRefusal) as refusal:
        engine.add(dataclasses.replace(make_request("new", [5], 3), **changes))
    assert refusal.value.code == code
    assert engine.waiting_sequences == 1


def test_request_longer_than_the_whole_pool_is_refused(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, kv_tokens=4 * BLOCK_TOKENS)
    with pytest.raises(EngineRefusal, match="64") as refusal:
        engine.add(make_request("a", [5] * 60, 5))
    assert refusal.value.code == "context_length_exceeded"
    assert len(run_all(engine, [make_request("b", [5] * 60, 4)])["b"].tokens) == 4


def test_answer_may_fill_the_context_to_the_last_token(tiny: TinyModel) -> None:
    sampling = Sampling(seed=1, ignore_eos=True)
    answer = run_all(make_engine(tiny.folder), [make_request("a", [5] * 200, 56, sampling=sampling)])["a"]
    assert (len(answer.tokens), answer.finish_reason) == (56, "length")


def forced(*tokens: int) -> Sampling:
    """Greedy with these tokens far above all others."""
    return Sampling(temperature=0.0, logit_bias=tuple((token, 1e4) for token in tokens))


def test_end_of_sequence_token_stops_and_shows_no_text(tiny: TinyModel) -> None:
    answer = run_all(make_engine(tiny.folder), [make_request("a", [5], 9, sampling=forced(EOS))])["a"]
    assert (answer.tokens, answer.text, answer.finish_reason) == ([EOS], "", "stop")


def test_ignored_end_of_sequence_token_goes_on_to_max_tokens(tiny: TinyModel) -> None:
    sampling = dataclasses.replace(forced(EOS), ignore_eos=True)
    answer = run_all(make_engine(tiny.folder), [make_request("a", [5], 4, sampling=sampling)])["a"]
    assert (answer.tokens, answer.text, answer.finish_reason) == ([EOS] * 4, "", "length")


def test_stop_token_id_stops_and_shows_no_text(tiny: TinyModel) -> None:
    request = make_request("a", [5], 9, sampling=forced(70), stop_token_ids=(70,))
    answer = run_all(make_engine(tiny.folder), [request])["a"]
    assert (answer.tokens, answer.text, answer.finish_reason) == ([70], "", "stop")


def test_text_held_for_a_stop_string_is_shown_when_max_tokens_ends_the_answer(tiny: TinyModel) -> None:
    tokenizer = Tokenizer.from_file(str(tiny.folder / "tokenizer.json"))
    token = tokenizer.get_vocab()["a"]
    request = make_request("a", [5], 3, sampling=forced(token), stop=("aaaa",))
    answer = run_all(make_engine(tiny.folder), [request])["a"]
    assert (answer.text, answer.finish_reason) == ("aaa", "length")
    assert answer.pieces == ["", "", "aaa"]


def test_min_tokens_keeps_end_and_stop_tokens_away(tiny: TinyModel) -> None:
    sampling = dataclasses.replace(forced(EOS, 70), min_tokens=3)
    request = make_request("a", [5], 9, sampling=sampling, stop_token_ids=(70,))
    answer = run_all(make_engine(tiny.folder), [request])["a"]
    assert (len(answer.tokens), answer.finish_reason) == (4, "stop")
    assert not {EOS, 70} & set(answer.tokens[:3])


@pytest.mark.parametrize(
    ("changes", "expected_tokens"),
    [
        ({"max_tokens": 0}, 0),
        ({"prior_tokens": [5, 6, 7], "max_tokens": 3}, 0),
        ({"prior_tokens": [5, EOS]}, 0),
    ],
)
def test_request_with_nothing_left_to_generate_ends_at_the_next_step(
    tiny: TinyModel, changes: dict[str, Any], expected_tokens: int
) -> None:
    engine = make_engine(tiny.folder)
    engine.add(dataclasses.replace(make_request("a", [5], 9), **changes))
    assert engine.has_work
    (delta,) = engine.step().deltas
    assert len(delta.tokens) == expected_tokens
    assert delta.finish_reason is not None
    assert_empty(engine)


def test_prompt_can_be_scored_without_generating(tiny: TinyModel) -> None:
    request = make_request(
        "a", [5, 6, 7, 8], 0, echo_logprobs=True, sampling=Sampling(temperature=0.0, logprobs=0)
    )
    answer = run_all(make_engine(tiny.folder, prefill_chunk_tokens=2), [request])["a"]
    assert [entry.token for entry in answer.prompt_logprobs] == [6, 7, 8]
    assert (answer.tokens, answer.finish_reason) == ([], "length")


def test_step_report_counts_tokens_and_names_what_was_prefilled(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, prefill_chunk_tokens=16)
    engine.add(make_request("a", [5] * 40, 3, sampling=Sampling(seed=1, ignore_eos=True)))
    reports = [engine.step() for _ in range(5)]
    assert [report.prefill_tokens for report in reports] == [16, 16, 8, 0, 0]
    assert [report.decode_tokens for report in reports] == [0, 0, 0, 1, 1]
    assert [report.prefilled for report in reports] == [[], [], ["a"], [], []]
    assert [len(report.deltas) for report in reports] == [0, 0, 1, 1, 1]


def test_sequence_with_logits_that_are_not_finite_fails_alone(tmp_path: Path, tiny: TinyModel) -> None:
    """One token's embedding is NaN: who uses it fails, whoever gets its blocks next does not."""
    save_poisoned(tmp_path, tiny.folder, token=200)
    healthy = [make_request(f"ok{n}", [5 + n] * 20, 10) for n in range(3)]
    expected = run_all(make_engine(tiny.folder), healthy)

    engine = make_engine(tmp_path, kv_tokens=8 * BLOCK_TOKENS)
    answers = run_all(engine, [healthy[0], make_request("bad", [5] * 30 + [200] + [6] * 9, 10), *healthy[1:]])
    assert answers["bad"].error is not None and "finite" in answers["bad"].error
    assert answers["bad"].finish_reason is None
    for request in healthy:
        assert answers[request.sequence_id].tokens == expected[request.sequence_id].tokens
    assert_empty(engine)


def test_pass_that_breaks_fails_only_the_sequence_that_breaks_it(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for memory that one long sequence exhausts: the whole pass raises, alone only the culprit does."""
    requests = [make_request("a", [5], 6), make_request("culprit", [99] * 30, 6), make_request("b", [6], 6)]
    expected = run_all(make_engine(tiny.folder), requests)
    engine = make_engine(tiny.folder)
    decoder = engine._models["m"].decoder
    forward = decoder.forward

    def forward_out_of_memory(batch: PackedTokens, *rest: Any) -> torch.Tensor:
        if list(batch.tokens).count(99) > 10:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(batch, *rest)

    monkeypatch.setattr(decoder, "forward", forward_out_of_memory)
    answers = run_all(engine, requests)
    assert answers["culprit"].error is not None and "allocate" in answers["culprit"].error
    assert [answers[key].tokens for key in "ab"] == [expected[key].tokens for key in "ab"]
    assert_empty(engine)


@pytest.mark.parametrize("count", [1, 7, 8])
def test_broken_pass_is_searched_by_halves(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Any kind of error: not every library that computes raises RuntimeError."""
    engine = make_engine(tiny.folder)
    decoder = engine._models["m"].decoder
    forward = decoder.forward
    passes = 0

    def forward_or_break(batch: PackedTokens, *rest: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if 99 in batch.tokens:
            raise IndexError("index out of range in self")
        return forward(batch, *rest)

    monkeypatch.setattr(decoder, "forward", forward_or_break)
    requests = [make_request(str(n), [99 if n == count // 2 else 5 + n], 3) for n in range(count)]
    for request in requests:
        engine.add(request)
    ends = {delta.sequence_id: delta.error for delta in engine.step().deltas}
    assert ends == {
        str(n): "IndexError: index out of range in self" if n == count // 2 else None for n in range(count)
    }
    assert passes <= 1 + 2 * (count - 1).bit_length()


def test_broken_device_is_no_sequences_failure(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access a GPU answers nobody: the process has to end, and its jobs go elsewhere."""
    engine = make_engine(tiny.folder)

    def forward_illegally(*_: Any) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine._models["m"].decoder, "forward", forward_illegally)
    engine.add(make_request("a", [5], 3))
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_prompt_scores_that_are_not_finite_fail_alone(tmp_path: Path, tiny: TinyModel) -> None:
    """Without an answer no logits are drawn from, so that only the scores show it."""
    save_poisoned(tmp_path, tiny.folder, token=200)
    scored = Sampling(temperature=0.0, logprobs=0)
    requests = [
        make_request(name, prompt, 0, echo_logprobs=True, sampling=scored)
        for name, prompt in (("bad", [5, 200, 6, 7]), ("good", [5, 9, 6, 7]))
    ]
    answers = run_all(make_engine(tmp_path), requests)
    assert answers["bad"].error is not None and answers["bad"].prompt_logprobs == ()
    assert answers["good"].error is None and len(answers["good"].prompt_logprobs) == 3


def test_models_take_turns_so_that_one_cannot_starve_another(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, prefill_chunk_tokens=16, max_batch=16)
    engine.load_model("other", tiny.folder)
    for number in range(6):
        engine.add(make_request(f"m{number}", [5] * 100, 30))
    engine.add(make_request("late", [6] * 16, 30, model="other"))
    first_steps = [engine.step() for _ in range(2)]
    assert any("late" in report.prefilled for report in first_steps)


def test_model_loads_on_another_thread_while_steps_go_on(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    expected = run_all(make_engine(tiny.folder), [make_request("a", [5] * 9, 40)])["a"]
    engine.add(make_request("a", [5] * 9, 40))
    loader = threading.Thread(target=engine.load_model, args=("second", tiny.folder))
    loader.start()
    answer = run_all(engine)["a"]
    loader.join()
    assert answer.tokens == expected.tokens
    again = run_all(engine, [make_request("b", [5] * 9, 40, model="second")])["b"]
    assert again.tokens == expected.tokens


def test_steps_on_another_thread_use_the_configured_threads(tiny: TinyModel) -> None:
    make_engine(tiny.folder, threads=1)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [1]


def test_unload_refuses_while_sequences_live_and_forgets_the_model_afterwards(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    engine.add(make_request("a", [5], 5))
    with pytest.raises(ValueError, match="1 sequences"):
        engine.unload_model("m")
    engine.cancel("a")
    engine.unload_model("m")
    with pytest.raises(EngineRefusal):
        engine.add(make_request("b", [5], 5))
    with pytest.raises(ValueError, match="not loaded"):
        engine.unload_model("m")


def test_handle_cannot_be_loaded_twice(tiny: TinyModel) -> None:
    with pytest.raises(ValueError, match="already"):
        make_engine(tiny.folder).load_model("m", tiny.folder)


def test_model_of_another_shape_is_refused_beside_others_and_welcome_alone(
    tmp_path: Path, tiny: TinyModel
) -> None:
    save_model(tmp_path, tiny_config(num_hidden_layers=2))
    engine = make_engine(tiny.folder)
    with pytest.raises(ModelRefusal, match="another type"):
        engine.load_model("other", tmp_path)
    engine.unload_model("m")
    engine.load_model("other", tmp_path)
    assert len(run_all(engine, [make_request("a", [5], 4, model="other")])["a"].tokens) == 4


def test_model_info_says_what_was_loaded(tiny: TinyModel) -> None:
    engine = Engine(EngineConfig(precision="bf16", max_context_tokens=10_000, kv_tokens=160))
    info = engine.load_model("m", tiny.folder)
    assert (info.vocab_size, info.context_tokens, info.eos_token_ids) == (VOCAB_SIZE, 512, (EOS,))
    assert info.weight_bytes > 2 * 48 * VOCAB_SIZE


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp8"},
        {"max_batch": 0},
        {"kv_tokens": 3},
        {"kv_tokens": 31, "block_tokens": 32},
        {"block_tokens": 0},
        {"threads": -1},
        {"device": "cuda", "precision": "int8"},
    ],
)
def test_config_that_cannot_work_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="engine config"):
        Engine(EngineConfig(**changes))
