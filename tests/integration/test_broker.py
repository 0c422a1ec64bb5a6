"""`shared.broker` on a real RabbitMQ: publishing, the outcomes of taking a message, and a broker that goes away."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any

import aio_pika
import pytest
from aio_pika.exceptions import ChannelPreconditionFailed
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from shared import broker as broker_module
from shared import telemetry, topology
from shared.broker import Broker, Delivery, Handler
from shared.messages import CancelJob, JobVoided, WorkerCommand, encode
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
from shared.topology import Queue
from tests.conftest import Vhost
from tests.contract.examples import EXAMPLES
from tests.tcp_proxy import TcpProxy

QUEUE = topology.job_queue("res_1", "live")
VOIDED = next(example for example in EXAMPLES if isinstance(example, JobVoided))


def cancel(number: int) -> CancelJob:
    return CancelJob(job_id=f"job_{number}", attempt=1, reason="client_gone")


@pytest.fixture
async def broker(vhost: Vhost) -> AsyncIterator[Broker]:
    async with AsyncExitStack() as stack:
        opened = await Broker.open(vhost.amqp_url, "test", stack)
        await opened.declare([QUEUE])
        yield opened


@pytest.fixture
async def proxy(vhost: Vhost) -> AsyncIterator[TcpProxy]:
    async with TcpProxy.before(vhost.amqp_url) as opened:
        yield opened


@pytest.fixture
async def far_broker(vhost: Vhost, proxy: TcpProxy) -> AsyncIterator[Broker]:
    """A broker behind the proxy; links 0, 1 and 2 are its consuming, publishing and transient connection."""
    async with AsyncExitStack() as stack:
        opened = await Broker.open(proxy.url(vhost.amqp_url), "far", stack)
        await opened.declare([QUEUE])
        yield opened
        await proxy.pass_on()
        await until(lambda: opened.connected)


async def until(holds: Callable[[], Any], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def consuming(
    broker: Broker, queue: Queue, handler: Handler, *, prefetch: int = 4
) -> AsyncIterator[None]:
    """`broker.consume` in a task of its own, which is consuming when the block begins."""
    task = asyncio.create_task(broker.consume(queue, WorkerCommand, handler, prefetch=prefetch))
    try:
        while not await broker.consumers(queue.name):
            assert not task.done()
        yield
        assert not task.done(), "the consume loop ended by itself"
    finally:
        task.cancel()
        await asyncio.wait({task})


@asynccontextmanager
async def serving(vhost: Vhost, handler: Handler, *, prefetch: int = 4) -> AsyncIterator[None]:
    """A process of its own, as far as the broker can tell, that handles QUEUE; gone when the block ends."""
    async with AsyncExitStack() as stack:
        server = await Broker.open(vhost.amqp_url, "server", stack)
        async with consuming(server, QUEUE, handler, prefetch=prefetch):
            yield


async def left(broker: Broker) -> int:
    """Messages in QUEUE once its consumers' connections are gone, which gives back all that was not acked."""
    while await broker.consumers(QUEUE.name):
        await asyncio.sleep(0.01)
    return await broker.depth(QUEUE)


async def take(broker: Broker, queue: Queue, of: Any = None) -> Delivery:
    """The next message of a queue, acked."""
    arrived: asyncio.Queue[Delivery] = asyncio.Queue()
    subscription = await broker.subscribe(queue, of, arrived.put_nowait, prefetch=1)
    async with asyncio.timeout(10):
        delivery = await arrived.get()
    await delivery.ack()
    await subscription.cancel()
    return delivery


async def publish_raw(vhost: Vhost, body: bytes) -> None:
    """Put any bytes into QUEUE, as a stranger could."""
    connection = await aio_pika.connect(vhost.amqp_url)
    async with connection:
        channel = await connection.channel()
        await channel.default_exchange.publish(aio_pika.Message(body, type="a.type.v1"), QUEUE.name)


class Recorder:
    """A handler that answers with the given outcomes in turn, then `Done`; an exception among them is raised."""

    def __init__(self, *outcomes: Outcome | Exception) -> None:
        self._outcomes = list(outcomes)
        self.taken: list[Delivery] = []

    async def __call__(self, delivery: Delivery) -> Outcome:
        self.taken.append(delivery)
        outcome = self._outcomes.pop(0) if self._outcomes else Done()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def jobs(self) -> list[str]:
        return [delivery.message.job_id for delivery in self.taken]


# ---- publishing


async def test_a_published_message_is_in_the_queue_when_publish_returns(broker: Broker) -> None:
    for number in range(3):
        await broker.publish(QUEUE, cancel(number))
    assert await broker.depth(QUEUE) == 3
    assert (await take(broker, QUEUE, WorkerCommand)).message == cancel(0)


async def test_a_published_message_is_durable_and_says_what_it_is(broker: Broker, vhost: Vhost) -> None:
    await broker.publish(QUEUE, cancel(1))
    connection = await aio_pika.connect(vhost.amqp_url)
    async with connection:
        queue = await (await connection.channel()).get_queue(QUEUE.name)
        message = await queue.get()
        await message.ack()
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert (message.type, message.content_type) == ("job.cancel.v1", "application/json")
    assert message.body == encode(cancel(1))


async def test_publishing_to_a_queue_that_does_not_exist_raises(broker: Broker) -> None:
    with pytest.raises(Unroutable):
        await broker.publish(topology.job_queue("nowhere", "live"), cancel(1))
    await broker.publish(QUEUE, cancel(2))  # the channel lives on
    assert await broker.depth(QUEUE) == 1


async def test_a_fact_reaches_the_queues_bound_to_its_type(broker: Broker) -> None:
    await broker.publish_event(VOIDED)
    delivery = await take(broker, topology.BILLING_EVENTS, JobVoided)
    assert (delivery.message, delivery.message_type) == (VOIDED, "usage.job_voided.v1")


async def test_a_fact_that_nobody_is_bound_to_raises(broker: Broker) -> None:
    with pytest.raises(Unroutable):
        await broker.publish_event(cancel(1))


async def test_a_full_queue_refuses(broker: Broker) -> None:
    small = Queue("small.v1", dict(QUEUE.arguments) | {"x-max-length": 2})
    await broker.declare([small])
    accepted = 0
    with pytest.raises(PublishRefused):
        for number in range(50):  # the bound is soft: a few more than 2 are taken
            await broker.publish(small, cancel(number))
            accepted += 1
    assert 2 <= accepted < 20
    assert await broker.depth(small) == accepted, "what was refused is not in the queue, all else is"


async def test_a_message_over_the_limit_is_refused_before_it_is_sent(broker: Broker) -> None:
    huge = CancelJob(job_id="job", attempt=1, reason="x" * (8 * 1024 * 1024))
    with pytest.raises(PublishRefused, match="over 8388608"):
        await broker.publish(QUEUE, huge)
    assert await broker.depth(QUEUE) == 0


async def test_a_transient_message_arrives_and_one_for_a_missing_queue_is_lost(broker: Broker) -> None:
    queue = topology.reply_queue("gw_1")
    await broker.declare([queue])
    await broker.send("replies.v1.gw_gone", cancel(1))
    await broker.send(queue, cancel(2))
    assert (await take(broker, queue, WorkerCommand)).message == cancel(2)


# ---- taking


async def test_done_acks(broker: Broker, vhost: Vhost) -> None:
    handler = Recorder()
    async with serving(vhost, handler):
        await broker.publish(QUEUE, cancel(1))
        await until(lambda: handler.taken)
    assert handler.taken[0].message == cancel(1)
    assert not handler.taken[0].redelivered
    assert await left(broker) == 0


async def test_dropped_acks_and_buries_nothing(broker: Broker, vhost: Vhost) -> None:
    handler = Recorder(Dropped("late"))
    async with serving(vhost, handler):
        await broker.publish(QUEUE, cancel(1))
        await until(lambda: handler.taken)
    assert await left(broker) == 0
    assert await broker.depth(topology.DEAD) == 0


async def test_rejected_goes_to_the_dead_letter_queue_with_the_reason(broker: Broker, vhost: Vhost) -> None:
    async with serving(vhost, Recorder(Rejected("no such model"))):
        await broker.publish(QUEUE, cancel(1))
        dead = await take(broker, topology.DEAD)
    assert dead.message == encode(cancel(1))
    assert dead.message_type == "job.cancel.v1"
    assert dead.headers["x-dead-reason"] == "no such model"
    assert dead.headers["x-dead-from"] == QUEUE.name
    assert await left(broker) == 0


async def test_a_dead_letter_whose_reader_dies_is_there_for_the_next(broker: Broker, vhost: Vhost) -> None:
    async with serving(vhost, Recorder(Rejected("no such model"))):
        await broker.publish(QUEUE, cancel(1))
        while not await broker.depth(topology.DEAD):
            await asyncio.sleep(0.01)
    for _ in range(3):
        read: list[Delivery] = []
        async with AsyncExitStack() as stack:
            reader = await Broker.open(vhost.amqp_url, "reader", stack)
            await reader.subscribe(topology.DEAD, None, read.append, prefetch=1)
            await until(read.copy)
    assert (await take(broker, topology.DEAD)).message == encode(cancel(1))


async def test_a_dead_letter_queue_with_other_arguments_is_used_as_it_is(vhost: Vhost) -> None:
    """Its name stands in those of the other queues, so that it cannot have another one."""
    async with await aio_pika.connect(vhost.amqp_url) as connection:
        arguments: dict[str, Any] = {**topology.DEAD.arguments, "x-delivery-limit": 7}
        await (await connection.channel()).declare_queue(
            topology.DEAD_QUEUE, durable=True, arguments=arguments
        )
    async with AsyncExitStack() as stack, serving(vhost, Recorder(Rejected("no such model"))):
        broker = await Broker.open(vhost.amqp_url, "test", stack)
        await broker.declare([QUEUE])
        await broker.publish(QUEUE, cancel(1))
        assert (await take(broker, topology.DEAD)).message == encode(cancel(1))
        with pytest.raises(ChannelPreconditionFailed):
            await broker.declare(
                [dataclasses.replace(QUEUE, arguments={**QUEUE.arguments, "x-max-length": 5})]
            )


async def test_a_bug_in_a_handler_buries_the_message_and_the_service_goes_on(
    broker: Broker, vhost: Vhost
) -> None:
    handler = Recorder(KeyError("the team's secret text"))
    async with serving(vhost, handler, prefetch=1):
        await broker.publish(QUEUE, cancel(1))
        await broker.publish(QUEUE, cancel(2))
        dead = await take(broker, topology.DEAD)
        await until(lambda: handler.jobs() == ["job_1", "job_2"])
    assert dead.message == encode(cancel(1))
    assert dead.headers["x-dead-reason"] == "KeyError in handler", "the error's text may hold what is private"
    assert await left(broker) == 0


@pytest.mark.parametrize("body", [b"\xff\xfe", b"{", b"[]", b'{"type":"job.drop.v1"}', encode(VOIDED)])
async def test_what_cannot_be_decoded_is_buried_and_the_next_one_is_handled(
    broker: Broker, vhost: Vhost, body: bytes
) -> None:
    handler = Recorder()
    async with serving(vhost, handler):
        await publish_raw(vhost, body)
        await broker.publish(QUEUE, cancel(2))
        dead = await take(broker, topology.DEAD)
        await until(lambda: handler.taken)
    assert (dead.message, dead.message_type) == (body, "a.type.v1")
    assert dead.headers["x-dead-reason"].startswith("undecodable: ")
    assert handler.jobs() == ["job_2"]
    assert await left(broker) == 0


@pytest.mark.parametrize("first", [RetryLater("database away", 0.0), Unavailable("database away")], ids=repr)
async def test_a_message_for_later_is_tried_again_without_being_given_back(
    broker: Broker, vhost: Vhost, first: Outcome | Exception
) -> None:
    handler = Recorder(first, first)
    async with serving(vhost, handler):
        await broker.publish(QUEUE, cancel(1))
        await until(lambda: len(handler.taken) == 3)
    assert all(delivery is handler.taken[0] for delivery in handler.taken), "one delivery, asked three times"
    assert await broker.depth(topology.DEAD) == 0
    assert await left(broker) == 0


async def test_a_retry_pauses_and_the_pauses_grow(broker: Broker, vhost: Vhost) -> None:
    times_s: list[float] = []

    async def handler(_delivery: Delivery) -> Outcome:
        times_s.append(time.monotonic())
        return Done() if len(times_s) == 4 else RetryLater("not yet", 0.0)

    async with serving(vhost, handler):
        await broker.publish(QUEUE, cancel(1))
        await until(lambda: len(times_s) == 4)
    pauses_s = [after - before for before, after in pairwise(times_s)]
    assert [pause_s >= least for pause_s, least in zip(pauses_s, (0.19, 0.39, 0.79), strict=True)] == [
        True
    ] * 3


async def test_a_message_that_waits_for_its_retry_comes_again_when_its_process_ends(
    broker: Broker, vhost: Vhost
) -> None:
    handler = Recorder(RetryLater("not yet", 60))
    async with serving(vhost, handler):
        await broker.publish(QUEUE, cancel(1))
        await until(lambda: handler.taken)
    assert await left(broker) == 1
    async with serving(vhost, handler):
        await until(lambda: len(handler.taken) == 2)
    assert handler.taken[1].redelivered


async def test_no_more_handlers_run_at_once_than_were_asked_for(broker: Broker, vhost: Vhost) -> None:
    running, most, ended = 0, 0, 0

    async def handler(_delivery: Delivery) -> Outcome:
        nonlocal running, most, ended
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        ended += 1
        return Done()

    for number in range(9):
        await broker.publish(QUEUE, cancel(number))
    async with serving(vhost, handler, prefetch=3):
        await until(lambda: ended == 9)
    assert most == 3


async def test_acks_end_though_the_connection_breaks_in_their_midst(
    broker: Broker, far_broker: Broker, proxy: TcpProxy
) -> None:
    count = 300
    arrived: list[Delivery] = []
    await far_broker.subscribe(QUEUE, WorkerCommand, arrived.append, prefetch=count)
    await asyncio.gather(*(broker.publish(QUEUE, cancel(number)) for number in range(count)))
    await until(lambda: len(arrived) == count)
    proxy.links[0].reset()
    async with asyncio.timeout(10):
        for delivery in arrived[:count]:
            await delivery.ack()
    await until(lambda: far_broker.connected)


async def test_messages_that_travel_together_arrive_one_by_one_and_in_order(
    broker: Broker, vhost: Vhost
) -> None:
    queue = topology.reply_queue("gw_1")
    arrived: list[Delivery] = []
    await broker.subscribe(queue, WorkerCommand, arrived.append, prefetch=0, no_ack=True)
    await broker.send(queue, *map(cancel, range(3)))
    await until(lambda: len(arrived) == 3)
    await broker.publish(queue, *map(cancel, range(3, 7)))
    await until(lambda: len(arrived) == 7)
    assert [each.message for each in arrived] == [cancel(number) for number in range(7)]
    with pytest.raises(Unroutable):
        await broker.publish(topology.reply_queue("gw_gone").name, *map(cancel, range(2)))


async def test_messages_that_travel_together_are_refused_where_each_is_acked(
    broker: Broker, vhost: Vhost
) -> None:
    arrived: list[Delivery] = []
    await broker.subscribe(QUEUE, WorkerCommand, arrived.append, prefetch=1)
    await broker.publish(QUEUE, cancel(1), cancel(2))
    await broker.publish(QUEUE, cancel(3))
    await until(lambda: len(arrived) == 1)
    assert arrived[0].message == cancel(3)
    assert await broker.depth(topology.DEAD) == 1


async def test_a_consumer_without_acks_only_looks(broker: Broker, vhost: Vhost) -> None:
    queue = topology.reply_queue("gw_1")
    arrived: list[Delivery] = []
    await broker.subscribe(queue, WorkerCommand, arrived.append, prefetch=1, no_ack=True)
    connection = await aio_pika.connect(vhost.amqp_url)
    async with connection:
        channel = await connection.channel()
        await channel.default_exchange.publish(aio_pika.Message(b"rubbish"), queue.name)
    for number in range(3):
        await broker.send(queue, cancel(number))
    await until(lambda: len(arrived) == 3)
    await arrived[0].ack()  # nothing to ack, and no error
    assert await broker.depth(topology.DEAD) == 0, "a transient message is not worth an operator's look"


async def test_a_cancelled_subscription_gets_nothing_more_and_may_settle_what_it_has(broker: Broker) -> None:
    arrived: list[Delivery] = []
    subscription = await broker.subscribe(QUEUE, WorkerCommand, arrived.append, prefetch=5)
    await broker.publish(QUEUE, cancel(1))
    await until(lambda: arrived)
    await subscription.cancel()
    await subscription.cancel()  # harmless
    await broker.publish(QUEUE, cancel(2))
    await arrived[0].ack()
    assert await broker.depth(QUEUE) == 1
    assert len(arrived) == 1


async def test_the_trace_goes_on_in_the_handler(broker: Broker, vhost: Vhost) -> None:
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    seen: list[int] = []

    async def handler(_delivery: Delivery) -> Outcome:
        seen.append(trace.get_current_span().get_span_context().trace_id)
        return Done()

    async with serving(vhost, handler, prefetch=1):
        with telemetry.span("request") as span:
            await broker.publish(QUEUE, cancel(1))
        await broker.publish(QUEUE, cancel(2))
        await until(lambda: len(seen) == 2)
    assert seen[0] == span.get_span_context().trace_id
    assert seen[1] != seen[0], "the next message does not run under the trace of the one before"


async def test_consumers_are_counted_and_a_missing_queue_has_none(broker: Broker) -> None:
    assert await broker.consumers("replies.v1.gw_gone") == 0
    assert await broker.consumers(QUEUE.name) == 0
    subscription = await broker.subscribe(QUEUE, WorkerCommand, lambda _: None, prefetch=1)
    assert await broker.consumers(QUEUE.name) == 1
    await subscription.cancel()
    assert await broker.consumers(QUEUE.name) == 0


async def test_a_deleted_queue_is_gone_with_its_messages_and_deleting_it_again_is_harmless(
    broker: Broker,
) -> None:
    await broker.publish(QUEUE, cancel(1))
    await broker.delete(QUEUE)
    with pytest.raises(Unroutable):
        await broker.publish(QUEUE, cancel(2))
    await broker.delete(QUEUE)
    assert await broker.depth(QUEUE) == 0


# ---- a broker that goes away


async def test_a_broker_that_is_not_there_is_unavailable_in_time(proxy: TcpProxy, vhost: Vhost) -> None:
    proxy.refuse()
    began_s = time.monotonic()
    async with AsyncExitStack() as stack:
        with pytest.raises(Unavailable, match="cannot reach the broker"):
            await Broker.open(proxy.url(vhost.amqp_url), "test", stack, timeout_s=0.6)
    assert time.monotonic() - began_s < 3


async def test_a_blocked_publisher_is_told_unknown_in_time_while_consumers_go_on(
    far_broker: Broker, broker: Broker, proxy: TcpProxy
) -> None:
    """As under a memory alarm: the broker stops reading from connections that publish, and from no others."""
    handler = Recorder()
    async with consuming(far_broker, QUEUE, handler):
        proxy.links[1].blackhole()
        began_s = time.monotonic()
        with pytest.raises(PublishUnknown):
            await far_broker.publish(QUEUE, cancel(1), timeout_s=0.5)
        assert time.monotonic() - began_s < 1.5
        assert handler.taken == []

        await broker.publish(QUEUE, cancel(2))
        await until(lambda: handler.jobs() == ["job_2"])

        proxy.links[1].heal()  # unknown is not "not sent": the message comes after all
        await until(lambda: handler.jobs() == ["job_2", "job_1"])


async def test_a_frozen_broker_answers_questions_in_time(
    far_broker: Broker, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "PUBLISH_TIMEOUT_S", 0.5)
    proxy.blackhole()
    for question in (
        far_broker.depth(QUEUE),
        far_broker.consumers(QUEUE.name),
        far_broker.declare([QUEUE]),
        far_broker.delete(QUEUE),
    ):
        began_s = time.monotonic()
        with pytest.raises(Unavailable):
            await question
        assert time.monotonic() - began_s < 2.5


async def test_a_subscription_that_is_cut_off_while_it_is_made_says_so(
    far_broker: Broker, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "PUBLISH_TIMEOUT_S", 0.5)
    proxy.links[0].blackhole()
    with pytest.raises(Unavailable):
        async with asyncio.timeout(5):
            await far_broker.subscribe(QUEUE, WorkerCommand, lambda _: None, prefetch=1)
    making = asyncio.create_task(far_broker.subscribe(QUEUE, WorkerCommand, lambda _: None, prefetch=1))
    await asyncio.sleep(0.05)
    proxy.links[0].reset()
    with pytest.raises(Unavailable):
        async with asyncio.timeout(5):
            await making


async def test_a_broker_that_went_away_is_noticed_at_once_and_found_again(
    far_broker: Broker, broker: Broker, proxy: TcpProxy
) -> None:
    handler = Recorder()
    async with consuming(far_broker, QUEUE, handler):
        proxy.refuse()
        await until(lambda: not far_broker.connected)
        assert far_broker.connected_for_s() == 0
        began_s = time.monotonic()
        with pytest.raises(Unavailable):
            await far_broker.send(QUEUE, cancel(1))
        with pytest.raises(Unavailable):
            await far_broker.send_event(VOIDED)
        with pytest.raises(Unavailable):
            await far_broker.publish(QUEUE, cancel(2))
        assert time.monotonic() - began_s < 2

        await broker.publish(QUEUE, cancel(3))  # by another process
        await proxy.pass_on()
        back_s = time.monotonic()
        await until(lambda: far_broker.connected and handler.taken)
        await until(lambda: far_broker.connected_for_s() > 0)
        assert far_broker.connected_for_s() <= time.monotonic() - back_s, "the time before does not count"
        assert handler.jobs() == ["job_3"], "the consumer is back, and what was refused did not get through"

        await far_broker.publish(QUEUE, cancel(4))
        await far_broker.send(QUEUE, cancel(5))
        await until(lambda: len(handler.taken) == 3)


async def test_who_is_cancelled_as_the_connection_is_lost_ends(vhost: Vhost) -> None:
    """The client library makes the one of the other, for half of those that wait for an answer."""

    async def ask(broker: Broker) -> None:
        while not given_up:
            await asyncio.sleep(0)
            with contextlib.suppress(Unavailable):
                await broker.consumers(QUEUE.name)

    for _ in range(5):
        given_up = False
        async with TcpProxy.before(vhost.amqp_url) as proxy, AsyncExitStack() as stack:
            broker = await Broker.open(proxy.url(vhost.amqp_url), "test", stack)
            tasks = [asyncio.create_task(ask(broker)) for _ in range(20)]
            await asyncio.sleep(0.05)
            proxy.reset()
            await asyncio.sleep(random.uniform(0, 0.002))
            for task in tasks:
                task.cancel()
            _, left = await asyncio.wait(tasks, timeout=10)
            given_up = True
            assert not left, f"{len(left)} of {len(tasks)} go on"


async def test_a_subscription_that_nobody_holds_on_to_is_back_with_the_broker(
    far_broker: Broker, broker: Broker, proxy: TcpProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The client library knows its channels weakly: one that nothing else refers to is not there to be restored."""
    for logger in ("aiormq", "aio_pika"):
        caplog.set_level(logging.CRITICAL, logger)  # a captured traceback would refer to it
    taken: list[Any] = []
    await far_broker.subscribe(QUEUE, WorkerCommand, taken.append, prefetch=0, no_ack=True)
    proxy.refuse()
    await until(lambda: not far_broker.connected)
    for _ in range(20):
        gc.collect()
        await asyncio.sleep(0.02)
    await proxy.pass_on()
    await until(lambda: far_broker.connected_for_s() > 0)
    await broker.publish(QUEUE, cancel(1))
    await until(lambda: taken)


async def test_a_reset_does_not_cut_off_the_work_at_hand(far_broker: Broker, proxy: TcpProxy) -> None:
    go_on = asyncio.Event()
    begun: list[Delivery] = []
    ended: list[Delivery] = []

    async def handler(delivery: Delivery) -> Outcome:
        begun.append(delivery)
        if len(begun) == 1:
            await go_on.wait()
        ended.append(delivery)
        return Done()

    async with consuming(far_broker, QUEUE, handler):
        await far_broker.publish(QUEUE, cancel(1))
        await until(lambda: begun)
        proxy.reset()
        await until(lambda: len(begun) == 2)  # the broker gives it out again: the ack could not arrive
        go_on.set()
        await until(lambda: len(ended) == 2)
        await until(lambda: far_broker.connected)
        # Only now is it settled, so a third time does not come.
        await far_broker.publish(QUEUE, cancel(2))
        await until(lambda: len(ended) == 3)
    assert [delivery.message for delivery in ended] == [cancel(1), cancel(1), cancel(2)]


async def test_a_publish_cut_off_while_it_waits_is_unknown(far_broker: Broker, proxy: TcpProxy) -> None:
    proxy.links[1].blackhole()
    waiting = asyncio.create_task(far_broker.publish(QUEUE, cancel(1), timeout_s=30))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    proxy.links[1].reset()
    with pytest.raises(PublishUnknown):
        async with asyncio.timeout(5):
            await waiting


async def test_a_message_is_kept_until_it_can_be_buried(
    far_broker: Broker, broker: Broker, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "PUBLISH_TIMEOUT_S", 0.3)
    async with consuming(far_broker, QUEUE, Recorder(Rejected("bad"))):
        proxy.links[1].blackhole()
        await broker.publish(QUEUE, cancel(1))
        await asyncio.sleep(0.6)
        assert await broker.depth(topology.DEAD) == 0
        proxy.links[1].heal()
        dead = await take(broker, topology.DEAD)
    assert dead.message == encode(cancel(1))


async def test_what_cannot_be_decoded_is_kept_until_it_can_be_buried(
    vhost: Vhost, far_broker: Broker, broker: Broker, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "PUBLISH_TIMEOUT_S", 0.3)
    async with consuming(far_broker, QUEUE, Recorder(), prefetch=1):
        proxy.links[1].blackhole()
        await publish_raw(vhost, b"\xff\xfe")
        await asyncio.sleep(0.6)
        assert await broker.depth(topology.DEAD) == 0
        proxy.links[1].heal()
        dead = await take(broker, topology.DEAD)
        assert dead.message == b"\xff\xfe"
        # And it is acked: with a window of one, nothing else could come.
        await broker.publish(QUEUE, cancel(1))
        async with asyncio.timeout(5):
            while await broker.depth(QUEUE):
                await asyncio.sleep(0.01)
