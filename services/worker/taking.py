"""The consumers on the resource's queues: they take jobs, stand aside for other workers, or have stopped for good."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from shared import topology
from shared.broker import Broker, Delivery, Subscription
from shared.messages import JobQueueMessage


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
        self._taking: dict[int, Subscription] = {}
        self._retired: list[tuple[float, Subscription]] = []
        """With the time they were cancelled at: what they delivered before has to be settled on their channels."""
        self._has_stopped = False
        self._one_at_a_time = asyncio.Lock()

    async def start(self) -> None:
        """Take from all queues, unless it was stopped. Raises `Unavailable`; may be called again after it."""
        async with self._one_at_a_time:
            for lane, queue in enumerate(self._queues):
                if lane not in self._taking and not self._has_stopped:
                    await self._broker.declare([queue])
                    self._taking[lane] = await self._broker.subscribe(
                        queue, JobQueueMessage, self._receiver(lane), prefetch=self._prefetch
                    )

    async def stand_aside(self) -> None:
        """Take nothing until the next `start`. What was delivered stays, to be settled."""
        async with self._one_at_a_time:
            while self._taking:
                _, subscription = self._taking.popitem()
                await subscription.cancel()
                self._retired.append((time.monotonic(), subscription))

    async def stop(self) -> None:
        """Take nothing any more."""
        self._has_stopped = True
        await self.stand_aside()

    async def close_settled(self, oldest_held_s: float) -> None:
        """Close the channels of cancelled consumers whose deliveries all came before the oldest one that is still held."""
        async with self._one_at_a_time:
            for retired in [each for each in self._retired if each[0] < oldest_held_s]:
                self._retired.remove(retired)
                await retired[1].close()

    def _receiver(self, lane: int) -> Callable[[Delivery], None]:
        return lambda delivery: self._receive(delivery, lane)
