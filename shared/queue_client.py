"""A team's side of the queue, with the rights of its users: publish to the team's exchange, take what the reply queue has.

It declares nothing and does not connect again by itself: whoever uses it publishes again under the same ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

import aio_pika
import aio_pika.abc
import structlog
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelInvalidStateError

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

log = structlog.get_logger()

CONNECT_TIMEOUT_S = SETTLE_TIMEOUT_S = 10.0


class QueueClient:
    """Build it with `QueueClient.open`."""

    def __init__(self, connection: aio_pika.abc.AbstractConnection, exchange: str, reply_queue: str) -> None:
        self._connection, self._exchange, self._reply_queue = connection, exchange, reply_queue
        self._confirmed: aio_pika.abc.AbstractChannel
        self._reading: aio_pika.abc.AbstractChannel
        self._stop_consuming: Callable[[], Awaitable[object]] | None = None

    @classmethod
    async def open(cls, url: str, exchange: str, reply_queue: str, stack: AsyncExitStack) -> QueueClient:
        """Connect, and close with `stack`. Raises `Unavailable`."""
        async with in_time("cannot connect to the queue"):
            connection = await aio_pika.connect(url, timeout=CONNECT_TIMEOUT_S)
            stack.push_async_callback(connection.close)
            client = cls(connection, exchange, reply_queue)
            client._confirmed = await connection.channel(publisher_confirms=True, on_return_raises=True)
            client._reading = await connection.channel(publisher_confirms=False)
            stack.push_async_callback(client._close_reading)
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
            tag = await queue.consume(came.put)
            self._stop_consuming = partial(queue.cancel, tag)
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

    async def _close_reading(self) -> None:
        """Wait until the broker has taken note of every ack, and close.

        Acks have no answer. The broker's channel passes 32 of them on to a quorum queue; the others wait until the queue has
        noted these, and are lost with the channel, although it was closed in order. But the queue answers in turn, and the
        channel handles what came before an answer first: after one answer all acks are on their way, after two they are noted.
        """
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                if self._stop_consuming is not None:
                    await self._stop_consuming()
                queue = await self._reading.get_queue(self._reply_queue, ensure=False)
                for _ in range(2):
                    await queue.get(fail=False)  # what this takes lies there again afterwards
        except (TimeoutError, ChannelInvalidStateError, *CONNECTION_EXCEPTIONS) as error:
            log.warning(
                "acks_unsure",
                queue=self._reply_queue,
                error=type(error).__name__,
                effect="what was taken may come again",
            )
        await close_channel(self._reading)


def _delivery(raw: aio_pika.abc.AbstractIncomingMessage) -> RawDelivery:
    return RawDelivery(raw.body, raw.reply_to, raw.message_id, None, raw)
