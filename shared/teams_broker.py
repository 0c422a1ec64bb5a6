"""The door to the teams' vhost, for our own side, which declares and reads everything there.

Bodies are bytes here: what comes from a team is judged by whoever takes it. As in `broker.py`, consuming and publishing have
a connection each, and callbacks only hand a message over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aio_pika
import aio_pika.abc
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelInvalidStateError

from shared import topology
from shared.amqp_decoding import read_whatever_comes
from shared.broker import (
    PERSISTENT,
    PUBLISH_TIMEOUT_S,
    Address,
    Properties,
    Subscription,
    ack,
    close_channel,
    close_quietly,
    connect,
    in_time,
    publish_confirmed,
)

CONNECT_TIMEOUT_S = 10.0


@dataclass(slots=True, eq=False)
class RawDelivery:
    """One message as its sender wrote it. Whoever holds it acks it once, when its effect is done."""

    body: bytes
    reply_to: str | None
    message_id: str | None
    correlation_id: str | None
    _raw: aio_pika.abc.AbstractIncomingMessage

    async def ack(self) -> None:
        """Ack; a lost connection is no error: the message comes again, and effects are idempotent."""
        try:
            await ack(self._raw)
        except (ChannelInvalidStateError, *CONNECTION_EXCEPTIONS):
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is published to a queue. `message_id` is the same whenever the same thing is told again."""

    queue: str
    kind: str
    body: bytes
    message_id: str
    correlation_id: str | None


class TeamsBroker:
    """Our own side. Build it with `TeamsBroker.open`."""

    def __init__(
        self,
        consuming: aio_pika.abc.AbstractRobustConnection,
        publishing: aio_pika.abc.AbstractRobustConnection,
    ) -> None:
        self._consuming, self._publishing = consuming, publishing
        self._confirmed: aio_pika.abc.AbstractRobustChannel
        self._declaring: aio_pika.abc.AbstractRobustChannel

    @classmethod
    async def open(cls, url: str, name: str, stack: AsyncExitStack) -> TeamsBroker:
        """Connect, and close with `stack`. Raises `Unavailable`."""
        read_whatever_comes()
        connections = []
        for role in ("consume", "publish"):
            connection = await connect(url, f"{name}:teams:{role}", CONNECT_TIMEOUT_S)
            stack.push_async_callback(close_quietly, connection)
            connections.append(connection)
        broker = cls(*connections)
        async with in_time("cannot open channels"):
            broker._confirmed = await broker._publishing.channel(
                publisher_confirms=True, on_return_raises=True
            )
            broker._declaring = await broker._publishing.channel()
        return broker

    async def declare(self, team: topology.TeamNames, users: Iterable[str]) -> None:
        """Declare what a team has, with reply queues for these users. Raises `Unavailable`."""
        async with in_time(f"cannot declare the queues of {team.tag}"):
            exchange = await self._declaring.declare_exchange(team.submit_exchange, "fanout", durable=True)
            for queue in team.queues(users):
                declared = await self._declaring.declare_queue(
                    queue.name, durable=True, arguments=dict(queue.arguments)
                )
                if queue == team.submissions:
                    await declared.bind(exchange)

    async def delete(self, queue: topology.Queue) -> None:
        """Delete a queue with what is in it. Idempotent. Raises `Unavailable`."""
        async with in_time(f"cannot delete {queue.name}"):
            await self._declaring.queue_delete(queue.name)

    async def subscribe(
        self, queue: topology.Queue, receive: Callable[[RawDelivery], None], *, prefetch: int
    ) -> Subscription:
        """Hand each message to `receive` (quick, synchronous), which leaves its settling to the holder. Raises `Unavailable`."""

        async def on_message(raw: aio_pika.abc.AbstractIncomingMessage) -> None:
            receive(RawDelivery(raw.body, raw.reply_to, raw.message_id, _text(raw.correlation_id), raw))

        async with AsyncExitStack() as stack, in_time(f"cannot consume {queue.name}"):
            channel = await self._consuming.channel(publisher_confirms=False)
            stack.push_async_callback(close_channel, channel)
            await channel.set_qos(prefetch_count=prefetch)
            declared = await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
            tag = await declared.consume(on_message)
            stack.pop_all()  # it worked: the channel stays open
        return Subscription(declared, channel, tag)

    async def publish(self, answer: Answer) -> None:
        """Publish durably and wait for the confirm; raises as `Broker.publish`."""
        properties = Properties(
            message_type=answer.kind,
            content_type="application/json",
            message_id=answer.message_id,
            correlation_id=answer.correlation_id,
            delivery_mode=PERSISTENT,
        )
        address = Address("", answer.queue)
        await publish_confirmed(self._confirmed, address, answer.body, properties, PUBLISH_TIMEOUT_S)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
