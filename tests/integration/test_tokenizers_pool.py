"""Real child processes: their limits cannot be tested otherwise."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.inference.errors import ApiError
from shared.inference.prompts import ChatMessage
from shared.inference.tokenizers_pool import PoolLimits, TokenizerPool
from tests.unit.gateway.inference.builders import write_tokenizer

HI = [ChatMessage("user", "hi")]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUNGRY = "{% set ns = namespace(s='x') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"


@asynccontextmanager
async def running(store: Path, limits: PoolLimits) -> AsyncIterator[TokenizerPool]:
    pool = TokenizerPool(store, limits)

    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            pool.start(group)

    task = asyncio.create_task(run())
    try:
        yield pool
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def make_store(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "good")
    write_tokenizer(tmp_path / "endless", chat_template=ENDLESS)
    write_tokenizer(tmp_path / "hungry", chat_template=HUNGRY)
    write_tokenizer(tmp_path / "plain", chat_template=None)
    return tmp_path


def children_of_this_process() -> set[int]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    return set(map(int, listed.split()))


async def refusal(pool: TokenizerPool, folder: str) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        await pool.encode_chat(folder, HI)
    return caught.value.status, caught.value.code


async def test_words_are_spelled_by_the_children(tmp_path: Path) -> None:
    async with running(make_store(tmp_path), PoolLimits(children=1)) as pool:
        spelled = await pool.encode_words("good", ["a", " b"])
        assert [await pool.decode("good", [ids]) for ids in spelled] == [["a"], [" a"], [" b"]]


async def test_many_conversations_get_what_each_gets_alone(tmp_path: Path) -> None:
    async with running(make_store(tmp_path), PoolLimits(children=1)) as pool:
        conversations = [(ChatMessage("user", text),) for text in ("one", "two <|end|>", "")]
        alone = [await pool.encode_chat("good", messages) for messages in conversations]
        assert await pool.encode_chats("good", conversations) == alone
        with pytest.raises(ApiError) as caught:
            await pool.encode_chats("plain", conversations)
        assert caught.value.code == "chat_template_missing"


async def test_bad_models_and_endless_templates_are_refused_and_the_pool_goes_on(tmp_path: Path) -> None:
    before = children_of_this_process()
    limits = PoolLimits(children=1, call_s=2.0, models_per_child=2, memory_bytes=1024**3)
    async with running(make_store(tmp_path), limits) as pool:
        tokens = await pool.encode_chat("good", HI)
        assert await pool.decode("good", [tokens]) == ["<|bos|>user: hi<|end|>\nassistant: "]
        assert (await pool.spellings("good", [258]))[258] == b"<|end|>"
        (first,) = children_of_this_process() - before

        started_s = time.monotonic()
        assert await refusal(pool, "endless") == (400, "prompt_too_complex")
        assert time.monotonic() - started_s < 5
        assert await pool.encode_chat("good", HI) == tokens
        (second,) = children_of_this_process() - before
        assert second != first

        # Its process dies of its memory, or says that it has none left.
        assert (await refusal(pool, "hungry"))[1] in (
            "service_unavailable",
            "invalid_messages",
            "prompt_too_complex",
        )
        assert await refusal(pool, "plain") == (400, "chat_template_missing")
        assert await refusal(pool, "missing") == (503, "service_unavailable")
        assert await refusal(pool, "../../etc") == (503, "service_unavailable")
        # More models than a child holds: the oldest was let go, and comes back.
        assert await pool.encode_texts("good", ["hi", "ho"]) == [[71, 72], [71, 78]]
    assert children_of_this_process() == before


async def test_a_text_that_a_tokenizer_chokes_on_is_refused_and_its_process_goes_on(tmp_path: Path) -> None:
    # Backtracks without end, which the library answers with a panic
    folder = write_tokenizer(tmp_path / "choking")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    before = children_of_this_process()
    async with running(tmp_path, PoolLimits(children=1)) as pool:
        assert await pool.encode_texts("choking", ["aab"])
        children = children_of_this_process() - before
        for _ in range(2):
            with pytest.raises(ApiError) as caught:
                await pool.encode_texts("choking", ["a" * 60 + "b"])
            assert (caught.value.status, caught.value.code) == (400, "prompt_too_complex")
        assert await pool.encode_texts("choking", ["aab"])
        assert children_of_this_process() - before == children


async def test_killed_child_costs_one_answer(tmp_path: Path) -> None:
    before = children_of_this_process()
    async with running(make_store(tmp_path), PoolLimits(children=1)) as pool:
        pool.prewarm(["good"])
        await pool.encode_chat("good", HI)
        (child,) = children_of_this_process() - before
        os.kill(child, 9)
        assert await refusal(pool, "good") == (503, "service_unavailable")
        assert await pool.encode_chat("good", HI)


async def test_new_models_are_loaded_before_anyone_asks(tmp_path: Path) -> None:
    before = children_of_this_process()
    store = make_store(tmp_path)
    async with running(store, PoolLimits(children=2)) as pool:
        pool.prewarm(["good"])
        async with asyncio.timeout(10):
            while not all(child.has_loaded("good") for child in pool.children):
                await asyncio.sleep(0.01)
            pool.prewarm(["good", "missing", "plain"])  # one that cannot be loaded keeps no other from it
            while not all(child.has_loaded("plain") for child in pool.children):
                await asyncio.sleep(0.01)
        assert len(children_of_this_process() - before) == 2
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (store / "good" / name).unlink()
        assert await pool.encode_chat("good", HI)


async def test_full_queue_is_refused_at_once(tmp_path: Path) -> None:
    async with running(make_store(tmp_path), PoolLimits(children=1, waiting=2, call_s=2.0)) as pool:
        await pool.encode_chat("good", HI)
        busy = asyncio.create_task(refusal(pool, "endless"))
        await asyncio.sleep(0)
        while pool._work.qsize():  # until the child has it
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(pool.encode_chat("good", HI)) for _ in range(2)]
        await asyncio.sleep(0)
        assert await refusal(pool, "good") == (503, "service_unavailable")
        waiting[0].cancel()  # a client that goes while it waits leaves the others in peace
        assert await busy == (400, "prompt_too_complex")
        assert await waiting[1]


async def test_child_knows_nothing_of_the_gateways_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://user:secret@host/db")
    before = children_of_this_process()
    async with running(make_store(tmp_path), PoolLimits(children=1)) as pool:
        await pool.encode_chat("good", HI)
        (child,) = children_of_this_process() - before
        assert b"secret" not in Path(f"/proc/{child}/environ").read_bytes()
        limits = Path(f"/proc/{child}/limits").read_text(encoding="ascii")
        assert "Max address space         2147483648" in limits
        modules = Path(f"/proc/{child}/maps").read_text(encoding="utf-8")
        assert "tokenizers" in modules
        assert "torch" not in modules
