"""The dead-letter queue on a real broker: everything in it is kept once, and no message comes back to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import aio_pika
import msgspec
import pytest

from services.scheduler.dead_letters import DeadLetterKeeper
from shared import topology
from shared.broker import Broker, Delivery
from shared.database import Database
from shared.messages import JobFinished, ReplyMessage
from shared.outcomes import Outcome
from tests.conftest import Vhost
from tests.unit.scheduler.test_dead_letters import JOB


@pytest.fixture
async def stack() -> Any:
    async with AsyncExitStack() as opened:
        yield opened


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_dead_messages_are_kept_owners_told_and_the_queue_is_empty_afterwards(
    vhost: Vhost, database: str, stack: AsyncExitStack
) -> None:
    broker = await Broker.open(vhost.amqp_url, "test", stack)
    tables = await Database.open(database, "roundhouse_scheduler", stack)
    owner = topology.reply_queue("gw_1")
    told: list[Delivery] = []
    await broker.subscribe(owner, ReplyMessage, told.append, prefetch=10, no_ack=True)
    job = msgspec.structs.replace(JOB, owner_queue=owner.name)
    ids_no_column_can_hold = msgspec.structs.replace(job, job_id="job\x00", owner_queue="replies.v1.gone")

    # Given a handler with a bug, a message that nobody can read, and some things put there directly
    async def has_a_bug(_delivery: Delivery) -> Outcome:
        raise ValueError("the prompt was: secret")

    queue = topology.job_queue("res_1", "live")
    # Not both at once: RabbitMQ 3.10 may close a connection with INTERNAL_ERROR when a quorum queue is declared twice
    # in the same moment.
    await broker.declare([queue])
    consuming = asyncio.create_task(broker.consume(queue, type(JOB), has_a_bug))
    await broker.publish(queue, job)
    raw = await aio_pika.connect(vhost.amqp_url)
    stack.push_async_callback(raw.close)
    exchange = (await raw.channel()).default_exchange
    await exchange.publish(aio_pika.Message(b"\xff{not json", type="job.generate.v1"), queue.name)
    await exchange.publish(aio_pika.Message(b"\x00", headers={"x-death": 5}), topology.DEAD_QUEUE)
    await exchange.publish(
        aio_pika.Message(b'{"type":"usage.job_voided.v1"}', type="usage.job_voided.v1"), topology.DEAD_QUEUE
    )
    await exchange.publish(
        aio_pika.Message(msgspec.json.encode(ids_no_column_can_hold), type="job.generate.v1"),
        topology.DEAD_QUEUE,
    )
    # When the keeper runs
    keeping = asyncio.create_task(DeadLetterKeeper(broker, tables).run())

    async def all_kept() -> bool:
        return len(await tables.fetch("SELECT 1 FROM scheduler.dead_letters")) >= 5

    await until(all_kept)
    await asyncio.sleep(0.5)
    keeping.cancel()
    consuming.cancel()
    await asyncio.wait({keeping, consuming})
    # Then each is kept once
    rows = [dict(row) for row in await tables.fetch("SELECT * FROM scheduler.dead_letters")]
    assert len(rows) == 5
    assert await broker.depth(topology.DEAD) == 0
    by_reason = {row["reason"]: row for row in rows}
    buggy = by_reason["ValueError in handler"]
    assert (buggy["job_id"], buggy["team_id"], buggy["queue"]) == ("job_1", "team_1", queue.name)
    assert any(reason.startswith("undecodable") for reason in by_reason)
    assert [bytes(row["body"]) for row in rows if row["body"] is not None] == [
        b'{"type":"usage.job_voided.v1"}'
    ]
    assert "secret" not in str(rows)
    # and the owner that still waits was told.
    (answer,) = [delivery.message for delivery in told]
    assert isinstance(answer, JobFinished)
    assert (answer.job_id, answer.attempt, answer.outcome, answer.error_code) == (
        "job_1",
        0,
        "failed",
        "dead_letter",
    )
