"""The path of a job with real processes and a real broker: claim, grant, stream, and what a kill leaves."""

from __future__ import annotations

import asyncio
import math
import signal
import struct
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.gateway.owner import Finished, OwnedStream, Owner, TextDelta
from shared import topology
from shared.broker import Broker
from shared.ids import new_id
from shared.messages import (
    ChoiceResult,
    GenerateJob,
    JobFinished,
    JobUsage,
    JobVoided,
    UsageEvent,
    decoder,
)
from tests.conftest import Vhost
from tests.integration.worker_process import WorkerProcess, stub_embed_job, stub_job, stub_store


@dataclass
class Path_:
    """A gateway's owner in this process, and workers in their own."""

    broker: Broker
    owner: Owner
    resource_id: str
    queue: topology.Queue
    store: Path
    folder: Path
    amqp_url: str
    voids: list[JobVoided]
    workers: list[WorkerProcess] = field(default_factory=list)

    def worker(self, **options: Any) -> WorkerProcess:
        log = self.folder / f"worker{len(self.workers)}.log"
        started = WorkerProcess(self.amqp_url, self.store, self.resource_id, log, **options).start()
        self.workers.append(started)
        return started

    async def submit(self, max_tokens: int, deadline_s: float = 60.0) -> OwnedStream:
        job = stub_job(self.owner.queue, self.resource_id, max_tokens=max_tokens, deadline_s=deadline_s)
        return await self.owner.submit(job, self.queue)

    async def usage_events(self, count: int) -> list[JobUsage | JobVoided]:
        """Drain the billing queue until it gave `count` facts."""
        facts: list[JobUsage | JobVoided] = []
        got = asyncio.Event()

        def receive(delivery: object) -> None:
            facts.append(delivery.message)  # type: ignore[attr-defined]
            if len(facts) >= count:
                got.set()

        subscription = await self.broker.subscribe(
            topology.BILLING_EVENTS, UsageEvent, receive, prefetch=1000, no_ack=True
        )
        await asyncio.wait_for(got.wait(), 60)
        await subscription.cancel()
        return facts


@pytest.fixture
async def path(vhost: Vhost, tmp_path: Path) -> AsyncIterator[Path_]:
    async with AsyncExitStack() as stack:
        broker = await Broker.open(vhost.amqp_url, "test", stack)
        voids: list[JobVoided] = []

        async def void(fact: JobVoided, headers: dict[str, str]) -> None:
            voids.append(fact)

        owner = Owner(broker, void, lambda result: None)
        resource_id = new_id("res")
        queue = topology.job_queue(resource_id, "live")
        await broker.declare(topology.job_queues(resource_id, pool=False))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        await owner.start(group)
        made = Path_(
            broker, owner, resource_id, queue, stub_store(tmp_path / "store"), tmp_path, vhost.amqp_url, voids
        )
        try:
            yield made
        finally:
            for worker in made.workers:
                if worker.process.poll() is None:
                    worker.signal(signal.SIGCONT)
                    worker.kill()
            for task in group._tasks.copy():
                task.cancel()


async def read(stream: OwnedStream) -> tuple[str, list[int], Finished]:
    text = ""
    tokens: list[int] = []
    async for event in stream:
        if isinstance(event, TextDelta):
            text += event.text
            tokens += event.tokens
        else:
            return text, tokens, event
    raise AssertionError("the stream ended without an end")


def whole_text(count: int) -> str:
    return "".join(f"t{index} " for index in range(count))


async def test_a_job_is_answered_whole_and_reported_once(path: Path_) -> None:
    path.worker(step_s=0.002)
    stream = await path.submit(50)
    text, tokens, end = await asyncio.wait_for(read(stream), 30)
    assert text == whole_text(50)
    assert tokens == [1000 + index for index in range(50)]
    assert (end.outcome, end.completion_tokens, end.finish_reasons) == ("succeeded", 50, ("length",))
    [fact] = await path.usage_events(1)
    assert isinstance(fact, JobUsage)
    assert (fact.outcome, fact.prompt_tokens, fact.completion_tokens, fact.attempt) == ("succeeded", 3, 50, 1)
    assert path.voids == []


async def test_fifty_streams_go_on_unbroken_when_their_worker_is_killed(path: Path_) -> None:
    first = path.worker(step_s=0.02)
    streams = [await path.submit(300) for _ in range(50)]
    reads = [asyncio.create_task(read(stream)) for stream in streams]
    while any(len(stream.owned.tokens[0]) < 20 for stream in streams):
        await asyncio.sleep(0.05)
    killed_s = time.monotonic()
    first.kill()
    path.worker(step_s=0.01)
    results = await asyncio.wait_for(asyncio.gather(*reads), 60)
    assert time.monotonic() - killed_s < 20
    assert all(text == whole_text(300) and end.outcome == "succeeded" for text, _, end in results)
    facts = await path.usage_events(50)
    assert sorted(fact.job_id for fact in facts) == sorted(stream.owned.job.job_id for stream in streams)
    assert all(isinstance(f, JobUsage) and f.completion_tokens == 300 and f.attempt == 2 for f in facts)


async def test_a_frozen_worker_is_replaced_and_fenced_when_it_wakes(path: Path_) -> None:
    first = path.worker(step_s=0.05)
    stream = await path.submit(200)
    reading = asyncio.create_task(read(stream))
    while len(stream.owned.tokens[0]) < 20:
        await asyncio.sleep(0.05)
    first.signal(signal.SIGSTOP)
    path.worker(step_s=0.005)
    # The frozen worker's connection is given up by its missing heartbeats, or the owner publishes the job again.
    text, _, end = await asyncio.wait_for(reading, 55)
    assert (text, end.outcome) == (whole_text(200), "succeeded")
    first.signal(signal.SIGCONT)
    again = await path.submit(20)
    text, _, end = await asyncio.wait_for(read(again), 20)
    assert (text, end.outcome) == (whole_text(20), "succeeded")


async def test_a_cancel_frees_the_place_and_bills_what_was_delivered(path: Path_) -> None:
    path.worker(step_s=0.1, max_batch=1)
    stream = await path.submit(1000)
    async for event in stream:
        if isinstance(event, TextDelta) and event.tokens:
            stream.delivered(len(event.tokens))
        if len(stream.owned.tokens[0]) > 10:
            break
    await stream.abandon("client_gone")
    following = await path.submit(5)
    text, _, _ = await asyncio.wait_for(read(following), 20)
    assert text == whole_text(5)
    assert [(fact.reason, fact.delivered_tokens > 0) for fact in path.voids] == [("client_gone", True)]
    facts = {fact.job_id: fact for fact in await path.usage_events(2)}
    cancelled = facts[stream.owned.job.job_id]
    assert isinstance(cancelled, JobUsage) and cancelled.outcome == "cancelled"
    assert 10 < cancelled.completion_tokens < 100


async def test_a_drained_worker_finishes_what_runs_and_gives_back_the_rest(path: Path_) -> None:
    first = path.worker(step_s=0.02, max_batch=2)
    streams = [await path.submit(60) for _ in range(6)]
    reads = [asyncio.create_task(read(stream)) for stream in streams]
    while sum(stream.owned.attempt for stream in streams) < 2:
        await asyncio.sleep(0.02)
    first.signal(signal.SIGTERM)
    path.worker(step_s=0.005, max_batch=8)
    results = await asyncio.wait_for(asyncio.gather(*reads), 30)
    assert all(text == whole_text(60) and end.outcome == "succeeded" for text, _, end in results)
    assert first.process.wait(10) == 0
    assert all(stream.owned.attempt == 1 for stream in streams)


async def test_a_job_that_kills_its_workers_ends_as_poison(path: Path_) -> None:
    stream = await path.submit(10_000, deadline_s=110)
    reading = asyncio.create_task(read(stream))
    for attempt in (1, 2, 3):
        worker = path.worker(step_s=0.02)
        while stream.owned.attempt < attempt or len(stream.owned.tokens[0]) < 5 * attempt:
            await asyncio.sleep(0.05)
        worker.kill()
    path.worker(step_s=0.02)
    _, _, end = await asyncio.wait_for(reading, 60)
    assert (end.outcome, end.error_code) == ("failed", "poison")
    assert [fact.reason for fact in path.voids] == ["failed"]


async def test_a_job_whose_owner_died_is_stopped_and_reported(path: Path_) -> None:
    path.worker(step_s=0.05)
    stream = await path.submit(10_000)
    while len(stream.owned.tokens[0]) < 5:
        await asyncio.sleep(0.05)
    path.owner._streams.clear()  # as if the gateway had been killed: it no longer names the job in its beats
    [fact] = await path.usage_events(1)
    assert isinstance(fact, JobUsage)
    assert (fact.outcome, fact.error_code) == ("cancelled", "owner_silent")


async def test_the_queue_of_a_dead_gateway_is_cleared_quickly_for_those_that_live(path: Path_) -> None:
    dead = stub_job("replies.v1.gw_dead", path.resource_id, max_tokens=50)
    for number in range(40):
        job = msgspec.structs.replace(dead, job_id=f"{dead.job_id}{number}")
        await path.broker.publish(path.queue, job)
    stream = await path.submit(5)
    worker = path.worker(max_batch=4)
    while '"phase": "ready"' not in worker.log.read_text():
        await asyncio.sleep(0.02)
    started_s = time.monotonic()
    text, _, _ = await asyncio.wait_for(read(stream), 30)
    assert text == whole_text(5)
    assert time.monotonic() - started_s < 12  # one claim and its silence, not one for each job
    facts = await path.usage_events(41)
    gone = [f for f in facts if isinstance(f, JobUsage) and f.error_code == "owner_gone"]
    assert len(gone) == 40
    assert {(f.outcome, f.completion_tokens, f.prefill_ran) for f in gone} == {("cancelled", 0, False)}


async def test_a_lost_finish_is_given_again_when_the_job_comes_again(path: Path_) -> None:
    path.worker()
    stream = await path.submit(4)
    lost = stream.owned.on_finished
    stream.owned.on_finished = lambda finished, now_s: []  # type: ignore[method-assign]
    await path.usage_events(1)  # the worker is done with it, the owner has heard nothing of the end
    stream.owned.on_finished = lost  # type: ignore[method-assign]
    await path.broker.publish(path.queue, stream.owned.job)  # as the owner does after a silence
    text, tokens, end = await asyncio.wait_for(read(stream), 20)
    assert (text, end.outcome, end.finish_reasons) == (whole_text(4), "succeeded", ("length",))
    assert tokens == [1000, 1001, 1002, 1003]


async def test_a_finish_is_reported_to_billing_when_its_worker_died_before_it_could(path: Path_) -> None:
    stream = await path.submit(3)
    job = stream.owned.job
    async with (
        AsyncExitStack() as dying
    ):  # a worker that tells the owner the end, and dies before it tells billing
        broker = await Broker.open(path.amqp_url, "dying", dying)
        taken: asyncio.Queue[GenerateJob] = asyncio.Queue()
        await broker.subscribe(path.queue, GenerateJob, lambda d: taken.put_nowait(d.message), prefetch=1)
        assert (await asyncio.wait_for(taken.get(), 10)).job_id == job.job_id
        result = ChoiceResult(index=0, tokens=[1, 2, 3], text="abc", finish_reason="length")
        finished = JobFinished(
            job_id=job.job_id, attempt=1, worker_id="wrk_dying", outcome="succeeded", choices=[result]
        )
        await broker.publish(path.owner.queue, finished)
        text, _, end = await asyncio.wait_for(read(stream), 10)
        assert (text, end.outcome) == ("abc", "succeeded")
    path.worker()
    [fact] = await path.usage_events(1)
    assert isinstance(fact, JobUsage)
    assert (fact.job_id, fact.attempt, fact.outcome) == (job.job_id, 1, "succeeded")
    assert (fact.prompt_tokens, fact.completion_tokens) == (3, 3)
    assert path.voids == []
    while await path.broker.depth(path.queue) > 0:
        await asyncio.sleep(0.1)


def unpacked(end: Finished) -> list[tuple[float, ...]]:
    return [struct.unpack(f"<{len(vector) // 4}f", vector) for vector in end.embeddings]


def expected_vectors(inputs: list[list[int]]) -> list[tuple[float, ...]]:
    """The stub's vector of an input is (its token count, its first token), made of length 1 by the worker."""
    lengths = [math.hypot(len(tokens), tokens[0]) for tokens in inputs]
    return [
        (len(tokens) / length, tokens[0] / length) for tokens, length in zip(inputs, lengths, strict=True)
    ]


INPUTS = [[number] * (1 + number % 5) for number in range(1, 41)]


async def submit_inputs(path: Path_, dimensions: int | None = None) -> OwnedStream:
    job = stub_embed_job(path.owner.queue, path.resource_id, INPUTS, dimensions)
    return await path.owner.submit(job, path.queue)


async def test_an_embedding_job_is_answered_in_the_order_of_its_inputs_beside_answers(path: Path_) -> None:
    path.worker(step_s=0.005, max_batch=8)
    streams = [await submit_inputs(path), await path.submit(50), await submit_inputs(path)]
    ends = [await asyncio.wait_for(read(stream), 30) for stream in streams]
    assert ends[1][0] == whole_text(50)
    for text, tokens, end in (ends[0], ends[2]):
        assert (text, tokens, end.outcome, end.completion_tokens) == ("", [], "succeeded", 0)
        for found, expected in zip(unpacked(end), expected_vectors(INPUTS), strict=True):
            assert found == pytest.approx(expected, abs=1e-6)
    facts = [fact for fact in await path.usage_events(3) if fact.operation == "embeddings"]
    assert [(f.outcome, f.prompt_tokens, f.completion_tokens, f.prefill_ran) for f in facts] == [  # type: ignore[union-attr]
        ("succeeded", sum(map(len, INPUTS)), 0, True)
    ] * 2
    assert path.voids == []


async def test_an_embedding_job_whose_worker_died_is_computed_anew_and_reported_once(path: Path_) -> None:
    first = path.worker(step_s=0.6)
    stream = await submit_inputs(path)
    reading = asyncio.create_task(read(stream))
    while stream.owned.attempt < 1:
        await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)  # some vectors are made, and lost with it
    assert not stream.owned.over
    first.kill()
    path.worker(step_s=0.005)
    _, _, end = await asyncio.wait_for(reading, 30)
    assert end.outcome == "succeeded"
    assert unpacked(end)[-1] == pytest.approx(expected_vectors(INPUTS)[-1], abs=1e-6)
    assert len(end.embeddings) == len(INPUTS)
    [fact] = await path.usage_events(1)
    assert isinstance(fact, JobUsage)
    assert (fact.attempt, fact.prompt_tokens, fact.completion_tokens) == (2, sum(map(len, INPUTS)), 0)


async def test_an_embedding_job_that_is_cancelled_frees_its_places(path: Path_) -> None:
    path.worker(step_s=0.6, max_batch=4)
    stream = await submit_inputs(path)
    while stream.owned.attempt < 1:
        await asyncio.sleep(0.05)
    await asyncio.sleep(1.4)
    await stream.abandon("client_gone")
    following = await path.submit(2)
    text, _, _ = await asyncio.wait_for(read(following), 20)
    assert text == whole_text(2)
    assert [(fact.reason, fact.prompt_tokens, fact.delivered_tokens) for fact in path.voids] == [
        ("client_gone", sum(map(len, INPUTS)), 0)
    ]
    facts = {fact.job_id: fact for fact in await path.usage_events(2)}
    cancelled = facts[stream.owned.job.job_id]
    assert isinstance(cancelled, JobUsage)
    assert (cancelled.outcome, cancelled.completion_tokens, cancelled.prefill_ran) == ("cancelled", 0, True)


async def test_dimensions_cut_the_vectors_and_too_many_fail_the_job(path: Path_) -> None:
    path.worker(step_s=0.002)
    one, three = await submit_inputs(path, dimensions=1), await submit_inputs(path, dimensions=3)
    _, _, end = await asyncio.wait_for(read(one), 30)
    assert unpacked(end) == [(1.0,)] * len(INPUTS)
    _, _, end = await asyncio.wait_for(read(three), 30)
    assert (end.outcome, end.error_code, end.embeddings) == ("failed", "invalid_dimensions", ())
    outcomes = {fact.job_id: fact.outcome for fact in await path.usage_events(2)}  # type: ignore[union-attr]
    assert outcomes[three.owned.job.job_id] == "failed"


def test_undecodable_bytes_are_not_a_job() -> None:
    with pytest.raises(Exception, match="type"):
        decoder(UsageEvent).decode(b'{"type":"nonsense"}')
