"""Background work runs in what others leave of each step, and what a step costs is learned."""

from __future__ import annotations

from typing import Any

import pytest

from services.worker.engine import Sampling, SequenceRequest
from services.worker.engine.background import FIT_EVERY, StepCost, beside_others
from services.worker.engine.batching import SequenceView, choose_victim
from services.worker.engine.kv_cache import BLOCK_TOKENS
from tests.unit.worker.engine.builders import make_engine, make_request, run_all
from tests.unit.worker.engine.conftest import TinyModel


def view(name: str, *, background: bool = False, prompt: bool = False, **values: Any) -> SequenceView:
    """One that decodes, unless it is still at its prompt."""
    known: dict[str, Any] = {
        "sequence_id": name, "model": "m", "base": "m", "arrival": 1, "prompt_tokens": 10, "most_tokens": 30,
        "known_tokens": 15, "computed_tokens": 4 if prompt else 14,
    }  # fmt: skip
    return SequenceView(**(known | values), background=background)


LIVE = view("live")
PROMPT = view("prompt", prompt=True)
READ = view("read", computed_tokens=15)  # only waits for a pass in flight
BATCH = [view(f"b{number}", background=True) for number in range(4)]
BATCH_PROMPT = view("bp", background=True, prompt=True)


def names(views: Any) -> list[str]:
    return [each.sequence_id for each in views]


@pytest.mark.parametrize(
    ("running", "room", "turn", "expected"),
    [
        # 1
        ([], 2, 0, []),
        ([LIVE, PROMPT], 0, 0, ["live", "prompt"]),
        ([*BATCH, BATCH_PROMPT], 0, 3, ["b0", "b1", "b2", "b3", "bp"]),
        ([READ, BATCH[0], BATCH_PROMPT], 0, 0, ["read", "b0", "bp"]),
        # 2
        ([*BATCH, LIVE, BATCH_PROMPT], 0, 0, ["live"]),
        ([*BATCH, PROMPT], 0, 0, ["prompt"]),
        ([*BATCH, LIVE, BATCH_PROMPT], 2, 0, ["live", "b0", "b1"]),
        ([*BATCH, LIVE], 2, 1, ["live", "b2", "b3"]),
        ([*BATCH, LIVE], 3, 1, ["live", "b3", "b0", "b1"]),
        ([*BATCH, LIVE], 99, 7, ["live", "b1", "b2", "b3", "b0"]),
        ([LIVE, BATCH_PROMPT], 99, 0, ["live"]),
        ([READ, LIVE, *BATCH], 1, 2, ["read", "live", "b2"]),
    ],
)
def test_beside_others(running: list[SequenceView], room: int, turn: int, expected: list[str]) -> None:
    assert names(beside_others(running, room, turn)) == expected


def test_every_background_sequence_has_its_turn() -> None:
    seen = [names(beside_others([LIVE, *BATCH], 1, turn))[1] for turn in range(8)]
    assert sorted(seen) == sorted(2 * ["b0", "b1", "b2", "b3"])


def learned(fixed_s: float, each_s: float, sizes: list[int]) -> StepCost:
    cost = StepCost()
    for _ in range(FIT_EVERY * 4):
        for size in sizes:
            cost.observe(size, fixed_s + each_s * size)
    return cost


def test_room_is_what_makes_a_step_an_eighth_longer() -> None:
    # 0.12 x (20 + 2) / 2 = 1.32; 0.12 x (20 + 16) / 2 = 2.16
    cost = learned(0.020, 0.002, [1, 3, 16])
    assert [cost.room(1), cost.room(8)] == [1, 2]
    # A device that hardly notices: 0.12 x 10.001 / 0.001 = 1200.1
    assert learned(0.010, 0.000001, [1, 200]).room(1) > 100
    assert learned(0.010, 0.0, [1, 200]).room(1) in (119, 120)


def test_nothing_is_promised_before_two_sizes_were_seen() -> None:
    assert StepCost().room(1) == 0
    assert learned(0.02, 0.002, [16]).room(1) == 0


def test_a_machine_that_becomes_slower_is_learned_anew() -> None:
    cost = learned(0.020, 0.002, [1, 16])
    for _ in range(FIT_EVERY * 4):
        cost.observe(1, 0.022)
        cost.observe(16, 0.052 + 0.3)
    assert cost.room(1) == 0


def test_background_work_gives_its_blocks_back_first() -> None:
    assert choose_victim([view("old", background=True, arrival=1), view("young", arrival=9)]) == "old"
    assert choose_victim([view("old", arrival=1), view("young", arrival=9)]) == "young"
    pair = [view("old", background=True, arrival=1), view("young", background=True, arrival=9)]
    assert choose_victim(pair) == "young"


TEXT = [5, 6, 7, 8, 9, 10, 11]


def requests(count: int, *, background: bool, first: int = 0) -> list[SequenceRequest]:
    return [
        make_request(f"{'b' if background else 'f'}{n}", [*TEXT, n + 3], 20, background=background,
                     sampling=Sampling(temperature=0.0, ignore_eos=True))
        for n in range(first, first + count)
    ]  # fmt: skip


def test_background_work_stands_still_within_a_step_and_nobody_s_answer_changes(tiny: TinyModel) -> None:
    alone = run_all(make_engine(tiny.folder), requests(3, background=True))
    by_itself = run_all(make_engine(tiny.folder), requests(1, background=False))
    engine = make_engine(tiny.folder)
    for request in requests(3, background=True):
        engine.add(request)
    answers: dict[str, list[int]] = {}
    steps: list[set[str]] = []
    for step in range(200):
        if step == 8:
            engine.add(requests(1, background=False)[0])
        if not engine.has_work and step > 8:
            break
        deltas = engine.step().deltas
        steps.append({delta.sequence_id for delta in deltas})
        for delta in deltas:
            answers.setdefault(delta.sequence_id, []).extend(delta.tokens)
    with_other = [step for step in steps if "f0" in step]
    assert len(with_other) == 20 and all(step == {"f0"} for step in with_other)
    assert {"b0", "b1", "b2"} in steps[: steps.index({"f0"})] and {"b0", "b1", "b2"} in steps[
        steps.index({"f0"}) + 20 :
    ]
    assert answers == {name: answer.tokens for name, answer in (alone | by_itself).items()}


def test_standing_still_changes_no_answer_with_passes_in_flight(tiny: TinyModel) -> None:
    knobs = Sampling(temperature=0.8, repetition_penalty=1.2, seed=5, ignore_eos=True)
    mixed = [
        make_request(f"s{n}", [*TEXT, n + 3], 24, sampling=knobs, background=n % 2 == 0) for n in range(6)
    ]
    alone = {each.sequence_id: run_all(make_engine(tiny.folder), [each])[each.sequence_id] for each in mixed}
    engine = make_engine(tiny.folder, steps_ahead=1)
    moments = (0, 0, 3, 9, 15, 20)

    def add(step: int) -> None:
        for moment, each in zip(moments, mixed, strict=True):
            if moment == step:
                engine.add(each)

    together = run_all(engine, before_step=add)
    assert {name: answer.tokens for name, answer in together.items()} == {
        name: answer.tokens for name, answer in alone.items()
    }


def test_nobody_waits_for_a_prefix_that_the_background_computes(tiny: TinyModel) -> None:
    """Their common beginning is long: two of one kind would compute it once."""
    prompt = list(range(3, 3 + 4 * BLOCK_TOKENS))
    engine = make_engine(tiny.folder, prefill_chunk_tokens=BLOCK_TOKENS, kv_tokens=4096)
    engine.add(make_request("b", [*prompt, 1], 4, background=True))
    engine.step()
    engine.add(make_request("f", [*prompt, 2], 4))
    engine.add(make_request("b2", [*prompt, 3], 4, background=True))
    engine.step()
    assert engine.active_sequences == 2 and engine.waiting_sequences == 1
    assert set(run_all(engine)) == {"b", "f", "b2"}


def test_background_work_starts_behind_all_others(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, max_batch=1)
    for request in (*requests(2, background=True), *requests(1, background=False)):
        engine.add(request)
    first_tokens: dict[str, int] = {}
    for step in range(200):
        if not engine.has_work:
            break
        for delta in engine.step().deltas:
            first_tokens.setdefault(delta.sequence_id, step)
    assert sorted(first_tokens, key=first_tokens.__getitem__) == ["f0", "b0", "b1"]
