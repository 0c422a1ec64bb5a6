"""Whatever comes, goes, shares and gives way: each request's tokens are those it gets alone, and no block is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from services.worker.engine import Delta, Engine, EngineConfig, Pooling, Sampling, SequenceRequest
from services.worker.engine.kv_cache import PADDING_BLOCK
from tests.unit.worker.engine.builders import GREEDY, make_engine, make_request, save_poisoned
from tests.unit.worker.engine.conftest import TinyModel

# Whose sequence fails, be it in a prompt or drawn.
POISON = 200
LONGEST_PROMPT, LONGEST_ANSWER = 90, 40
# Prompts are a beginning of one of these and a tail: long agreements, and differences at any place.
STEMS = tuple(tuple(3 + (step * n + n * n // 7) % 190 for n in range(80)) for step in (1, 5))
KNOBS = (
    GREEDY,
    Sampling(temperature=0.0, ignore_eos=True),
    Sampling(temperature=0.9, top_k=30, seed=3, ignore_eos=True),
    Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=4),
)


@dataclass(frozen=True)
class Wish:
    """A request, when it comes and when it is cancelled: steps from the start, and from its coming."""

    request: SequenceRequest
    comes_at: int
    cancelled_after: int | None


tails = st.lists(st.integers(3, 190), min_size=1, max_size=9)
prompts = st.builds(
    lambda stem, length, tail: [*stem[:length], *tail],
    st.sampled_from(STEMS),
    st.one_of(st.integers(0, 20), st.integers(0, 20), st.integers(0, 80)),
    st.one_of(tails, tails, tails, tails, st.just([POISON, 9])),
)


@st.composite
def requests(draw: st.DrawFn) -> SequenceRequest:
    pooling: Pooling | None = draw(st.sampled_from((None, None, None, None, None, "mean", "last")))
    return make_request(
        "",
        draw(prompts),
        0 if pooling else draw(st.one_of(st.integers(1, LONGEST_ANSWER), st.just(LONGEST_ANSWER))),
        pooling=pooling,
        sampling=draw(st.sampled_from(KNOBS)),
        echo_logprobs=pooling is None and draw(st.integers(0, 4)) == 0,
        isolation_key=draw(st.sampled_from(("team", "other team"))),
        model=draw(st.sampled_from(("m", "m", "n"))),
    )


wishes = st.builds(
    Wish,
    requests(),
    st.one_of(st.integers(0, 3), st.integers(0, 30)),
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 20)),
)


@st.composite
def configs(draw: st.DrawFn) -> EngineConfig:
    block_tokens = draw(st.sampled_from((1, 3, 4, 16, 32)))
    least_blocks = -(-(LONGEST_PROMPT + LONGEST_ANSWER) // block_tokens)
    return EngineConfig(
        precision="fp32",
        max_context_tokens=256,
        max_batch=draw(st.sampled_from((1, 3, 6, 6))),
        block_tokens=block_tokens,
        kv_tokens=block_tokens * (least_blocks + draw(st.integers(0, 100 // block_tokens))),
        prefill_chunk_tokens=draw(st.sampled_from((1, 7, 16, 64))),
        step_tokens=draw(st.sampled_from((None, 1, 20, 200))),
    )


class Reference:
    """Answers of requests that have the engine to themselves, and nobody's blocks to find."""

    def __init__(self, folder: Path) -> None:
        self._engine = make_engine(folder)
        self._known: dict[SequenceRequest, list[Delta]] = {}

    def deltas(self, request: SequenceRequest) -> list[Delta]:
        alone = replace(
            request,
            sequence_id="alone",
            model="m",
            isolation_key="",
            prompt_tokens=tuple(request.prompt_tokens),
        )
        if alone not in self._known:
            self._engine._blocks.forget_model("m")
            self._known[alone] = collect(self._engine, [Wish(alone, 0, None)])["alone"]
        return self._known[alone]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, tiny: TinyModel) -> Path:
    folder = tmp_path_factory.mktemp("poisoned")
    save_poisoned(folder, tiny.folder, POISON)
    return folder


@pytest.fixture(scope="module")
def reference(poisoned: Path) -> Reference:
    return Reference(poisoned)


def collect(engine: Engine, wanted: list[Wish], most_steps: int = 3000) -> dict[str, list[Delta]]:
    """The deltas of each; after every step the blocks are counted."""
    deltas: dict[str, list[Delta]] = {wish.request.sequence_id: [] for wish in wanted}
    for step in range(most_steps):
        for wish in wanted:
            if wish.comes_at == step:
                engine.add(wish.request)
            if wish.cancelled_after is not None and wish.comes_at + wish.cancelled_after == step:
                engine.cancel(wish.request.sequence_id)
        if not engine.has_work and step > max(wish.comes_at for wish in wanted):
            return deltas
        report = engine.step()
        assert_counted(engine)
        for delta in report.deltas:
            deltas[delta.sequence_id].append(delta)
        for sequence in engine._live():
            assert sequence.view.preemptions <= 2
            if sequence.view.preemptions:
                event("pre-empted")
    raise AssertionError(f"not done after {most_steps} steps")


def assert_counted(engine: Engine) -> None:
    blocks = engine._blocks
    held = Counter(block for each in engine._residents.running.values() for block in each.blocks)
    assert [blocks._holders[block] for block in range(blocks.count + 1)] == [
        held[block] for block in range(blocks.count + 1)
    ]
    free = [*blocks._blank, *blocks._remembered]
    assert sorted([*free, *held]) == list(range(1, blocks.count + 1))
    assert PADDING_BLOCK not in held
    assert all(blocks._name_of[block] is None for block in blocks._blank)
    assert all(blocks._name_of[block] is not None for block in blocks._remembered)
    for each in engine._residents.running.values():
        assert each.view.known_tokens == len(each.known)
        assert (
            each.view.computed_tokens
            <= each.view.held_tokens
            == len(each.blocks) * engine.config.block_tokens
        )
        assert len(set(each.blocks)) == len(each.blocks)


def assert_same_answer(wish: Wish, got: list[Delta], alone: list[Delta]) -> None:
    """All of it, with its end or failure; or a beginning when it was cancelled."""
    tokens = [token for delta in got for token in delta.tokens]
    expected = [token for delta in alone for token in delta.tokens]
    text, expected_text = ("".join(delta.text for delta in deltas) for deltas in (got, alone))
    if wish.cancelled_after is not None and not (got and (got[-1].finish_reason or got[-1].error)):
        assert tokens == expected[: len(tokens)] and expected_text.startswith(text)
        return
    assert (tokens, text) == (expected, expected_text)
    assert [delta.token_start for delta in got] == [delta.token_start for delta in alone]
    assert (got[-1].finish_reason, got[-1].error) == (alone[-1].finish_reason, alone[-1].error)
    if got[-1].error:
        event("failed")
    scores, expected_scores = (
        [score.logprob for delta in deltas for score in delta.prompt_logprobs] for deltas in (got, alone)
    )
    assert scores == pytest.approx(expected_scores, abs=1e-4)
    assert got[-1].embedding == pytest.approx(alone[-1].embedding, abs=1e-4)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # an example takes up to a second: shrinking would take minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(config=configs(), drawn=st.lists(wishes, min_size=3, max_size=14))
def test_any_company_any_sizes_any_cancel(
    poisoned: Path, reference: Reference, config: EngineConfig, drawn: list[Wish]
) -> None:
    wanted = [
        replace(wish, request=replace(wish.request, sequence_id=str(n))) for n, wish in enumerate(drawn)
    ]
    engine = Engine(config)
    for handle in ("m", "n"):
        engine.load_model(handle, poisoned)
    deltas = collect(engine, wanted)
    for wish in wanted:
        got = deltas[wish.request.sequence_id]
        if any(delta.cached_prompt_tokens for delta in got):
            event("found a prefix")
        assert_same_answer(wish, got, reference.deltas(wish.request))
    blocks = engine._blocks
    assert blocks.free == blocks.count
    assert engine._residents._coming._counts == {}
    for handle in ("m", "n"):
        engine.unload_model(handle)
    assert (blocks.remembered, len(blocks._blank)) == (0, blocks.count)
