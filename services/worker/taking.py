"""The consumers on the resource's queues: they take jobs, stand aside for other workers, or have stopped for good."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.worker.window import STEP_JOBS
from shared import topology
from shared.broker import Broker, Delivery, Subscription
from shared.messages import JobQueueMessage

_SETTLED_KEPT = 64
_ARRIVE_S = 1.0
"""What was on its way when a consumer was cancelled has come by then."""


@dataclass(slots=True)
class _Consumer:
    """deliveries: what came, but what was settled long ago. cancelled_s: None while it takes."""

    subscription: Subscription
    deliveries: list[Delivery]
    cancelled_s: float | None = None

    def has_settled(self) -> bool:
        return all(delivery.is_settled for delivery in self.deliveries)


class Taking:
    """receive: gets each delivery with the number of its queue (a lane of a shared pool, else 0)."""

    def __init__(
        self,
        broker: Broker,
        queues: Sequence[topology.Queue],
        receive: Callable[[Delivery, int], None],
        prefetch: int,
    ) -> None:
        self._broker, self._queues = broker, queues
        self._receive, self._prefetch = receive, prefetch
        self._taking: dict[int, _Consumer] = {}
        self._steps: list[list[_Consumer]] = []
        """Of each step its consumers, one on each queue."""
        self._retired: list[_Consumer] = []
        """Cancelled: what they delivered before has to be settled on their channels."""
        self._has_stopped = False
        self._one_at_a_time = asyncio.Lock()

    async def start(self) -> None:
        """Take from all queues, unless it was stopped. Raises `Unavailable`; may be called again after it."""
        async with self._one_at_a_time:
            for lane, queue in enumerate(self._queues):
                if lane not in self._taking and not self._has_stopped:
                    await self._broker.declare([queue])
                    self._taking[lane] = await self._subscribe(lane, self._prefetch)

    @property
    def steps(self) -> int:
        return len(self._steps)

    async def set_steps(self, steps: int) -> None:
        """Take so many times `STEP_JOBS` from each queue beside `prefetch`; nothing while it stands aside. Raises `Unavailable`."""
        async with self._one_at_a_time:
            if not self._taking:
                return
            while len(self._steps) > steps:
                await self._retire_step()
            while len(self._steps) < steps:
                self._steps.append([])
                for lane in range(len(self._queues)):
                    self._steps[-1].append(await self._subscribe(lane, STEP_JOBS))

    async def stand_aside(self) -> None:
        """Take nothing until the next `start`. What was delivered stays, to be settled."""
        async with self._one_at_a_time:
            while self._steps:
                await self._retire_step()
            while self._taking:
                await self._retire(self._taking.popitem()[1])

    async def stop(self) -> None:
        """Take nothing any more."""
        self._has_stopped = True
        await self.stand_aside()

    async def close_settled(self, oldest_held_s: float) -> None:
        """Close the channels of cancelled consumers whose deliveries are all settled, or all came before the oldest one that is
        still held: one long job keeps one channel open, not all that come and go beside it.
        """
        long_ago_s = time.monotonic() - _ARRIVE_S
        async with self._one_at_a_time:
            for retired in list(self._retired):
                cancelled_s = retired.cancelled_s or 0.0
                if cancelled_s < oldest_held_s or (cancelled_s < long_ago_s and retired.has_settled()):
                    self._retired.remove(retired)
                    await retired.subscription.close()

    async def _subscribe(self, lane: int, prefetch: int) -> _Consumer:
        deliveries: list[Delivery] = []

        def receive(delivery: Delivery) -> None:
            deliveries.append(delivery)
            if len(deliveries) > prefetch + _SETTLED_KEPT:
                deliveries[:] = [each for each in deliveries if not each.is_settled]
            self._receive(delivery, lane)

        subscription = await self._broker.subscribe(
            self._queues[lane], JobQueueMessage, receive, prefetch=prefetch
        )
        return _Consumer(subscription, deliveries)

    async def _retire_step(self) -> None:
        while self._steps[-1]:
            await self._retire(self._steps[-1].pop())
        self._steps.pop()

    async def _retire(self, consumer: _Consumer) -> None:
        await consumer.subscription.cancel()
        consumer.cancelled_s = time.monotonic()
        self._retired.append(consumer)
