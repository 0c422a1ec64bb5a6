"""Embeddings against transformers' last hidden states: alone, in a batch, in chunks, beside answers, after pre-emption."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from services.worker.engine import Delta, Engine, EngineRefusal, Pooling, Sampling, SequenceRequest
from services.worker.engine.pooling import Pooled, rows_to_pool
from tests.unit.worker.engine.builders import VOCAB_SIZE, make_engine, make_request, save_model, tiny_config
from tests.unit.worker.engine.conftest import TinyModel
from tests.unit.worker.engine.family_configs import VARIANTS

POOLINGS: tuple[Pooling, ...] = ("mean", "last")
LENGTHS = (1, 2, 15, 16, 17, 33, 64, 65, 120, 150)


def prompts() -> list[list[int]]:
    rng = random.Random(8)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def embed_request(sequence_id: str, prompt: list[int], pooling: Pooling) -> SequenceRequest:
    return make_request(sequence_id, prompt, 0, pooling=pooling)


def expected(tiny: TinyModel, prompt: list[int], pooling: Pooling) -> torch.Tensor:
    with torch.inference_mode():
        states = tiny.oracle.model(torch.tensor([prompt])).last_hidden_state[0]
    return states.mean(dim=0) if pooling == "mean" else states[-1]


def embed_all(engine: Engine, requests: list[SequenceRequest]) -> dict[str, torch.Tensor]:
    """The vectors of the requests that embed; each comes in one delta, with the end."""
    for request in requests:
        engine.add(request)
    wanted = {request.sequence_id for request in requests if request.pooling is not None}
    vectors: dict[str, torch.Tensor] = {}
    for _ in range(1000):
        if not engine.has_work:
            assert engine.free_kv_tokens == engine.config.kv_tokens
            return vectors
        for delta in engine.step().deltas:
            if delta.sequence_id in wanted:
                assert (delta.error, delta.tokens, delta.text) == (None, (), "")
                assert delta.finish_reason is not None and delta.sequence_id not in vectors
                vectors[delta.sequence_id] = torch.tensor(delta.embedding)
            else:
                assert delta.embedding == ()
    raise AssertionError("not done after 1000 steps")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_alone_equals_transformers(tiny: TinyModel, pooling: Pooling, kernels: str) -> None:
    engine = make_engine(tiny.folder, kernels=kernels)
    for prompt in prompts():
        vector = embed_all(engine, [embed_request("a", prompt, pooling)])["a"]
        torch.testing.assert_close(vector, expected(tiny, prompt, pooling), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("chunk_tokens", [16, 24, 64, 256])
def test_a_batch_in_chunks_beside_answers_equals_transformers(
    tiny: TinyModel, pooling: Pooling, chunk_tokens: int, kernels: str
) -> None:
    engine = make_engine(tiny.folder, prefill_chunk_tokens=chunk_tokens, kernels=kernels)
    requests = [embed_request(f"e{n}", prompt, pooling) for n, prompt in enumerate(prompts())]
    requests += [make_request(f"g{n}", prompt, 20) for n, prompt in enumerate(prompts()[:4])]
    random.Random(chunk_tokens).shuffle(requests)
    vectors = embed_all(engine, requests)
    for number, prompt in enumerate(prompts()):
        torch.testing.assert_close(vectors[f"e{number}"], expected(tiny, prompt, pooling), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_neighbours_change_no_bit(tiny: TinyModel, pooling: Pooling, precision: str, kernels: str) -> None:
    prompt = prompts()[8]
    engine = make_engine(tiny.folder, prefill_chunk_tokens=32, precision=precision, kernels=kernels)
    alone = embed_all(engine, [embed_request("a", prompt, pooling)])["a"]
    others = [make_request(f"g{n}", other, 20) for n, other in enumerate(prompts()[:5])]
    beside = embed_all(engine, [*others, embed_request("a", prompt, pooling)])["a"]
    assert torch.equal(alone, beside)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_same_text_again_and_after_another_with_its_beginning(tiny: TinyModel, pooling: Pooling) -> None:
    """What another sequence left behind may be used again, and changes nothing."""
    long, engine = prompts()[9], make_engine(tiny.folder, prefill_chunk_tokens=32)
    for prompt in (long[:100], long, long, long[:48], long[:49]):
        vector = embed_all(engine, [embed_request("a", prompt, pooling)])["a"]
        torch.testing.assert_close(vector, expected(tiny, prompt, pooling), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_prompt_that_is_computed_again_is_pooled_once(tiny: TinyModel, pooling: Pooling) -> None:
    """The answers' growth takes the youngest's blocks in the middle of its chunks."""
    prompt, beginning = prompts()[9], prompts()[3]
    engine = make_engine(tiny.folder, prefill_chunk_tokens=4, kv_tokens=256)
    endless = Sampling(temperature=0.0, ignore_eos=True)
    for name in ("g0", "g1"):
        engine.add(make_request(name, beginning, 60, sampling=endless))
    engine.add(embed_request("a", prompt, pooling))
    prefilled, vector = 0, torch.empty(0)
    while engine.has_work:
        report = engine.step()
        prefilled += report.prefill_tokens
        for delta in report.deltas:
            vector = torch.tensor(delta.embedding) if delta.sequence_id == "a" else vector
    assert prefilled > len(prompt) + 2 * len(beginning), "nothing was computed again"
    torch.testing.assert_close(vector, expected(tiny, prompt, pooling), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_vectors_of_every_model_type_equal_transformers(tmp_path: Path, name: str) -> None:
    oracle = save_model(tmp_path, VARIANTS[name], seed=2)
    engine = make_engine(tmp_path, prefill_chunk_tokens=32)
    prompt = prompts()[7]
    with torch.inference_mode():
        states = oracle.base_model(torch.tensor([prompt])).last_hidden_state[0]
    vectors = embed_all(engine, [embed_request(pooling, prompt, pooling) for pooling in POOLINGS])
    torch.testing.assert_close(vectors["mean"], states.mean(dim=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vectors["last"], states[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_lower_precision_is_close_to_fp32(tmp_path: Path, precision: str, kernels: str) -> None:
    save_model(tmp_path, tiny_config(), scale=2.0)
    request = embed_request("a", prompts()[8], "mean")
    vectors = [
        embed_all(make_engine(tmp_path, precision=each, kernels=kernels), [request])["a"]
        for each in ("fp32", precision)
    ]
    assert torch.cosine_similarity(vectors[0], vectors[1], dim=0).item() > 0.999


def test_states_that_are_not_finite_fail_alone(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    decoder = engine._models["m"].decoder
    final_hidden = decoder.final_hidden

    def poisoned(hidden: torch.Tensor) -> torch.Tensor:
        states = final_hidden(hidden)
        return torch.full_like(states, float("nan")) if len(states) == 17 else states

    decoder.final_hidden = poisoned  # type: ignore[method-assign]
    for name, prompt in (("bad", prompts()[4]), ("good", prompts()[5])):
        engine.add(embed_request(name, prompt, "mean"))
    ends: dict[str, Delta] = {}
    while engine.has_work:
        ends |= {delta.sequence_id: delta for delta in engine.step().deltas}
    assert ends["bad"].error is not None and ends["bad"].embedding == ()
    assert ends["good"].error is None and len(ends["good"].embedding) == 48
    assert engine.free_kv_tokens == engine.config.kv_tokens


@pytest.mark.parametrize("change", [{"max_tokens": 3}, {"prior_tokens": [5]}])
def test_an_embedding_with_an_answer_is_refused(tiny: TinyModel, change: dict[str, object]) -> None:
    engine = make_engine(tiny.folder)
    request = dataclasses.replace(embed_request("a", [1, 2], "mean"), **change)  # type: ignore[arg-type]
    with pytest.raises(EngineRefusal) as refused:
        engine.add(request)
    assert refused.value.code == "invalid_request"
    assert not engine.has_work


def test_a_text_that_fills_the_context_is_embedded_and_one_token_more_is_refused(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    prompt = [7] * 256
    assert len(embed_all(engine, [embed_request("a", prompt, "mean")])["a"]) == 48
    with pytest.raises(EngineRefusal) as refused:
        engine.add(embed_request("b", [*prompt, 7], "mean"))
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("done", "pooling", "prompt_tokens", "start", "count", "rows"),
    [
        (0, "mean", 10, 0, 4, range(4)),
        (4, "mean", 10, 4, 6, range(4, 10)),
        (4, "mean", 10, 0, 6, range(4, 6)),  # computed again
        (10, "mean", 10, 0, 10, range(0)),
        (0, "last", 10, 0, 4, range(0)),
        (0, "last", 10, 4, 6, range(9, 10)),
        (0, "last", 10, 9, 1, range(9, 10)),
        (10, "last", 10, 4, 6, range(0)),
        (0, "last", 1, 0, 1, range(1)),
    ],
)
def test_each_position_is_pooled_once(
    done: int, pooling: Pooling, prompt_tokens: int, start: int, count: int, rows: range
) -> None:
    found = rows_to_pool(Pooled(rows=done), pooling, prompt_tokens, start, count)
    assert list(found) == list(rows)
