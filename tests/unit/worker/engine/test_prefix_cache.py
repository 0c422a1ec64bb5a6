"""Blocks are counted and shared right, and what a team computed is found again by that team alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.engine import Engine, Sampling, SequenceRequest, StepReport
from services.worker.engine.kv_cache import PADDING_BLOCK
from services.worker.engine.native.build import load_library
from services.worker.engine.packing import PackedTokens
from services.worker.engine.prefix_cache import BlockAllocator, PrefixNames, prefix_seed
from tests.unit.worker.engine.builders import make_engine, make_request, run_all, save_model, tiny_config
from tests.unit.worker.engine.conftest import TinyModel

FREE = Sampling(temperature=0.0, ignore_eos=True)
PROMPT = [7 + n % 90 for n in range(100)]


def names(tokens: list[int], seed: bytes = b"s", block_tokens: int = 4) -> list[bytes]:
    return list(PrefixNames(seed, block_tokens).first(len(tokens) // block_tokens, tokens))


def test_name_depends_on_all_tokens_up_to_the_blocks_end_and_on_nothing_after() -> None:
    base = names([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert len(base) == 2
    assert names([1, 2, 3, 4, 5, 6, 7, 8, 10]) == base
    first_changed, last_changed = names([9, 2, 3, 4, 5, 6, 7, 8]), names([1, 2, 3, 4, 5, 6, 7, 9])
    assert not set(first_changed) & set(base)
    assert last_changed[0] == base[0] and last_changed[1] != base[1]
    assert not set(names([1, 2, 3, 4, 5, 6, 7, 8], seed=b"t")) & set(base)


def test_names_grow_with_the_tokens() -> None:
    grown, tokens = PrefixNames(b"s", 4), list(range(100, 130))
    for count in (1, 3, 2, 7):
        assert grown.first(count, tokens[: 4 * max(count, 3)]) == names(tokens)[:count]


def test_no_two_owners_have_one_seed() -> None:
    parts = ("a", "b", "ab", "", "adapter b")
    owners = [
        (team, model, adapter, kernels)
        for team in parts
        for model in parts
        for adapter in (None, *parts)
        for kernels in ("", "a", "b")
    ]
    assert len({prefix_seed(*owner) for owner in owners}) == len(owners)


def test_allocator_never_gives_a_held_block_nor_the_padding_block_and_counts_every_holder() -> None:
    """Against the plainest model of it: who holds which blocks, and which names stand for which."""
    rng = random.Random(1)
    allocator = BlockAllocator(20)
    held: list[list[int]] = []
    named: dict[bytes, int] = {}
    for step in range(3000):
        action = rng.random()
        if held and action < 0.35:
            allocator.give_back(held.pop(rng.randrange(len(held))))
        elif held and action < 0.5:
            block = rng.choice(rng.choice(held))
            if block not in named.values():
                name = str(step).encode()
                allocator.remember("m", block, name)
                named[name] = block
        elif named and action < 0.65:
            found = allocator.find("m", [rng.choice(list(named))])
            allocator.share(found)
            held.append(found)
        elif held and action < 0.7:
            allocator.forget(rng.choice(held))
        elif allocator.free:
            held.append(allocator.take(rng.randrange(1, min(4, allocator.free) + 1)))
        named = {name: block for name, block in named.items() if allocator.find("m", [name])}
        out = {block for blocks in held for block in blocks}
        assert PADDING_BLOCK not in out
        assert allocator.free == 20 - len(out)
        assert allocator.remembered == len(set(named.values()) - out)
        assert all(allocator.find("m", [name]) == [block] for name, block in named.items())
        for block in out:
            assert not allocator.is_idle(block)
    assert len(named) > 3 and len(held) > 3
    for blocks in held:
        allocator.give_back(blocks)
    allocator.forget_model("m")
    assert (allocator.free, allocator.remembered) == (20, 0)
    assert sorted(allocator.take(20)) == list(range(1, 21))


def test_allocator_refuses_more_than_it_has_and_a_block_given_back_twice() -> None:
    allocator = BlockAllocator(3)
    blocks = allocator.take(2)
    with pytest.raises(ValueError, match="2 blocks asked, 1 free"):
        allocator.take(2)
    allocator.give_back(blocks)
    with pytest.raises(ValueError, match="twice"):
        allocator.give_back(blocks)
    assert allocator.free == 3


def remembered(allocator: BlockAllocator, *chain: bytes, model: str = "m") -> list[int]:
    blocks = allocator.take(len(chain))
    for block, name in zip(blocks, chain, strict=True):
        allocator.remember(model, block, name)
    return blocks


def test_longest_idle_is_forgotten_first_and_of_one_sequence_the_last_block() -> None:
    allocator = BlockAllocator(5)
    old, young = remembered(allocator, b"a1", b"a2"), remembered(allocator, b"b1", b"b2")
    allocator.give_back(old)
    allocator.give_back(young)
    allocator.share(allocator.find("m", [b"a1"]))  # used again: now it is the youngest
    allocator.give_back(old[:1])
    forgotten = []
    for _ in range(5):
        allocator.take(1)
        known = [name for name in (b"a1", b"a2", b"b1", b"b2") if allocator.find("m", [name])]
        forgotten.append(known)
    assert forgotten == [
        [b"a1", b"a2", b"b1", b"b2"],  # the blank one goes first
        [b"a1", b"b1", b"b2"],
        [b"a1", b"b1"],
        [b"a1"],
        [],
    ]


def test_find_stops_at_the_first_unknown_name_and_looks_at_one_model_only() -> None:
    allocator = BlockAllocator(5)
    blocks = remembered(allocator, b"1", b"2", b"3")
    allocator.forget(blocks[1:2])
    assert allocator.find("m", [b"1", b"2", b"3"]) == blocks[:1]
    assert allocator.find("n", [b"1"]) == []
    remembered(allocator, b"1", model="n")
    allocator.forget_model("m")
    assert allocator.find("m", [b"1"]) == []
    assert len(allocator.find("n", [b"1"])) == 1


def test_second_block_of_a_name_is_blank_when_given_back() -> None:
    allocator = BlockAllocator(2)
    first, second = remembered(allocator, b"x"), remembered(allocator, b"x")
    assert allocator.find("m", [b"x"]) == first
    allocator.give_back(second)
    allocator.give_back(first)
    assert (allocator.free, allocator.remembered) == (2, 1)


def test_block_is_to_be_cleared_from_its_second_holder_on() -> None:
    allocator = BlockAllocator(2)
    first = allocator.take(1)
    assert allocator.drain_uncleared() == []
    allocator.give_back(first)
    assert allocator.take(1) == first
    assert allocator.drain_uncleared() == first
    assert allocator.drain_uncleared() == []


def cached_tokens(engine: Engine, request: SequenceRequest) -> int:
    engine.add(request)
    deltas = []
    while engine.has_work:
        deltas += [each for each in engine.step().deltas if each.sequence_id == request.sequence_id]
    assert len({delta.cached_prompt_tokens for delta in deltas}) == 1
    return deltas[0].cached_prompt_tokens


@pytest.mark.parametrize(
    ("prompt", "changes", "expected"),
    [
        pytest.param(PROMPT, {}, 96, id="all full blocks"),
        pytest.param(PROMPT[:96], {}, 80, id="but the last token is always computed"),
        pytest.param(PROMPT[:97], {}, 96, id="the last token alone"),
        pytest.param(PROMPT[:15], {}, 0, id="no full block"),
        pytest.param(PROMPT[:40] + [3] * 60, {}, 32, id="as far as they agree"),
        pytest.param([3] + PROMPT[1:], {}, 0, id="another first token"),
        pytest.param(PROMPT, {"isolation_key": "other team"}, 0, id="another team"),
        pytest.param(PROMPT, {"model": "n"}, 0, id="another model"),
        pytest.param(PROMPT, {"echo_logprobs": True}, 0, id="a prompt that is scored"),
        pytest.param(PROMPT, {"pooling": "mean", "max_tokens": 0}, 0, id="a mean of the prompt's rows"),
        pytest.param(PROMPT, {"pooling": "last", "max_tokens": 0}, 96, id="the last row alone"),
    ],
)
def test_prompt_is_found_as_far_as_the_same_team_computed_it(
    tiny: TinyModel, prompt: list[int], changes: dict[str, Any], expected: int
) -> None:
    engine = make_engine(tiny.folder)
    engine.load_model("n", tiny.folder)
    assert cached_tokens(engine, make_request("a", PROMPT, 3, sampling=FREE)) == 0
    request = make_request("b", prompt, **{"max_tokens": 6, "sampling": FREE, **changes})
    alone = run_all(make_engine(tiny.folder, request.model), [request])["b"]
    assert cached_tokens(engine, request) == expected
    assert run_all(engine, [request])["b"].tokens == alone.tokens


def test_answer_is_found_as_part_of_the_next_turns_prompt(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    first = run_all(engine, [make_request("a", PROMPT[:20], 50, sampling=FREE)])["a"]
    second = make_request("b", PROMPT[:20] + first.tokens + [9, 8, 7], 20, sampling=FREE)
    alone = run_all(make_engine(tiny.folder), [second])["b"]
    # The 50th token was never an input, so 69 tokens have keys and values: 4 full blocks.
    assert cached_tokens(engine, second) == 64
    assert run_all(engine, [second])["b"].tokens == alone.tokens


def test_prompt_scores_are_the_same_when_the_prompt_is_known_already(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    run_all(engine, [make_request("a", PROMPT, 3)])
    scored = make_request("b", PROMPT, 3, echo_logprobs=True, sampling=Sampling(temperature=0.0, logprobs=2))
    assert run_all(engine, [scored])["b"] == run_all(make_engine(tiny.folder), [scored])["b"]


@pytest.mark.skipif(load_library().library is None, reason="plain torch promises no equal bits")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_what_is_found_changes_no_bit(tiny: TinyModel, precision: str) -> None:
    """A prompt computed in one piece, against a beginning that was computed as prompt and answer of others."""
    sampling = Sampling(temperature=0.9, seed=2, logprobs=2, ignore_eos=True)
    answer = run_all(
        make_engine(tiny.folder, precision=precision), [make_request("a", PROMPT[:37], 50, sampling=FREE)]
    )
    second = make_request("b", PROMPT[:37] + answer["a"].tokens + [9, 8, 7], 30, sampling=sampling)
    alone = run_all(make_engine(tiny.folder, precision=precision, prefill_chunk_tokens=256), [second])["b"]
    engine = make_engine(tiny.folder, precision=precision, prefill_chunk_tokens=24)
    run_all(
        engine, [make_request("short", PROMPT[:20], 2), make_request("a", PROMPT[:37], 50, sampling=FREE)]
    )
    assert cached_tokens(engine, second) == 80
    assert run_all(engine, [second])["b"] == alone


def test_running_sequences_share_blocks(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, kv_tokens=16 * 16)
    engine.add(make_request("a", PROMPT, 30, sampling=FREE))
    engine.step()
    taken = engine.config.kv_tokens - engine.free_kv_tokens
    engine.add(make_request("b", PROMPT + [5], 30, sampling=FREE))
    engine.add(make_request("c", PROMPT + [6], 30, sampling=FREE))
    engine.step()
    assert engine.config.kv_tokens - engine.free_kv_tokens == taken + 2 * 16
    engine.cancel("a")
    alone = run_all(make_engine(tiny.folder), [make_request("b", PROMPT + [5], 30, sampling=FREE)])["b"]
    assert run_all(engine)["b"].tokens == alone.tokens[1:]


def test_found_blocks_count_for_the_pools_room(tiny: TinyModel) -> None:
    """A pool in which the request fits only because it shares what is there."""
    engine = make_engine(tiny.folder, kv_tokens=10 * 16)
    engine.add(make_request("a", PROMPT, 20, sampling=FREE))
    engine.step()
    engine.add(make_request("b", PROMPT, 20, sampling=FREE))
    engine.add(make_request("c", PROMPT, 20, sampling=FREE, isolation_key="other team"))
    engine.step()
    assert (engine.active_sequences, engine.waiting_sequences) == (2, 1)


def test_another_team_sees_nothing_of_what_was_computed(tiny: TinyModel) -> None:
    """Step by step the same reports as in an engine where nobody was before."""

    def reports(engine: Engine) -> list[StepReport]:
        for number in range(3):
            engine.add(make_request(f"b{number}", PROMPT + [number], 20, isolation_key="other team"))
        seen = []
        while engine.has_work:
            seen.append(engine.step())
        return seen

    engine = make_engine(tiny.folder)
    run_all(engine, [make_request(f"a{number}", PROMPT + [number], 20) for number in range(3)])
    assert engine._blocks.remembered > 6
    assert reports(engine) == reports(make_engine(tiny.folder))


def test_unloading_forgets_the_models_blocks_and_no_others(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    engine.load_model("n", tiny.folder)
    run_all(engine, [make_request("a", PROMPT, 3), make_request("b", PROMPT, 3, model="n")])
    engine.unload_model("m")
    engine.load_model("m", tiny.folder)
    assert cached_tokens(engine, make_request("a", PROMPT, 3)) == 0
    assert cached_tokens(engine, make_request("b", PROMPT, 3, model="n")) == 96
    for handle in ("m", "n"):
        engine.unload_model(handle)
    assert engine._blocks.remembered == 0
    assert engine.free_kv_tokens == engine.config.kv_tokens


def test_what_a_model_that_left_has_computed_is_found_when_it_is_back(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    before = run_all(engine, [make_request("a", PROMPT, 20)])
    engine.unload_model("m", keep_prefixes=True)
    assert engine.free_kv_tokens == engine.config.kv_tokens
    engine.load_model("m", tiny.folder)
    assert cached_tokens(engine, make_request("a", PROMPT, 3)) == 96
    answer = before["a"].tokens
    again = run_all(engine, [make_request("c", PROMPT, 20, prior_tokens=tuple(answer[:9]))])
    assert [*answer[:9], *again["c"].tokens] == answer


def test_nothing_is_found_of_weights_that_are_no_longer_trusted(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    run_all(engine, [make_request("a", PROMPT, 3)])
    engine.unload_model("m", keep_prefixes=True)
    engine.forget_prefixes()
    engine.load_model("m", tiny.folder)
    assert cached_tokens(engine, make_request("a", PROMPT, 3)) == 0


def test_nothing_is_found_that_other_kernels_laid_out(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    run_all(engine, [make_request("a", PROMPT, 3)])
    engine.unload_model("m", keep_prefixes=True)
    engine.load_model("m", tiny.folder)
    model = engine._models["m"]
    engine._models["m"] = replace(model, info=replace(model.info, kernels="others"))
    assert cached_tokens(engine, make_request("a", PROMPT, 3)) == 0


def test_a_pool_of_another_shape_begins_without_memories(tiny: TinyModel, tmp_path: Path) -> None:
    engine = make_engine(tiny.folder)
    run_all(engine, [make_request("a", PROMPT, 3)])
    engine.unload_model("m", keep_prefixes=True)
    save_model(tmp_path, tiny_config(num_hidden_layers=1))
    engine.load_model("n", tmp_path)
    assert engine._blocks.remembered == 0
    assert cached_tokens(engine, make_request("b", PROMPT, 3, model="n")) == 0


def test_preempted_sequence_finds_what_was_not_evicted(tiny: TinyModel) -> None:
    requests = [make_request(f"s{n}", [10 + n] * 33, 60, sampling=FREE) for n in range(3)]
    engine = make_engine(tiny.folder, kv_tokens=12 * 16)
    alone = {
        key: run_all(make_engine(tiny.folder), [each])[key] for each in requests for key in [each.sequence_id]
    }
    computed = prompts = 0
    for request in requests:
        engine.add(request)
    answers: dict[str, list[int]] = {request.sequence_id: [] for request in requests}
    preempted = False
    while engine.has_work:
        report = engine.step()
        preempted |= any(each.view.preemptions for each in engine._live())
        computed += report.prefill_tokens
        for delta in report.deltas:
            answers[delta.sequence_id] += delta.tokens
    prompts = sum(len(request.prompt_tokens) for request in requests)
    assert preempted
    assert prompts < computed < 2 * prompts
    assert answers == {key: answer.tokens for key, answer in alone.items()}


def test_blocks_are_cleared_before_another_sequence_writes_to_them(tiny: TinyModel) -> None:
    """Without this a NaN in memory that was never this sequence's would spoil its answer."""
    request = make_request("a", PROMPT, 20, sampling=FREE)
    expected = run_all(make_engine(tiny.folder), [request])["a"]
    engine = make_engine(tiny.folder, kv_tokens=10 * 16)
    run_all(engine, [make_request("before", PROMPT, 50, sampling=FREE, isolation_key="other team")])
    assert engine._pool is not None
    engine._pool._pool[:, :, 1:] = float("nan")
    assert run_all(engine, [request])["a"] == expected


def test_nothing_of_a_failed_sequence_is_found_again(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny.folder)
    decoder = engine._models["m"].decoder
    forward = decoder.forward
    passes = 0

    def fail_at_the_twentieth(batch: PackedTokens, *rest: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes == 20:
            return torch.full_like(forward(batch, *rest), float("nan"))
        return forward(batch, *rest)

    monkeypatch.setattr(decoder, "forward", fail_at_the_twentieth)
    failed = run_all(engine, [make_request("a", PROMPT, 50, sampling=FREE)])["a"]
    assert failed.error is not None and len(failed.tokens) == 19
    assert engine._blocks.remembered == 0
    assert cached_tokens(engine, make_request("b", PROMPT, 3)) == 0


def test_resume_finds_prompt_and_prior_tokens(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder)
    whole = run_all(engine, [make_request("a", PROMPT[:20], 60, sampling=FREE)])["a"]
    resumed = make_request("b", PROMPT[:20], 60, sampling=FREE, prior_tokens=tuple(whole.tokens[:50]))
    engine.add(resumed)
    first = engine.step()
    assert (first.prefill_tokens, first.decode_tokens) == (70 - 64, 0)
    rest = [token for delta in first.deltas for token in delta.tokens] + run_all(engine)["b"].tokens
    assert rest == whole.tokens[50:]


def test_several_answers_to_one_prompt_compute_it_once(tiny: TinyModel) -> None:
    requests = [make_request(str(n), PROMPT, 10, sampling=Sampling(seed=n)) for n in range(4)]
    engine = make_engine(tiny.folder)
    for request in requests:
        engine.add(request)
    reports = [engine.step(), engine.step()]
    assert [report.prefill_tokens for report in reports] == [100, 3 * 4]
    assert [len(report.deltas) for report in reports] == [1, 4]
    alone = [run_all(make_engine(tiny.folder), [each])[each.sequence_id].tokens for each in requests]
    first = {delta.sequence_id: list(delta.tokens) for delta in reports[0].deltas}
    for delta in reports[1].deltas:
        first.setdefault(delta.sequence_id, []).extend(delta.tokens)
    rest = run_all(engine)
    assert [first[key] + (rest[key].tokens if key in rest else []) for key in "0123"] == alone


@pytest.mark.parametrize("leaves", ["cancelled", "failed"])
def test_nobody_waits_for_a_prefix_that_will_not_come(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, leaves: str
) -> None:
    engine = make_engine(tiny.folder, prefill_chunk_tokens=32)
    engine.add(make_request("a", PROMPT, 3))
    engine.add(make_request("b", PROMPT, 3))
    engine.step()
    assert (engine.active_sequences, engine.waiting_sequences) == (1, 1)
    if leaves == "cancelled":
        engine.cancel("a")
    else:

        def forward_out_of_memory(*_: Any) -> torch.Tensor:
            raise MemoryError

        with monkeypatch.context() as broken:
            broken.setattr(engine._models["m"].decoder, "forward", forward_out_of_memory)
            assert engine.step().deltas[0].error is not None
    engine.step()
    assert list(engine._residents.running) == ["b"]
    assert len(run_all(engine)["b"].tokens) == 3


def test_place_is_kept_for_who_waits_for_a_prefix(tiny: TinyModel) -> None:
    engine = make_engine(tiny.folder, max_batch=2)
    for name, prompt in (("a", PROMPT), ("b", PROMPT), ("late", [5, 6, 7])):
        engine.add(make_request(name, prompt, 30, sampling=FREE))
    engine.step()
    assert engine.active_sequences == 1
    engine.step()
    assert set(engine._residents.running) == {"a", "b"}
