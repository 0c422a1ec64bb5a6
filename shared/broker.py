"""With `teams_broker.py` and `queue_client.py` the only importer of aio_pika: connect, declare, publish, consume.

Three connections per process. Under a memory or disk alarm the broker stops reading from connections that publish, so
consuming, durable publishing and transient publishing never share one. Durable publishes are persistent, mandatory,
confirmed and limited in time. Work never runs inside a delivery callback: aio_pika cancels a running
callback when its connection drops, so callbacks only put the delivery into a queue that a task of ours reads.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import aio_pika
import aio_pika.abc
import aiormq
import msgspec
import structlog
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    DeliveryError,
    PublishError,
)
from opentelemetry.trace import SpanKind
from pamqp.commands import Basic

from shared import telemetry, topology
from shared.messages import (
    MAX_MESSAGE_BYTES,
    Message,
    decoder,
    encode,
    encode_together,
    together_decoder,
    type_of,
)
from shared.outcomes import (
    Done,
    Dropped,
    Outcome,
    PublishRefused,
    PublishUnknown,
    Rejected,
    RetryLater,
    Unavailable,
    Unroutable,
)

log = structlog.get_logger()

HEARTBEAT_S = 10
RECONNECT_INTERVAL_S = 0.5
PUBLISH_TIMEOUT_S = 5.0
STATIC_TRIES = 4
BURY_RETRY_S = 1.0
CLOSE_TIMEOUT_S = 1.0
"""Closing a channel is a courtesy; on a connection that is frozen the heartbeat ends all of them."""

PERSISTENT, TRANSIENT = int(aio_pika.DeliveryMode.PERSISTENT), int(aio_pika.DeliveryMode.NOT_PERSISTENT)

Properties: TypeAlias = Basic.Properties
TOGETHER = "together.v1"
"""The AMQP `type` of several messages."""

Handler = Callable[["Delivery"], Awaitable[Outcome]]


@dataclass(slots=True, eq=False)
class Delivery:
    """One message taken from a queue. Whoever holds it acks it once, when its effect is done."""

    message: Any
    headers: Mapping[str, Any]
    queue: str
    redelivered: bool
    _raw: aio_pika.abc.AbstractIncomingMessage | None
    message_type: str = ""
    """The AMQP `type` property as it came."""
    is_settled: bool = False

    async def ack(self) -> None:
        """Ack; a lost connection is no error here: the broker delivers again, and effects are idempotent."""
        if self._raw is None or self.is_settled:
            return
        self.is_settled = True
        try:
            await ack(self._raw)
        except (ChannelInvalidStateError, *CONNECTION_EXCEPTIONS) as error:
            log.debug("ack_lost", queue=self.queue, error=type(error).__name__)


async def ack(raw: aio_pika.abc.AbstractIncomingMessage) -> None:
    """Raises what means a lost connection.

    Waits for the socket, whose loss ends the wait. Acks that did not would fill what a dead connection was to write, and the
    next one would wait for room there for ever.
    """
    if raw.delivery_tag is not None:
        await raw.channel.basic_ack(raw.delivery_tag)


@dataclass(frozen=True, slots=True)
class Address:
    """exchange: empty for the default one, whose keys are queues' names."""

    exchange: str
    key: str


class Subscription:
    """A consumer on one queue; `cancel` stops deliveries, what was delivered before stays to be settled."""

    def __init__(
        self,
        queue: aio_pika.abc.AbstractQueue,
        channel: aio_pika.abc.AbstractChannel,
        tag: str,
        forget: Callable[[Subscription], None] | None = None,
    ) -> None:
        self._queue = queue
        self._channel = channel
        self._tag = tag
        self._forget = forget or (lambda _: None)
        self.cancelled = False

    async def cancel(self) -> None:
        if self.cancelled:
            return
        self.cancelled = True
        self._forget(self)
        try:
            with cancellation_kept():
                await self._queue.cancel(self._tag, timeout=PUBLISH_TIMEOUT_S)
        except (TimeoutError, ChannelInvalidStateError, *CONNECTION_EXCEPTIONS) as error:
            log.info("consumer_cancel_lost", queue=self._queue.name, error=type(error).__name__)

    async def close(self) -> None:
        """Close its channel: what it delivered and nobody settled is delivered again, to somebody else."""
        self._forget(self)
        await close_channel(self._channel)


class Broker:
    """A process's door to RabbitMQ. Build it with `Broker.open` inside the process's exit stack."""

    def __init__(
        self,
        consuming: aio_pika.abc.AbstractRobustConnection,
        publishing: aio_pika.abc.AbstractRobustConnection,
        transient: aio_pika.abc.AbstractRobustConnection,
    ) -> None:
        self._consuming = consuming
        self._publishing = publishing
        self._transient = transient
        self._confirmed: aio_pika.abc.AbstractRobustChannel
        self._unconfirmed: aio_pika.abc.AbstractRobustChannel
        self._declaring: aio_pika.abc.AbstractRobustChannel
        self._away = False
        self._open: set[Subscription] = set()
        """The client library knows its channels weakly: what nobody refers to while it is cut off is never restored."""
        self._as_they_are: set[str] = set()
        """Names of queues with other arguments than ours."""
        self._connected_since_s: float | None = time.monotonic()

    @classmethod
    async def open(cls, url: str, name: str, stack: AsyncExitStack, *, timeout_s: float = 30.0) -> Broker:
        """Connect, declare the static topology, and close with `stack`. Raises `Unavailable` after `timeout_s`."""
        connections = []
        for role in ("consume", "publish", "transient"):
            connection = await connect(url, f"{name}:{role}", timeout_s)
            stack.push_async_callback(close_quietly, connection)
            connections.append(connection)
        broker = cls(*connections)
        await broker._open_channels()
        await broker._declare_static()
        return broker

    async def _declare_static(self) -> None:
        """All services declare the same queues, at a first start in the same moment: RabbitMQ 3.10 may then answer one
        of them with INTERNAL_ERROR and close its connection. Once the queues exist, declaring them is harmless."""
        for _ in range(STATIC_TRIES - 1):
            try:
                return await self.declare(topology.STATIC_QUEUES)
            except Unavailable as error:
                log.warning("topology_declared_again", error=str(error))
                await asyncio.sleep(random.uniform(0.5, 2.0))
        await self.declare(topology.STATIC_QUEUES)

    async def _open_channels(self) -> None:
        async with in_time("cannot open channels"):
            # Without on_return_raises a message to a missing queue is lost with a normal return value.
            self._confirmed = await self._publishing.channel(publisher_confirms=True, on_return_raises=True)
            self._unconfirmed = await self._transient.channel(publisher_confirms=False)
            self._declaring = await self._publishing.channel()
            await self._declaring.declare_exchange(topology.EVENTS_EXCHANGE, "topic", durable=True)
        self._consuming.reconnect_callbacks.add(self._on_reconnect)
        self._consuming.close_callbacks.add(self._on_close)

    @property
    def connected(self) -> bool:
        """Whether all three connections are up at this moment, and what publishes on them is open again."""
        return all(
            not c.is_closed and c.connected.is_set() and not c.reconnecting
            for c in (self._consuming, self._publishing, self._transient)
        ) and not any(c.is_closed for c in (self._confirmed, self._unconfirmed, self._declaring))

    def connected_for_s(self) -> float:
        """Seconds since the consuming connection last came up; 0 while it is down."""
        # The connection counts as up a moment before its channels are restored: until then it is still "lost" here.
        since_s = self._connected_since_s
        return time.monotonic() - since_s if since_s is not None and self.connected else 0.0

    def _on_close(self, _connection: Any, error: BaseException | None) -> None:
        self._connected_since_s = None
        # Called for each failed attempt to reconnect as well, and, with a CancelledError, when we close it ourselves.
        if not self._away and not isinstance(error, asyncio.CancelledError):
            self._away = True
            log.warning("broker_connection_lost", error=type(error).__name__)

    def _on_reconnect(self, *_: Any) -> None:
        self._connected_since_s = time.monotonic()
        self._away = False
        log.info("broker_reconnected")

    async def declare(self, queues: Iterable[topology.Queue]) -> None:
        """Declare queues and their bindings. Other arguments under the same name raise (406): never delete to mend.

        Only the dead-letter queue is taken as it is: its name stands in the arguments of others, so that it has no other version.
        """
        for queue in queues:
            if queue.name == topology.DEAD_QUEUE and await self._has_other_arguments(queue):
                self._as_they_are.add(queue.name)
                log.warning(
                    "queue_has_other_arguments",
                    queue=queue.name,
                    action="stop all services, delete it while it is empty, and start them again",
                )
            await self._declare_on(self._declaring, queue)

    async def _has_other_arguments(self, queue: topology.Queue) -> bool:
        """Of a queue that is there. On a channel of its own, which the broker closes if so."""
        async with AsyncExitStack() as stack, in_time(f"cannot declare {queue.name}"):
            channel = await self._publishing.channel()
            stack.push_async_callback(close_channel, channel)
            try:
                arguments = dict(queue.arguments)
                await channel.declare_queue(queue.name, durable=True, arguments=arguments, robust=False)
            except ChannelPreconditionFailed:
                return True
        return False

    async def _declare_on(
        self, channel: aio_pika.abc.AbstractChannel, queue: topology.Queue
    ) -> aio_pika.abc.AbstractQueue:
        async with in_time(f"cannot declare {queue.name}"):
            declared = await channel.declare_queue(
                queue.name,
                durable=True,
                arguments=dict(queue.arguments),
                passive=queue.name in self._as_they_are,
            )
            for key in queue.bindings:
                await declared.bind(topology.EVENTS_EXCHANGE, key)
        return declared

    async def depth(self, queue: topology.Queue) -> int:
        """Return the number of ready messages. Raises `Unavailable`; a missing queue is declared and counts 0."""
        declared = await self._declare_on(self._declaring, queue)
        return int(declared.declaration_result.message_count or 0)

    async def ready_messages(self, queue_names: Sequence[str]) -> dict[str, int]:
        """Return how many messages are ready in each queue; 0 for one that does not exist. Raises `Unavailable`."""
        counts = dict.fromkeys(queue_names, 0)
        async with AsyncExitStack() as stack, in_time("cannot count messages"):
            channel: aio_pika.abc.AbstractChannel | None = None
            for name in queue_names:
                if channel is None:
                    channel = await self._publishing.channel()
                    stack.push_async_callback(close_channel, channel)
                try:
                    queue = await channel.declare_queue(name, passive=True)
                except ChannelNotFoundEntity:
                    channel = None  # the broker closes it for a queue that is missing
                else:
                    counts[name] = int(queue.declaration_result.message_count or 0)
        return counts

    async def delete(self, queue: topology.Queue) -> None:
        """Delete a queue with what is in it. Idempotent. Raises `Unavailable`."""
        async with in_time(f"cannot delete {queue.name}"):
            await self._declaring.queue_delete(queue.name)

    async def consumers(self, queue_name: str) -> int:
        """Return how many consumers a queue has; 0 for a queue that does not exist. Raises `Unavailable`."""
        async with AsyncExitStack() as stack, in_time(f"cannot look at {queue_name}"):
            # A channel of its own: a passive declare of a missing queue closes the channel.
            channel = await self._publishing.channel()
            stack.push_async_callback(close_channel, channel)
            try:
                queue = await channel.declare_queue(queue_name, passive=True)
            except ChannelNotFoundEntity:
                return 0
            return int(queue.declaration_result.consumer_count or 0)

    async def publish(
        self,
        queue: topology.Queue | str,
        *messages: Message,
        timeout_s: float = PUBLISH_TIMEOUT_S,
    ) -> None:
        """Publish durably and wait for the broker's confirm.

        Several messages travel together, for a queue that is read without acks; after an error any of them may be in it.

        Raises `PublishUnknown` (no answer in time: it may be in the queue), `PublishRefused` (queue full),
        `Unroutable` (no such queue), `Unavailable` (not connected; certainly not sent).
        """
        name = queue if isinstance(queue, str) else queue.name
        with telemetry.span(f"send {name}", kind=SpanKind.PRODUCER, attributes=_messaging(name, "send")):
            for body in encode_together(messages):
                await self._publish_confirmed(Address("", name), _kind(messages), body, timeout_s)

    async def publish_event(self, message: Message, *, timeout_s: float = PUBLISH_TIMEOUT_S) -> None:
        """Publish a fact to the events exchange under its type, durably and confirmed; raises like `publish`."""
        address = Address(topology.EVENTS_EXCHANGE, type_of(message))
        await self._publish_confirmed(address, type_of(message), encode(message), timeout_s)

    async def _publish_confirmed(self, address: Address, kind: str, body: bytes, timeout_s: float) -> None:
        if len(body) > MAX_MESSAGE_BYTES:
            raise PublishRefused(f"message of {len(body)} bytes is over {MAX_MESSAGE_BYTES}")
        properties = _properties(kind, PERSISTENT, telemetry.inject_headers())
        await publish_confirmed(self._confirmed, address, body, properties, timeout_s)

    async def send(self, queue: topology.Queue | str, *messages: Message) -> None:
        """Publish transient messages without a confirm; they are lost if no such queue exists (any more).

        Several travel together, for a queue that is read without acks.

        Not mandatory: without confirms the client library cannot tell which message came back. Whoever must know
        that a receiver is gone asks `consumers`. Raises `Unavailable` when not connected.
        """
        name = queue if isinstance(queue, str) else queue.name
        for body in encode_together(messages):
            await self._send(Address("", name), _kind(messages), body)

    async def send_event(self, message: Message) -> None:
        """Publish a transient fact (reports, heartbeats) to the events exchange, without a confirm."""
        address = Address(topology.EVENTS_EXCHANGE, type_of(message))
        await self._send(address, type_of(message), encode(message))

    async def _send(self, address: Address, kind: str, body: bytes) -> None:
        if not self.connected:
            raise Unavailable("not connected")
        async with in_time(f"not sent to {address.key}"):
            properties = _properties(kind, TRANSIENT, None)
            await _publish(self._unconfirmed, address, body, properties, mandatory=False)

    async def subscribe(
        self,
        queue: topology.Queue,
        of: Any,
        receive: Callable[[Delivery], None],
        *,
        prefetch: int,
        no_ack: bool = False,
    ) -> Subscription:
        """Hand each decoded message to `receive` (quick, synchronous) and leave its settling to the holder.

        An undecodable message goes to the dead-letter queue with the reason and is acked; `receive` never sees it.
        With `of` None messages are the bodies as they came: for the dead-letter queue itself, which would otherwise
        feed itself for ever. Raises `Unavailable`.
        """
        decode: Callable[[bytes], Any] = bytes
        if of is not None:
            # What travels together could not be acked one by one.
            decode = (together_decoder(of) if no_ack else decoder(of)).decode

        async def on_message(raw: aio_pika.abc.AbstractIncomingMessage) -> None:
            try:
                message = decode(raw.body)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                log.error("message_undecodable", queue=queue.name, error=str(error), message_type=raw.type)
                if not no_ack:
                    await self._bury_and_ack(raw, queue.name, f"undecodable: {error}")
                return
            held = None if no_ack else raw
            for each in message if isinstance(message, list) else (message,):
                receive(Delivery(each, raw.headers, queue.name, bool(raw.redelivered), held, raw.type or ""))

        async with AsyncExitStack() as stack, in_time(f"cannot consume {queue.name}"):
            channel = await self._consuming.channel(publisher_confirms=False)
            stack.push_async_callback(close_channel, channel)
            await channel.set_qos(prefetch_count=prefetch)
            declared = await self._declare_on(channel, queue)
            tag = await declared.consume(on_message, no_ack=no_ack)
            stack.pop_all()  # it worked: the channel stays open
        subscription = Subscription(declared, channel, tag, self._open.discard)
        self._open.add(subscription)
        return subscription

    async def consume(self, queue: topology.Queue, of: Any, handler: Handler, *, prefetch: int = 16) -> None:
        """Run `handler` for each message until cancelled, at most `prefetch` at once; settle by its outcome.

        The order of the stack: decode (dead-letter), trace context, handler, outcome, ack. A handler that raises
        anything but `Unavailable` has a bug: the message goes to the dead-letter queue, the service goes on.
        """
        waiting: asyncio.Queue[Delivery] = asyncio.Queue()
        subscription = await self.subscribe(queue, of, waiting.put_nowait, prefetch=prefetch)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(prefetch):
                    group.create_task(self._settle_each(waiting, handler))
        finally:
            await asyncio.shield(subscription.cancel())

    async def _settle_each(self, waiting: asyncio.Queue[Delivery], handler: Handler) -> None:
        while True:
            await self.settle(await waiting.get(), handler)

    async def settle(self, delivery: Delivery, handler: Handler) -> None:
        """Call `handler` until it ends in something else than `RetryLater`, then ack (or bury and ack)."""
        pause_s = 0.2
        while True:
            outcome = await self._outcome(delivery, handler)
            match outcome:
                case Done():
                    break
                case Dropped(reason):
                    log.info("message_dropped", queue=delivery.queue, reason=reason)
                    break
                case Rejected(reason):
                    if delivery._raw is None or await self._bury(delivery._raw, delivery.queue, reason):
                        break
                    await asyncio.sleep(BURY_RETRY_S)
                case RetryLater(reason, after_s):
                    log.warning(
                        "message_retry", queue=delivery.queue, reason=reason, after_s=max(after_s, pause_s)
                    )
                    await asyncio.sleep(max(after_s, pause_s))
                    pause_s = min(pause_s * 2, 15.0)
        await delivery.ack()

    async def _outcome(self, delivery: Delivery, handler: Handler) -> Outcome:
        with telemetry.remote_context(delivery.headers):
            try:
                return await handler(delivery)
            except Unavailable as error:
                return RetryLater(str(error))
            except Exception as error:
                log.exception("handler_failed", queue=delivery.queue)
                return Rejected(f"{type(error).__name__} in handler")

    async def _bury_and_ack(self, raw: aio_pika.abc.AbstractIncomingMessage, queue: str, reason: str) -> None:
        """Try until it worked: nobody else holds the message. If its connection drops it comes again."""
        while True:
            if await self._bury(raw, queue, reason):
                return await Delivery(None, {}, queue, False, raw).ack()
            await asyncio.sleep(BURY_RETRY_S)

    async def _bury(self, raw: aio_pika.abc.AbstractIncomingMessage, queue: str, reason: str) -> bool:
        headers = dict(raw.headers) | {"x-dead-reason": reason[:500], "x-dead-from": queue}
        properties = Properties(
            headers=headers, message_type=raw.type, content_type=raw.content_type, delivery_mode=PERSISTENT
        )
        try:
            with cancellation_kept():
                async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                    await _publish(
                        self._confirmed,
                        Address("", topology.DEAD_QUEUE),
                        raw.body,
                        properties,
                        mandatory=True,
                    )
        except (TimeoutError, ChannelInvalidStateError, *CONNECTION_EXCEPTIONS) as error:
            log.error("message_not_buried", queue=queue, error=type(error).__name__)
            return False
        log.error("message_buried", queue=queue, reason=reason)
        return True


async def connect(url: str, name: str, timeout_s: float) -> aio_pika.abc.AbstractRobustConnection:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with cancellation_kept():
                return await aio_pika.connect_robust(
                    url,
                    timeout=5,
                    heartbeat=HEARTBEAT_S,
                    reconnect_interval=RECONNECT_INTERVAL_S,
                    client_properties={"connection_name": name},
                )
        except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
            if time.monotonic() > deadline_s:
                raise Unavailable(f"cannot reach the broker: {type(error).__name__}: {error}") from error
            await asyncio.sleep(RECONNECT_INTERVAL_S)


async def publish_confirmed(
    channel: aio_pika.abc.AbstractChannel,
    address: Address,
    body: bytes,
    properties: Properties,
    timeout_s: float,
) -> None:
    """Publish on a channel with confirms that raises on return; see `Broker.publish` for what is raised."""
    key = address.key
    try:
        # The library's own time-out does not cover its wait for a connection.
        with cancellation_kept():
            async with asyncio.timeout(timeout_s):
                await _publish(channel, address, body, properties, mandatory=True)
    except TimeoutError as error:
        raise PublishUnknown(f"no confirm for {key} within {timeout_s} s") from error
    except PublishError as error:
        raise Unroutable(key) from error
    except DeliveryError as error:
        raise PublishRefused(f"{key} refused the message") from error
    except ChannelInvalidStateError as error:
        raise Unavailable(f"not connected: {error}") from error
    except CONNECTION_EXCEPTIONS as error:
        # The connection went down while we waited for the confirm.
        raise PublishUnknown(f"connection lost while publishing to {key}") from error


async def _publish(
    channel: aio_pika.abc.AbstractChannel,
    address: Address,
    body: bytes,
    properties: Properties,
    *,
    mandatory: bool,
) -> None:
    """As the library's exchange does it, without its message object, which takes longer to make than all else here.

    Where a confirm comes the socket is not waited for; where none comes it is, so that a process that ends has said its last word.
    """
    if channel.is_closed:
        raise ChannelInvalidStateError("closed")
    underlay = cast(aiormq.Channel, await channel.get_underlay_channel())
    await underlay.basic_publish(
        body,
        exchange=address.exchange,
        routing_key=address.key,
        properties=properties,
        mandatory=mandatory,
        wait=not underlay.publisher_confirms,
    )


@contextmanager
def cancellation_kept() -> Iterator[None]:
    """Whatever the body ends with: if its task was cancelled meanwhile, it ends with that.

    The library turns a cancellation that comes as a connection is lost into the loss. Who took that for a reason to try again
    would go on for ever.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        yield
    except Exception as error:
        if task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task.cancelling() > before:
        raise asyncio.CancelledError


@asynccontextmanager
async def in_time(failing: str) -> AsyncIterator[None]:
    """Bound the body, and turn what means that the broker is away into `Unavailable`.

    The library's own time-outs cover the answer only: it waits without end for a connection and for new channels.
    """
    try:
        with cancellation_kept():
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                yield
    except ChannelPreconditionFailed:
        raise  # other arguments: the next try would end the same way, so it must not look like an absence
    except (TimeoutError, ChannelInvalidStateError, *CONNECTION_EXCEPTIONS) as error:
        raise Unavailable(f"{failing}: {error or type(error).__name__}") from error


async def close_channel(channel: aio_pika.abc.AbstractChannel) -> None:
    try:
        with cancellation_kept():
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await channel.close()
    except (TimeoutError, ChannelInvalidStateError, *CONNECTION_EXCEPTIONS) as error:
        log.info("channel_close_lost", error=type(error).__name__)


async def close_quietly(connection: aio_pika.abc.AbstractRobustConnection) -> None:
    try:
        with cancellation_kept():
            async with asyncio.timeout(5.0):
                await connection.close()
    except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
        log.info("broker_close_failed", error=type(error).__name__)


def _kind(messages: Sequence[Message]) -> str:
    return type_of(messages[0]) if len(messages) == 1 else TOGETHER


def _properties(kind: str, delivery_mode: int, headers: dict[str, Any] | None) -> Properties:
    return Properties(
        message_type=kind, content_type="application/json", headers=headers, delivery_mode=delivery_mode
    )


def _messaging(destination: str, operation: str) -> dict[str, str]:
    return {
        telemetry.MESSAGING_SYSTEM: "rabbitmq",
        telemetry.MESSAGING_DESTINATION: destination,
        telemetry.MESSAGING_OPERATION: operation,
    }
