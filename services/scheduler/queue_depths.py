"""How many jobs wait for each autoscaled resource: the broker is asked every second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from shared import topology
from shared.broker import Broker
from shared.outcomes import Unavailable

log = structlog.get_logger()

POLL_S = 1.0
STALE_S = 5.0


@dataclass(frozen=True, slots=True)
class Depth:
    """Ready messages, and when they were counted, in monotonic seconds of this process."""

    live: int
    batch: int
    counted_s: float


class QueueDepths:
    def __init__(self, broker: Broker, changed: asyncio.Event) -> None:
        """changed: set when something waits where nothing waited before."""
        self._broker = broker
        self._changed = changed
        self._depths: dict[str, Depth] = {}
        self._asked: Mapping[str, bool] = {}
        self._away = False

    def ask(self, resources: Mapping[str, bool]) -> None:
        """Count for these from now on: resource ids, and whether each is a shared pool."""
        self._asked = resources
        self._depths = {key: depth for key, depth in self._depths.items() if key in resources}

    def of(self, resource_id: str) -> Depth | None:
        """The latest count; None where there is none of the last seconds."""
        depth = self._depths.get(resource_id)
        return depth if depth is not None and time.monotonic() - depth.counted_s <= STALE_S else None

    async def run(self) -> None:
        """Count until cancelled."""
        while True:
            try:
                for resource_id, pool in dict(self._asked).items():
                    await self._count(resource_id, pool)
                self._away = False
            except Unavailable as error:
                if not self._away:
                    log.warning("queues_not_counted", error=str(error))
                self._away = True
            await asyncio.sleep(POLL_S)

    async def _count(self, resource_id: str, pool: bool) -> None:
        counts = await self._broker.ready_messages(
            [queue.name for queue in topology.job_queues(resource_id, pool=pool)]
        )
        if resource_id not in self._asked:
            return
        batch = counts.pop(topology.job_queue(resource_id, "batch").name)
        depth = Depth(sum(counts.values()), batch, time.monotonic())
        before = self._depths.get(resource_id)
        self._depths[resource_id] = depth
        if depth.live + depth.batch and (before is None or not before.live + before.batch):
            self._changed.set()
