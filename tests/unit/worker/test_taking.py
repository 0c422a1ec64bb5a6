from __future__ import annotations

import time
from typing import Any, cast

import pytest

from services.worker.taking import Taking
from shared import topology
from shared.broker import Broker
from shared.outcomes import Unavailable

QUEUES = topology.job_queues("res_1", pool=True)


class Consumer:
    def __init__(self) -> None:
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
        self.consumers.append(Consumer())
        return self.consumers[-1]

    def taking(self) -> int:
        return sum(not consumer.is_cancelled for consumer in self.consumers)


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
