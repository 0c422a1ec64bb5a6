"""`shared.queue_client` on a real reply queue: what it acked before it was closed does not come again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aio_pika
import pytest

from shared.queue_client import QueueClient
from shared.teams_broker import RawDelivery
from shared.topology import TeamNames
from tests.conftest import Vhost
from tests.tcp_proxy import TcpProxy

TEAM = TeamNames("0" * 24)
REPLIES = TEAM.replies("x")
COUNT = 300
ROUNDS = 8
"""Of channels that are closed right after the acks one in five loses some, where messages were taken singly two in three."""


@pytest.fixture
async def broker(vhost: Vhost) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    async with await aio_pika.connect(vhost.amqp_url) as connection:
        channel = await connection.channel()
        await channel.declare_exchange(TEAM.submit_exchange, "fanout", durable=True)
        await channel.declare_queue(REPLIES.name, durable=True, arguments=dict(REPLIES.arguments))
        yield channel


async def fill(broker: aio_pika.abc.AbstractChannel, count: int = COUNT) -> None:
    await asyncio.gather(
        *(
            broker.default_exchange.publish(aio_pika.Message(str(n).encode()), REPLIES.name)
            for n in range(count)
        )
    )


async def left(broker: aio_pika.abc.AbstractChannel) -> list[int]:
    """What lies there; it stays there."""
    queue = await broker.get_queue(REPLIES.name)
    taken = []
    while (message := await queue.get(fail=False)) is not None:
        taken.append(message)
    for message in taken:
        await message.reject(requeue=True)
    return sorted(int(message.body) for message in taken)


async def read(client: QueueClient, way: str) -> AsyncIterator[RawDelivery]:
    if way == "take":
        for taken in [each async for each in client.take()]:
            yield taken
    else:
        number = 0
        async for came in client.answers():
            yield came
            number += 1
            if number == COUNT:
                return


@pytest.mark.parametrize("way", ["take", "answers"])
async def test_what_was_acked_does_not_come_again(
    vhost: Vhost, broker: aio_pika.abc.AbstractChannel, way: str
) -> None:
    for _ in range(ROUNDS):
        await fill(broker)
        async with AsyncExitStack() as stack:
            client = await QueueClient.open(vhost.amqp_url, TEAM.submit_exchange, REPLIES.name, stack)
            async for delivery in read(client, way):
                await delivery.ack()
        await asyncio.sleep(0.3)  # what comes again does so a moment later
        assert await left(broker) == []


@pytest.mark.parametrize("way", ["take", "answers"])
async def test_what_was_not_acked_lies_there_again(
    vhost: Vhost, broker: aio_pika.abc.AbstractChannel, way: str
) -> None:
    """The client looks at the queue as it closes, and takes nothing from it."""
    await fill(broker)
    async with AsyncExitStack() as stack:
        client = await QueueClient.open(vhost.amqp_url, TEAM.submit_exchange, REPLIES.name, stack)
        async for delivery in read(client, way):
            if int(delivery.body) % 10:
                await delivery.ack()
        await fill(broker, 3)
    wanted = [0, 0, 1, 2, *range(10, COUNT, 10)]
    async with asyncio.timeout(10):
        while (found := await left(broker)) != wanted and len(found) < len(wanted):
            await asyncio.sleep(0.1)
    assert found == wanted


async def test_a_client_closes_though_the_broker_does_not_answer(
    vhost: Vhost, broker: aio_pika.abc.AbstractChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.queue_client.SETTLE_TIMEOUT_S", 0.5)
    await fill(broker)
    async with TcpProxy.before(vhost.amqp_url) as proxy, AsyncExitStack() as stack:
        client = await QueueClient.open(proxy.url(vhost.amqp_url), TEAM.submit_exchange, REPLIES.name, stack)
        async for delivery in read(client, "take"):
            await delivery.ack()
        proxy.blackhole()
        async with asyncio.timeout(20):
            await stack.aclose()
