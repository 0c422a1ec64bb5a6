"""What `loadtest.gpu_engine` is made of, as far as a machine without a GPU can say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GPTJConfig, LlamaConfig

from loadtest import gpu_engine, gpu_sides
from loadtest.gpu_engine import Measurement, idle_share, measure
from loadtest.gpu_models import ModelShape, RandomWeights, gptj_6b, llama_8b, transformers_module
from loadtest.gpu_sides import ContinuousBatching, OurEngine, Request, StaticBatches, make_requests
from loadtest.report import Row
from services.worker.engine import Engine, EngineConfig
from services.worker.engine.cuda.arena import Arena
from services.worker.engine.kv_cache import KVPool
from services.worker.engine.packing import PackedTokens, Span
from services.worker.engine.torch_decoder import TorchDecoder

CPU = torch.device("cpu")
ENDLESS: dict[str, Any] = {"vocab_size": 96, "eos_token_id": None, "bos_token_id": None}
SHAPES = {
    "llama": ModelShape(
        "tiny",
        LlamaConfig(
            **ENDLESS,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        ),
    ),
    "gptj": ModelShape(
        "tiny", GPTJConfig(**ENDLESS, n_embd=64, n_layer=2, n_head=4, n_positions=256, rotary_dim=8)
    ),
}


def both(name: str) -> tuple[TorchDecoder, Any]:
    """Our decoder and transformers' module, on weights that were made twice from one seed."""
    spec = SHAPES[name].spec
    arena = Arena(spec, torch.float32, CPU)
    arena.fill(RandomWeights(spec, torch.float32, CPU))
    decoder = TorchDecoder(spec, RandomWeights(spec, torch.float32, CPU), "fp32", CPU)
    return decoder, transformers_module(SHAPES[name], arena, torch.float32, CPU)


@pytest.mark.parametrize("name", SHAPES)
def test_both_sides_hold_the_same_model(name: str) -> None:
    decoder, module = both(name)
    tokens = list(range(10, 30))
    pool = KVPool(decoder.spec.kv_shape, 4, torch.float32, CPU)
    with torch.inference_mode():
        hidden = decoder.forward(PackedTokens(tokens, (Span([1, 2], 0, 20),)), pool)
        theirs = module(torch.tensor([tokens])).logits[0].float()
        torch.testing.assert_close(decoder.logits(hidden), theirs, rtol=1e-4, atol=1e-4)


def test_shapes_are_the_published_ones() -> None:
    llama, gptj = llama_8b().spec, gptj_6b().spec
    assert (llama.layers, llama.heads, llama.kv_heads, llama.head_dim, llama.vocab_size) == (
        32,
        32,
        8,
        128,
        128256,
    )
    assert (gptj.layers, gptj.heads, gptj.kv_heads, gptj.head_dim, gptj.vocab_size) == (
        28,
        16,
        16,
        256,
        50400,
    )
    assert gptj.eos_token_ids == llama.eos_token_ids == ()


@pytest.fixture
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.usefixtures("_no_device")
def test_each_side_answers_exactly_what_was_asked() -> None:
    decoder, module = both("llama")
    engine = Engine(EngineConfig(precision="fp32", kv_tokens=1024, max_context_tokens=128, steps_ahead=1))
    engine.load_decoder("m", decoder)
    requests = make_requests([(5, 7), (9, 3), (20, 1)], 96)
    assert OurEngine(engine).run(requests) > 0
    assert StaticBatches(module, CPU, 2).run(requests) > 0
    continuous = ContinuousBatching(module, 1024, 4)
    try:
        assert continuous.run(requests) > 0
    finally:
        continuous.stop()


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([(0, 10)], 0.0),
        ([(0, 4), (6, 10)], 0.2),
        ([(0, 8), (2, 4), (9, 10)], 0.1),
        ([(0, 5), (5, 10)], 0.0),
    ],
)
def test_idle_share_counts_only_time_without_any_kernel(
    spans: list[tuple[float, float]], share: float
) -> None:
    assert idle_share(spans) == pytest.approx(share)


class FakeSide:
    def __init__(self, takes_s: float) -> None:
        self.takes_s, self.runs = takes_s, 0

    def run(self, requests: Sequence[Request]) -> float:
        self.runs += 1
        time.sleep(0.01)
        return self.takes_s


class FakeSession:
    shape, vocab_size = SHAPES["llama"], 96

    def __init__(self, left_s: float) -> None:
        self.ours, self._deadline_s = FakeSide(1.0), time.monotonic() + left_s

    def deadline_s(self, until: float) -> float:
        return self._deadline_s


def ask(session: FakeSession, opponent: Any) -> Row:
    asked = Measurement("test", [(4, 6)], opponent, floor=2, target=6, until=1.0)
    return measure(session, asked)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_no_device")
def test_ratio_is_ours_over_theirs_and_pairs_end_with_the_time() -> None:
    theirs = FakeSide(4.0)
    row = ask(FakeSession(60), lambda: theirs)
    assert (row.ours, row.theirs, row.ratio, row.floor) == (6.0, 1.5, 4.0, 2)
    assert theirs.runs == gpu_engine.MOST_PAIRS
    short = FakeSide(4.0)
    assert "1 pair)" in ask(FakeSession(0.025), lambda: short).name
    assert short.runs == 1


@pytest.mark.usefixtures("_no_device")
def test_what_did_not_run_says_so_and_has_no_number() -> None:
    def refuse() -> FakeSide:
        raise ValueError("no such attention")

    for row in (ask(FakeSession(-1), lambda: FakeSide(1.0)), ask(FakeSession(60), refuse)):
        assert "NOT RUN" in row.name and row.ours is row.ratio is None
        assert not row.is_below_floor


def test_prompts_of_two_runs_share_no_beginning() -> None:
    first, second = (make_requests([(30, 1)] * 4, 50000) for _ in range(2))
    assert len({request.prompt[:2] for request in (*first, *second)}) == 8


def test_best_batch_is_the_one_with_most_tokens_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    class Batches:
        """A step takes 1 s up to 64 rows and grows beyond; 256 do not fit."""

        def __init__(self, _module: Any, _device: Any, batch: int) -> None:
            self.batch = batch

        def run(self, requests: Sequence[Request]) -> float:
            if self.batch == 256:
                raise torch.OutOfMemoryError("no")
            return requests[0].answer_tokens * (1.0 if self.batch <= 64 else 4.0)

    monkeypatch.setattr(gpu_sides, "StaticBatches", Batches)
    monkeypatch.setattr(gpu_sides, "release_memory", lambda: None)
    lengths = [(8, 8)] * 256
    assert gpu_sides.best_static_batch(None, CPU, lengths, 96, time.monotonic() + 60) == 64
