"""Facts for billing that must not get lost although the request is over.

A fact is a row first, and published by the relay with the broker's confirm. While the database is away it waits in
memory, and the relay publishes it from there; only if both are away and this process dies is it lost, and then
billing decides by the worker's own fact. Duplicates are harmless: billing knows each fact by its id.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterable

import structlog
from opentelemetry.metrics import CallbackOptions, Observation

from shared import telemetry
from shared.broker import Broker
from shared.database import Connection, Database
from shared.messages import JobVoided, decoder, encode
from shared.outcomes import PublishRefused, Unavailable, Unroutable

log = structlog.get_logger()

BATCH = 100
IDLE_S = 1.0
ADD_TIMEOUT_S = 2.0
KEEP_SENT_S = 3600
SWEEP_EVERY_S = 300.0
MAX_IN_MEMORY = 50_000

_decode = decoder(JobVoided).decode


class Outbox:
    """`add` from request handlers; `relay` is one long task."""

    def __init__(self, database: Database, broker: Broker) -> None:
        self._database = database
        self._broker = broker
        self._memory: deque[tuple[JobVoided, dict[str, str]]] = deque()
        self._wake = asyncio.Event()
        self._memory_empty = asyncio.Event()
        self._memory_empty.set()
        self._lost = telemetry.meter().create_counter(
            "roundhouse.outbox.lost", description="Facts that found neither database nor room in memory"
        )
        self._caught_up_s = time.monotonic()
        telemetry.meter().create_observable_gauge(
            "roundhouse.outbox.behind",
            [self._observe_behind],
            unit="s",
            description="Since nothing waited to be published",
        )

    @property
    def in_memory(self) -> int:
        """Facts that only this process knows."""
        return len(self._memory)

    async def add(self, fact: JobVoided, headers: dict[str, str]) -> None:
        """Keep the fact, with its trace headers. Never raises for a database that is away."""

        async def insert(connection: Connection) -> None:
            await connection.execute(
                "INSERT INTO gateway.outbox (event_id, payload, headers) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                fact.event_id,
                encode(fact).decode(),
                json.dumps(headers),
            )

        try:
            await self._database.bounded(insert, ADD_TIMEOUT_S)
        except Unavailable as error:
            if len(self._memory) >= MAX_IN_MEMORY:
                self._lost.add(1)
                log.error("outbox_full", event_id=fact.event_id, job_id=fact.job_id)
                return
            log.warning("outbox_in_memory", event_id=fact.event_id, error=str(error))
            self._remember(fact, headers)
        except asyncio.CancelledError:
            # Whoever waited is gone; the insert may or may not have happened, and twice does no harm.
            if len(self._memory) < MAX_IN_MEMORY:
                self._remember(fact, headers)
            raise
        finally:
            self._wake.set()

    def _remember(self, fact: JobVoided, headers: dict[str, str]) -> None:
        self._memory.append((fact, headers))
        self._memory_empty.clear()

    def _observe_behind(self, _options: CallbackOptions) -> Iterable[Observation]:
        yield Observation(time.monotonic() - self._caught_up_s)

    async def relay(self) -> None:
        """Publish what waits, until cancelled."""
        loop = asyncio.get_running_loop()
        swept_s = loop.time()
        while True:
            self._wake.clear()
            more = await self.relay_once()
            if loop.time() - swept_s > SWEEP_EVERY_S:
                swept_s = loop.time()
                await self._sweep()
            if not more:
                try:
                    async with asyncio.timeout(IDLE_S):
                        await self._wake.wait()
                except TimeoutError:
                    continue  # rows of a gateway that died are found by looking

    async def flushed(self) -> None:
        """Return when no fact is known to this process alone; `relay` must be running."""
        await self._memory_empty.wait()

    async def relay_once(self) -> bool:
        """Publish one batch; return whether there may be more to do at once."""
        try:
            await self._relay_memory()
            more = await self._relay_rows() == BATCH
            if not more:
                self._caught_up_s = time.monotonic()
            return more
        except (Unavailable, PublishRefused, Unroutable) as error:
            log.warning("outbox_not_relayed", error=str(error), in_memory=len(self._memory))
            await asyncio.sleep(IDLE_S)
            return False

    async def _relay_memory(self) -> None:
        while self._memory:
            fact, headers = self._memory[0]
            await self._publish(fact, headers)
            # Only `add` runs meanwhile, and it appends: the first is still the one that was published.
            self._memory.popleft()
        self._memory_empty.set()

    async def _relay_rows(self) -> int:
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                "SELECT event_id, payload, headers FROM gateway.outbox WHERE sent_at IS NULL"
                " ORDER BY created_at LIMIT $1 FOR UPDATE SKIP LOCKED",
                BATCH,
            )
            sent: list[str] = []
            failure: Exception | None = None
            for row in rows:
                try:
                    await self._publish(_decode(row["payload"]), json.loads(row["headers"]))
                except (Unavailable, PublishRefused, Unroutable) as error:
                    # Raised after the commit: what was confirmed is not published again.
                    failure = error
                    break
                sent.append(row["event_id"])
            if sent:
                await connection.execute(
                    "UPDATE gateway.outbox SET sent_at = now() WHERE event_id = ANY($1)", sent
                )
        if failure is not None:
            raise failure
        return len(rows)

    async def _publish(self, fact: JobVoided, headers: dict[str, str]) -> None:
        with telemetry.remote_context(headers):
            await self._broker.publish_event(fact)

    async def _sweep(self) -> None:
        try:
            async with self._database.transaction() as connection:
                await connection.execute(
                    "DELETE FROM gateway.outbox WHERE sent_at < now() - make_interval(secs => $1)",
                    float(KEEP_SENT_S),
                )
        except Unavailable as error:
            log.warning("outbox_not_swept", error=str(error))
