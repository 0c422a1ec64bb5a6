"""A model that went and came back answers as it does in a fresh process, whatever used the memory in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.worker.engine.builders import make_engine, make_request, run_all, save_model, tiny_config
from tests.unit.worker.engine.conftest import TinyModel

PROMPTS = ([5, 6, 7], list(range(9, 60)), [300, 301])


@pytest.fixture(scope="session")
def sibling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same type: it shares the pool of keys and values."""
    folder = tmp_path_factory.mktemp("tiny-sibling")
    save_model(folder, tiny_config(), seed=1)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_swapped_model_answers_as_in_a_fresh_process(
    tiny: TinyModel, sibling: Path, precision: str
) -> None:
    requests = [make_request(str(number), prompt, 24) for number, prompt in enumerate(PROMPTS)]
    others = [make_request(f"o{n}", prompt, 24, model="other") for n, prompt in enumerate(PROMPTS)]
    fresh = run_all(make_engine(tiny.folder, precision=precision), requests)
    alone = run_all(make_engine(sibling, "other", precision=precision), others)
    assert [a.tokens for a in fresh.values()] != [a.tokens for a in alone.values()], "the models are alike"

    engine = make_engine(tiny.folder, precision=precision)
    for _ in range(3):
        # Given both at work, one cut off in the middle, so that its blocks come back half used
        engine.load_model("other", sibling)
        for request in (*requests, *others):
            engine.add(request)
        for _ in range(5):
            engine.step()
        engine.cancel("1")
        while engine.has_work:
            engine.step()
        # When each goes and comes back, the other answering meanwhile
        engine.unload_model("m")
        assert run_all(engine, others) == alone
        engine.load_model("m", tiny.folder)
        engine.unload_model("other")
        # Then
        assert run_all(engine, requests) == fresh


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_answers_cut_off_by_a_swap_go_on_as_if_unbroken(
    tiny: TinyModel, sibling: Path, precision: str
) -> None:
    """As the worker pauses jobs: cancelled, and later added again with the tokens they had."""
    requests = [make_request(str(number), prompt, 24) for number, prompt in enumerate(PROMPTS)]
    whole = run_all(make_engine(tiny.folder, precision=precision), requests)
    engine = make_engine(tiny.folder, precision=precision)
    had: dict[str, list[int]] = {request.sequence_id: [] for request in requests}
    shown = dict.fromkeys(had, "")
    for _ in range(2):
        for request in requests:
            engine.add(replace(request, prior_tokens=tuple(had[request.sequence_id])))
        for _ in range(8):
            for delta in engine.step().deltas:
                assert delta.token_start == len(had[delta.sequence_id])
                had[delta.sequence_id] += delta.tokens
                shown[delta.sequence_id] += delta.text
        for request in requests:
            engine.cancel(request.sequence_id)
        engine.unload_model("m")
        engine.load_model("other", sibling)
        engine.unload_model("other")
        engine.load_model("m", tiny.folder)
    resumed = [replace(request, prior_tokens=tuple(had[request.sequence_id])) for request in requests]
    rest = run_all(engine, resumed)
    assert {
        name: (had[name] + answer.tokens, shown[name] + answer.text) for name, answer in rest.items()
    } == {name: (answer.tokens, answer.text) for name, answer in whole.items()}
