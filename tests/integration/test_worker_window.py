"""How jobs spread over the workers of a resource: what one holds and does not begin, others get."""

from __future__ import annotations

import asyncio
from collections import Counter

from shared.messages import JobUsage
from tests.integration.test_job_path import Path_, path, read, whole_text

__all__ = ["path"]  # the fixture


async def test_a_second_worker_does_its_share_of_the_jobs_that_wait(path: Path_) -> None:
    path.worker(step_s=0.02, max_batch=4)
    streams = [await path.submit(100) for _ in range(64)]
    reads = [asyncio.create_task(read(stream)) for stream in streams]
    while not any(stream.owned.attempt for stream in streams):
        await asyncio.sleep(0.02)
    second = path.worker(step_s=0.02, max_batch=4)
    while '"phase": "ready"' not in second.log.read_text():
        await asyncio.sleep(0.02)
    left = sum(not stream.owned.attempt for stream in streams)
    results = await asyncio.wait_for(asyncio.gather(*reads), 60)
    assert all(text == whole_text(100) for text, _, _ in results)
    facts = [fact for fact in await path.usage_events(64) if isinstance(fact, JobUsage)]
    done = Counter(fact.worker_id for fact in facts)
    # What the first does while the second starts is not the window's doing.
    assert left >= 24
    assert 0.4 * left <= done[second.spec.worker_id] <= 0.6 * left


async def test_what_a_worker_does_not_begin_in_time_another_gets(path: Path_) -> None:
    path.worker(step_s=0.02, max_batch=1, environment={"ROUNDHOUSE_WORKER_HOLD_S": "1"})
    long = await path.submit(900)
    reading = asyncio.create_task(read(long))
    while not long.owned.attempt:
        await asyncio.sleep(0.02)
    short = [asyncio.create_task(read(await path.submit(5))) for _ in range(3)]
    path.worker(step_s=0.02, max_batch=1)
    results = await asyncio.wait_for(asyncio.gather(*short), 60)
    assert all(text == whole_text(5) and end.outcome == "succeeded" for text, _, end in results)
    assert not reading.done()
    text, _, _ = await asyncio.wait_for(reading, 60)
    assert text == whole_text(900)


async def test_what_a_lone_worker_gives_back_is_not_lost(path: Path_) -> None:
    path.worker(step_s=0.02, max_batch=1, environment={"ROUNDHOUSE_WORKER_HOLD_S": "1"})
    streams = [await path.submit(tokens) for tokens in (200, 5, 5, 5)]
    results = await asyncio.wait_for(asyncio.gather(*map(read, streams)), 60)
    assert [text for text, _, _ in results] == [whole_text(tokens) for tokens in (200, 5, 5, 5)]
    assert "job_given_back" in path.workers[0].log.read_text()
    assert len([fact for fact in await path.usage_events(4) if isinstance(fact, JobUsage)]) == 4
