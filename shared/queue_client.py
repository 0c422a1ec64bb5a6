"""A team's side of the queue, with the rights of its users: publish to the team's exchange, take what the reply queue has.

It declares nothing and does not connect again by itself: whoever uses it publishes again under the same ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aio_pika
import aio_pika.abc

from shared.broker import (
    PERSISTENT,
    PUBLISH_TIMEOUT_S,
    Address,
    Properties,
    close_channel,
    in_time,
    publish_confirmed,
)
from shared.outcomes import Unavailable
from shared.teams_broker import RawDelivery

CONNECT_TIMEOUT_S = 10.0


class QueueClient:
    """Build it with `QueueClient.open`."""

    def __init__(self, connection: aio_pika.abc.AbstractConnection, exchange: str, reply_queue: str) -> None:
        self._connection, self._exchange, self._reply_queue = connection, exchange, reply_queue
        self._confirmed: aio_pika.abc.AbstractChannel
        self._reading: aio_pika.abc.AbstractChannel

    @classmethod
    async def open(cls, url: str, exchange: str, reply_queue: str, stack: AsyncExitStack) -> QueueClient:
        """Connect, and close with `stack`. Raises `Unavailable`."""
        async with in_time("cannot connect to the queue"):
            connection = await aio_pika.connect(url, timeout=CONNECT_TIMEOUT_S)
            stack.push_async_callback(connection.close)
            client = cls(connection, exchange, reply_queue)
            client._confirmed = await connection.channel(publisher_confirms=True, on_return_raises=True)
            client._reading = await connection.channel(publisher_confirms=False)
            # Before the connection, and waited for: else acks that are on their way are lost with it.
            stack.push_async_callback(close_channel, client._reading)
        return client

    async def publish(self, body: bytes) -> None:
        """Publish durably and wait for the confirm; raises as `Broker.publish`."""
        properties = Properties(
            content_type="application/json", reply_to=self._reply_queue, delivery_mode=PERSISTENT
        )
        address = Address(self._exchange, "")
        await publish_confirmed(self._confirmed, address, body, properties, PUBLISH_TIMEOUT_S)

    async def answers(self) -> AsyncIterator[RawDelivery]:
        """What the reply queue has and what comes. What is not acked lies there again afterwards. Raises `Unavailable`."""
        came: asyncio.Queue[aio_pika.abc.AbstractIncomingMessage | None] = asyncio.Queue()
        self._connection.close_callbacks.add(lambda *_: came.put_nowait(None))
        async with in_time(f"cannot read {self._reply_queue}"):
            queue = await self._reading.get_queue(self._reply_queue, ensure=False)
            await queue.consume(came.put)
        while (raw := await came.get()) is not None:
            yield _delivery(raw)
        raise Unavailable("the connection to the queue is lost")

    async def take(self) -> AsyncIterator[RawDelivery]:
        """What the reply queue has now, until it is empty; it may be acked as long as the client is open. Raises `Unavailable`."""
        async with in_time(f"cannot read {self._reply_queue}"):
            queue = await self._reading.get_queue(self._reply_queue, ensure=False)
        while True:
            async with in_time(f"cannot read {self._reply_queue}"):
                raw = await queue.get(fail=False)
            if raw is None:
                return
            yield _delivery(raw)


def _delivery(raw: aio_pika.abc.AbstractIncomingMessage) -> RawDelivery:
    return RawDelivery(raw.body, raw.reply_to, raw.message_id, None, raw)
