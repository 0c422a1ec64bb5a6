"""Ends on their way to owners: together where they come together, and none held up by another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from services.worker.outgoing import FinishSender
from shared.broker import Broker
from shared.messages import JobFinished, Message, Timings
from shared.outcomes import PublishRefused, Unroutable

OWNER, GONE = "replies.v1.gw_1", "replies.v1.gw_gone"


def end(job_id: str) -> JobFinished:
    return JobFinished(
        job_id=job_id, attempt=1, worker_id="wrk_1", outcome="succeeded", choices=[], timings=Timings()
    )


class RefusingBroker:
    """Refuses what holds the job "large"; knows one owner."""

    def __init__(self) -> None:
        self.published: list[list[str]] = []

    async def publish(self, queue: str, *messages: Message) -> None:
        await asyncio.sleep(0)
        if queue == GONE:
            raise Unroutable(queue)
        job_ids = [message.job_id for message in messages if isinstance(message, JobFinished)]
        if "large" in job_ids:
            raise PublishRefused("too large")
        self.published.append(job_ids)


@asynccontextmanager
async def running(broker: RefusingBroker) -> AsyncIterator[FinishSender]:
    sender = FinishSender(cast(Broker, broker))
    task = asyncio.create_task(sender.run())
    yield sender
    task.cancel()


async def test_ends_of_one_step_travel_together_and_each_is_told() -> None:
    broker = RefusingBroker()
    async with running(broker) as sender:
        await asyncio.gather(*(sender.tell(OWNER, end(job_id)) for job_id in "abc"))
        await sender.tell(OWNER, end("d"))
    assert broker.published == [["a", "b", "c"], ["d"]]


async def test_an_end_that_is_refused_holds_up_no_other() -> None:
    broker = RefusingBroker()
    async with running(broker) as sender:
        stuck = asyncio.create_task(sender.tell(OWNER, end("large")))
        await asyncio.gather(sender.tell(OWNER, end("a")), sender.tell(OWNER, end("b")))
        assert not stuck.done()
        stuck.cancel()
    assert broker.published == [["a"], ["b"]]


async def test_an_owner_that_is_gone_needs_no_end() -> None:
    broker = RefusingBroker()
    async with running(broker) as sender:
        await asyncio.gather(sender.tell(GONE, end("a")), sender.tell(GONE, end("b")))
    assert broker.published == []
