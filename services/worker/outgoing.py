"""What leaves the worker: token deltas (transient, one message per owner and engine step) and ends (durable)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass

import structlog

from services.worker.held import merged
from shared import telemetry
from shared.broker import Broker
from shared.messages import JobFinished, JobUsage, TokenDelta, TokensGenerated
from shared.outcomes import PublishRefused, Unavailable, Unroutable

log = structlog.get_logger()

RETRY_S = 0.2
MAX_RETRY_S = 5.0


class DeltaSender:
    """Collects deltas between two sends; while the broker is away they pile up, merged by choice.

    Bounded by the token limits of the jobs that run.
    """

    def __init__(self, broker: Broker, worker_id: str) -> None:
        self._broker = broker
        self._worker_id = worker_id
        self._pending: dict[str, list[TokenDelta]] = {}
        self._wake = asyncio.Event()

    def put(self, owner_queue: str, delta: TokenDelta) -> None:
        self._pending.setdefault(owner_queue, []).append(delta)
        self._wake.set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            pending, self._pending = self._pending, {}
            for owner_queue, deltas in pending.items():
                message = TokensGenerated(worker_id=self._worker_id, deltas=_by_choice(deltas))
                try:
                    await self._broker.send(owner_queue, message)
                except Unavailable:
                    # What was lost on the way is asked for again by the owner; what was not sent is kept here.
                    self._pending[owner_queue] = list(message.deltas) + self._pending.get(owner_queue, [])
                    self._wake.set()
            if self._pending:
                await asyncio.sleep(RETRY_S)


def _by_choice(deltas: list[TokenDelta]) -> list[TokenDelta]:
    groups: dict[tuple[str, int, int], list[TokenDelta]] = {}
    for delta in deltas:
        groups.setdefault((delta.job_id, delta.attempt, delta.choice), []).append(delta)
    return [merged(group) for group in groups.values()]


@dataclass(frozen=True, slots=True)
class _Finish:
    """context: of its job's trace; what travels together is shown in the first one's."""

    message: JobFinished
    told: asyncio.Future[None]
    context: Context


class FinishSender:
    """Gives owners their ends: those for one owner that come in one pass of the event loop, as after a step, travel together."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiting: dict[str, list[_Finish]] = {}
        self._wake = asyncio.Event()

    async def tell(self, owner_queue: str, finished: JobFinished) -> None:
        """Return when the broker has it, or the owner's queue is gone."""
        finish = _Finish(finished, asyncio.get_running_loop().create_future(), copy_context())
        self._waiting.setdefault(owner_queue, []).append(finish)
        self._wake.set()
        await finish.told

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._wake.wait()
                self._wake.clear()
                waiting, self._waiting = self._waiting, {}
                for owner_queue, finishes in waiting.items():
                    group.create_task(self._tell(owner_queue, finishes), context=finishes[0].context)

    async def _tell(self, owner_queue: str, finishes: Sequence[_Finish]) -> None:
        """Until the broker has them all or the queue is gone; the owner knows doubles."""
        pause_s = RETRY_S
        while True:
            try:
                await self._broker.publish(owner_queue, *(each.message for each in finishes))
                break
            except Unroutable:
                log.info("owner_gone", count=len(finishes), owner_queue=owner_queue)
                break
            except (Unavailable, PublishRefused) as error:
                if isinstance(error, PublishRefused) and len(finishes) > 1:
                    # One that is too large holds up no other.
                    await asyncio.gather(*(self._tell(owner_queue, [each]) for each in finishes))
                    return
                job_ids = [each.message.job_id for each in finishes]
                log.warning("finishes_not_confirmed", job_ids=job_ids, error=str(error))
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_RETRY_S)
        for each in finishes:
            if not each.told.done():
                each.told.set_result(None)


async def tell_billing(broker: Broker, usage: JobUsage) -> None:
    """Publish the fact until the broker confirmed it; a double is recognised by its event id."""
    pause_s = RETRY_S
    while True:
        try:
            with telemetry.span("send usage.job_finished.v1"):
                return await broker.publish_event(usage)
        except (Unavailable, Unroutable, PublishRefused) as error:
            log.error("usage_not_confirmed", job_id=usage.job_id, error=str(error))
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, MAX_RETRY_S)
