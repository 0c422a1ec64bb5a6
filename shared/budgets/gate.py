"""Reserves what a request may cost from the slices of all hard caps that it is under; most find it in memory.

The decisions are `slices`'s and `caps`'s; this module asks billing over the broker, and wakes who waits.
A request without a hard cap passes through here without waiting for anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import structlog

from shared import topology
from shared.broker import Broker, Delivery
from shared.budgets.caps import (
    Cap,
    TokenPrice,
    caps_on,
    refusal_of_cap,
    refusal_when_silent,
    refusal_without_price,
    with_leases,
    worst_case_nanousd,
)
from shared.budgets.period import day_of, period_start
from shared.budgets.slices import Answer, Ask, Denied, Outcome, Slice, SliceKey, Taken
from shared.ids import new_id
from shared.messages import AskBudget, BudgetLeased, JobQueueMessage, LeaseClosed
from shared.outcomes import Unavailable

log = structlog.get_logger()

TICK_S = 0.1
WAIT_S = 2.0
ASK_KEPT_S = 10.0
"""Billing answers an ask that is no older, by two machines' clocks. An answer that comes too late does no harm."""
DRAIN_S = 1.0


class Caps(Protocol):
    """What of `shared.budgets.table.BudgetTable` is used here."""

    def caps_of_team(self, team_id: str) -> list[Cap]: ...

    def prices_of(self, model_type: str, work_class: str) -> list[TokenPrice]: ...


class Reservation:
    """What one request holds of its slices until it is known which of its jobs run."""

    def __init__(
        self,
        jobs: Sequence[JobQueueMessage],
        taken: Sequence[tuple[Slice, str]] = (),
        amounts: Sequence[int] = (),
    ) -> None:
        self._taken = taken
        self._unpublished = dict(enumerate(amounts))
        lease_ids = [lease_id for _, lease_id in taken]
        self.jobs = with_leases(jobs, lease_ids, amounts) if taken else list(jobs)

    def published(self, index: int) -> None:
        """The job may run: billing will hear of its end."""
        self._unpublished.pop(index, None)

    def resolve(self) -> None:
        """No job is published any more: give back what was reserved for those that were not."""
        taken, self._taken = self._taken, ()
        for of, lease_id in taken:
            of.resolve(lease_id, sum(self._unpublished.values()))


class BudgetGate:
    """All slices of this process. One task alone asks billing for them."""

    def __init__(self, broker: Broker, caps: Caps, gateway_id: str, job_deadline_s: float) -> None:
        self._broker = broker
        self._caps = caps
        self._gateway_id = gateway_id
        self._job_deadline_s = int(job_deadline_s) + 1
        self._reply_queue = topology.reply_queue(f"{gateway_id}-budgets")
        self._slices: dict[SliceKey, Slice] = {}
        self._waiting: dict[str, asyncio.Future[Outcome]] = {}
        self._wake = asyncio.Event()

    def is_capped(self, job: JobQueueMessage) -> bool:
        """Whether the job is under any hard cap, as far as is known now."""
        return bool(caps_on(self._caps.caps_of_team(job.team_id), job))

    async def reserve(self, jobs: Sequence[JobQueueMessage]) -> Reservation:
        """Reserve the worst case of one request's jobs. Raises `ApiError` 402 or 503.

        A request waits for one answer of billing, `WAIT_S` at most, and only if its slice has not enough left.
        """
        first = jobs[0]
        caps = caps_on(self._caps.caps_of_team(first.team_id), first)
        if not caps:
            return Reservation(jobs)
        amounts = []
        for job in jobs:
            amount = worst_case_nanousd(job, self._caps.prices_of(job.model_type, job.work_class))
            if amount is None:
                raise refusal_without_price(job.model_type)
            amounts.append(amount)
        day = day_of(first.accepted_unix_ms)
        wanted = [(cap, SliceKey(cap.budget_id, period_start(cap.period, day))) for cap in caps]
        return Reservation(jobs, await self._take(wanted, sum(amounts)), amounts)

    async def _take(self, wanted: Sequence[tuple[Cap, SliceKey]], amount: int) -> list[tuple[Slice, str]]:
        """Take the amount from every slice, or from none."""
        taken: list[tuple[Slice, str]] = []
        waiting: list[tuple[Cap, Slice, str]] = []
        now_s = time.monotonic()
        slices = [(cap, self._slices.setdefault(key, Slice(lambda: new_id("lease")))) for cap, key in wanted]
        for cap, of in slices:
            if of.is_denied(amount, now_s):
                raise refusal_of_cap(cap, spent_up=True)
        for cap, of in slices:
            lease_id = of.take(amount, now_s)
            if lease_id is not None:
                taken.append((of, lease_id))
            else:
                waiting.append((cap, of, self._wait_for(of, amount)))
        if not waiting:
            return taken
        try:
            async with asyncio.timeout(WAIT_S):
                for cap, of, waiter in waiting:
                    outcome = await self._waiting[waiter]
                    if isinstance(outcome, Denied):
                        raise refusal_of_cap(cap, spent_up=outcome.spent_up)
                    if not isinstance(outcome, Taken):
                        raise refusal_when_silent()
                    taken.append((of, outcome.lease_id))
        except BaseException as error:
            self._undo(taken, waiting, amount)
            if isinstance(error, TimeoutError):
                raise refusal_when_silent() from error
            raise
        finally:
            for _, _, waiter in waiting:
                del self._waiting[waiter]
        return taken

    def _wait_for(self, of: Slice, amount: int) -> str:
        waiter = new_id("wait")
        of.wait(waiter, amount)
        self._waiting[waiter] = asyncio.get_running_loop().create_future()
        self._wake.set()
        return waiter

    def _undo(
        self, taken: Sequence[tuple[Slice, str]], waiting: Sequence[tuple[Cap, Slice, str]], amount: int
    ) -> None:
        known = {lease_id for _, lease_id in taken}
        for of, lease_id in taken:
            of.resolve(lease_id, amount)
        for _, of, waiter in waiting:
            of.forget(waiter)
            future = self._waiting[waiter]
            outcome = future.result() if future.done() and not future.cancelled() else None
            if isinstance(outcome, Taken) and outcome.lease_id not in known:
                of.resolve(outcome.lease_id, amount)

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Listen for billing's answers and ask; ends with the group."""
        await self._broker.subscribe(self._reply_queue, BudgetLeased, self._receive, prefetch=0, no_ack=True)
        group.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            await self._tick()
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue  # leases end by the clock

    async def _tick(self) -> None:
        for key, of in list(self._slices.items()):
            ask, outcomes = of.tick(time.monotonic())
            self._tell(of, outcomes)
            if of.is_idle(time.monotonic()):
                del self._slices[key]
            if ask is not None:
                await self._send(key, ask)

    async def _send(self, key: SliceKey, ask: Ask) -> None:
        message = AskBudget(
            lease_id=ask.lease_id,
            budget_id=key.budget_id,
            period_start=key.period_start,
            gateway_id=self._gateway_id,
            reply_queue=self._reply_queue.name,
            deadline_unix_ms=int((time.time() + ASK_KEPT_S) * 1000),
            needs_nanousd=list(ask.needs_nanousd),
            wanted_nanousd=ask.wanted_nanousd,
            unit_nanousd=ask.unit_nanousd,
            job_deadline_s=self._job_deadline_s,
            closed=[LeaseClosed(lease_id=lease_id, spent_nanousd=spent) for lease_id, spent in ask.closed],
        )
        try:
            await self._broker.send(topology.BILLING_BUDGETS, message)
        except Unavailable as error:
            log.info("budget_not_asked", budget_id=key.budget_id, error=str(error))  # it is asked again

    def _receive(self, delivery: Delivery) -> None:
        said: BudgetLeased = delivery.message
        of = self._slices.get(SliceKey(said.budget_id, said.period_start))
        if of is None:
            return
        answer = Answer(
            said.lease_id,
            said.granted_nanousd,
            said.valid_ms / 1000,
            said.refused,
            said.unposted_nanousd,
            said.closed,
        )
        self._tell(of, of.on_answer(answer, time.monotonic()))
        self._wake.set()

    def _tell(self, of: Slice, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            future = self._waiting.get(outcome.waiter)
            if future is not None and not future.done():
                future.set_result(outcome)
            elif isinstance(outcome, Taken):
                of.resolve(
                    outcome.lease_id, outcome.amount
                )  # whoever waited was cancelled at this very moment

    async def drain(self) -> None:
        """Hand all slices back before the gateway stops; what does not arrive is written off by billing in time."""
        for of in self._slices.values():
            of.drain()
        deadline_s = time.monotonic() + DRAIN_S
        while self._slices and time.monotonic() < deadline_s:
            self._wake.set()
            await asyncio.sleep(TICK_S / 2)
