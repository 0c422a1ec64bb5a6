from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from services.worker.taking import Taking
from services.worker.window import STEP_JOBS
from shared import topology
from shared.broker import Broker, Delivery
from shared.outcomes import Unavailable

QUEUES = topology.job_queues("res_1", pool=True)


class Consumer:
    def __init__(self, prefetch: int, receive: Callable[[Delivery], None]) -> None:
        self.prefetch, self.receive = prefetch, receive
        self.is_cancelled = self.is_closed = False

    async def cancel(self) -> None:
        self.is_cancelled = True

    async def close(self) -> None:
        self.is_closed = True


class BrokerPart:
    """Subscribes, except when the broker is away at a given queue."""

    def __init__(self) -> None:
        self.consumers: list[Consumer] = []
        self.away_at: str | None = None

    async def declare(self, queues: list[topology.Queue]) -> None:
        if queues[0].name == self.away_at:
            raise Unavailable("away")

    async def subscribe(self, queue: topology.Queue, of: Any, receive: Any, *, prefetch: int) -> Consumer:
        if queue.name == self.away_at:
            raise Unavailable("away")
        self.consumers.append(Consumer(prefetch, receive))
        return self.consumers[-1]

    def taking(self) -> int:
        return sum(not consumer.is_cancelled for consumer in self.consumers)

    def jobs(self) -> int:
        """How many may be held at once."""
        return sum(consumer.prefetch for consumer in self.consumers if not consumer.is_cancelled)


@pytest.fixture
def broker() -> BrokerPart:
    return BrokerPart()


@pytest.fixture
def taking(broker: BrokerPart) -> Taking:
    return Taking(cast(Broker, broker), QUEUES, lambda delivery, lane: None, 8)


async def test_it_stands_aside_and_takes_again(broker: BrokerPart, taking: Taking) -> None:
    await taking.start()
    assert broker.taking() == len(QUEUES)
    await taking.stand_aside()
    assert broker.taking() == 0
    await taking.start()
    assert broker.taking() == len(QUEUES)


async def test_what_failed_to_start_is_started_later_and_nothing_twice(
    broker: BrokerPart, taking: Taking
) -> None:
    broker.away_at = QUEUES[3].name
    with pytest.raises(Unavailable):
        await taking.start()
    broker.away_at = None
    await taking.start()
    assert broker.taking() == len(broker.consumers) == len(QUEUES)


async def test_after_a_stop_it_never_takes_again(broker: BrokerPart, taking: Taking) -> None:
    await taking.start()
    await taking.stop()
    await taking.start()
    assert broker.taking() == 0


async def test_a_channel_is_closed_once_nothing_that_came_on_it_is_held(
    broker: BrokerPart, taking: Taking
) -> None:
    before_s = time.monotonic()
    await taking.start()
    await taking.stand_aside()
    await taking.close_settled(before_s)
    assert not any(consumer.is_closed for consumer in broker.consumers)
    await taking.close_settled(time.monotonic() + 1)
    assert all(consumer.is_closed for consumer in broker.consumers)


async def test_one_long_job_keeps_one_channel_open(
    broker: BrokerPart, taking: Taking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.taking._ARRIVE_S", 0.0)
    began_s = time.monotonic()
    await taking.start()
    long, short = (Delivery(None, {}, "", False, None) for _ in range(2))
    for consumer, delivery in zip(broker.consumers, (long, short), strict=False):
        consumer.receive(delivery)
    await taking.stand_aside()
    await taking.close_settled(began_s)
    assert [consumer.is_closed for consumer in broker.consumers] == [False, False] + [True] * (
        len(QUEUES) - 2
    )
    short.is_settled = True
    await taking.close_settled(began_s)
    assert [consumer.is_closed for consumer in broker.consumers[:2]] == [False, True]


async def test_what_is_settled_is_not_remembered_for_ever(broker: BrokerPart, taking: Taking) -> None:
    await taking.start()
    for _ in range(1000):
        delivery = Delivery(None, {}, "", False, None)
        broker.consumers[0].receive(delivery)
        delivery.is_settled = True
    assert len(taking._taking[0].deliveries) < 100


@pytest.fixture
def both(broker: BrokerPart) -> Taking:
    """Of a resource of its own: live and batch."""
    queues = topology.job_queues("res_1", pool=False)
    assert len(queues) == 2
    return Taking(cast(Broker, broker), queues, lambda delivery, lane: None, 8)


async def test_a_lookahead_is_consumers_beside_the_first(broker: BrokerPart, both: Taking) -> None:
    await both.set_steps(2)
    assert broker.consumers == [], "before it takes anything"
    await both.start()
    await both.set_steps(3)
    assert (both.steps, broker.jobs()) == (3, 2 * (8 + 3 * STEP_JOBS))
    await both.set_steps(1)
    assert (both.steps, broker.jobs()) == (1, 2 * (8 + STEP_JOBS))
    await both.stand_aside()
    assert (both.steps, broker.jobs()) == (0, 0)
    await both.set_steps(1)
    assert broker.jobs() == 0, "aside"
    await both.start()
    assert broker.jobs() == 2 * 8
    await both.close_settled(time.monotonic() + 1)
    assert sum(consumer.is_closed for consumer in broker.consumers) == 8


async def test_a_step_that_failed_half_way_goes_with_the_others(broker: BrokerPart, both: Taking) -> None:
    await both.start()
    broker.away_at = topology.job_queues("res_1", pool=False)[1].name
    with pytest.raises(Unavailable):
        await both.set_steps(1)
    await both.stand_aside()
    assert broker.jobs() == 0
