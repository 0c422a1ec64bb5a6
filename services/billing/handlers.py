"""Takes facts from the broker, hands them to what decides and stores, and settles the deliveries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from services.billing.instruments import Instruments
from services.billing.intake import Arrival, Intake, Posted
from services.billing.payments_store import PaymentIntake
from shared import telemetry, topology
from shared.broker import Broker, Delivery
from shared.messages import JobUsage, JobVoided, PaymentReported, type_of
from shared.outcomes import Done, Outcome, Unavailable

log = structlog.get_logger()

BATCH_EVENTS = 200
"""Enough to make a commit cheap for each event, few enough to lock and write within tens of milliseconds."""
BATCH_WAIT_S = 0.05
PREFETCH = 2 * BATCH_EVENTS  # the next batch is here when one is committed
RETRY_S = 0.5
MAX_RETRY_S = 5.0


class EventHandler:
    """Reads the queue of facts in batches: one transaction for each batch, acks after its commit."""

    def __init__(
        self, broker: Broker, intake: Intake, payments: PaymentIntake, instruments: Instruments
    ) -> None:
        self._broker = broker
        self._intake = intake
        self._payments = payments
        self._instruments = instruments
        self._waiting: asyncio.Queue[Delivery] = asyncio.Queue()
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Take facts until `stopping`; then give up what was not begun: the broker delivers it again."""
        subscription = await self._broker.subscribe(
            topology.BILLING_EVENTS,
            JobUsage | JobVoided | PaymentReported,
            self._waiting.put_nowait,
            prefetch=PREFETCH,
        )
        try:
            while not stopping.is_set():
                batch = await self._next_batch()
                self._idle.clear()
                await self._settle([each for each in batch if not isinstance(each.message, PaymentReported)])
                for delivery in batch:  # few, and each for itself
                    if isinstance(delivery.message, PaymentReported):
                        await self._broker.settle(delivery, self._record_payment)
                self._idle.set()
        finally:
            await asyncio.shield(subscription.cancel())

    async def drained(self) -> None:
        """Return when no batch is being settled."""
        await self._idle.wait()

    async def _next_batch(self) -> list[Delivery]:
        """Wait for one delivery, then for more until the batch is full or `BATCH_WAIT_S` is over."""
        batch = [await self._waiting.get()]
        deadline_s = time.monotonic() + BATCH_WAIT_S
        while len(batch) < BATCH_EVENTS:
            if self._waiting.empty():
                try:
                    async with asyncio.timeout(max(deadline_s - time.monotonic(), 0)):
                        batch.append(await self._waiting.get())
                except TimeoutError:
                    break
            else:
                batch.append(self._waiting.get_nowait())
        return batch

    async def _settle(self, batch: Sequence[Delivery]) -> None:
        """Commit the batch and ack it; hold it while the database is away; find the one that spoils it, if any."""
        if not batch:
            return
        pause_s = RETRY_S
        while True:
            try:
                await self._record(batch)
                break
            except Unavailable as error:
                log.warning("facts_held", count=len(batch), reason=str(error), after_s=pause_s)
                self._idle.set()  # nothing is half done: a stop need not wait for the database
                await asyncio.sleep(pause_s)
                self._idle.clear()
                pause_s = min(pause_s * 2, MAX_RETRY_S)
            except Exception as error:  # noqa: BLE001 - each delivery gets its own outcome, logged there
                log.warning("batch_spoiled", count=len(batch), error=type(error).__name__)
                for delivery in batch:
                    await self._broker.settle(delivery, self._record_alone)
                return
        for delivery in batch:
            await delivery.ack()

    async def _record_payment(self, delivery: Delivery) -> Outcome:
        await self._payments.record([delivery.message])
        return Done()

    async def _record_alone(self, delivery: Delivery) -> Outcome:
        try:
            await self._record([delivery])
        except Unavailable:
            raise
        except Exception:
            self._instruments.events.add(1, {"type": type_of(delivery.message), "result": "rejected"})
            raise  # `settle` puts it into the dead-letter queue with the reason
        return Done()

    async def _record(self, batch: Sequence[Delivery]) -> None:
        spans = [_start_span(delivery) for delivery in batch]
        try:
            arrivals = [Arrival(d.message, _trace_id(s)) for d, s in zip(batch, spans, strict=True)]
            started_ns = time.time_ns()
            posted = await self._intake.record(arrivals)
            _record_posts(batch, spans, posted, started_ns)
            now_ms = time.time_ns() // 1_000_000
            for delivery in batch:
                self._instruments.lag_s.record(max(0, now_ms - _ended_unix_ms(delivery.message)) / 1000)
        finally:
            for span in spans:
                span.end()


def _start_span(delivery: Delivery) -> Span:
    attributes = {
        telemetry.MESSAGING_SYSTEM: "rabbitmq",
        telemetry.MESSAGING_DESTINATION: delivery.queue,
        telemetry.MESSAGING_OPERATION: "process",
        telemetry.JOB_ID: delivery.message.job_id,
        telemetry.TEAM_ID: delivery.message.team_id,
    }
    with telemetry.remote_context(delivery.headers):
        return telemetry.tracer().start_span(
            f"process {delivery.queue}", kind=SpanKind.CONSUMER, attributes=attributes
        )


def _trace_id(span: Span) -> str | None:
    context = span.get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None


def _record_posts(
    batch: Sequence[Delivery], spans: Sequence[Span], posted: Sequence[Posted], started_ns: int
) -> None:
    """A `ledger.post` span under the span of the (first) delivery that brought the job's fact."""
    parents: dict[str, Span] = {}
    for delivery, span in zip(batch, spans, strict=True):
        parents.setdefault(delivery.message.job_id, span)
    for transaction in posted:
        span = telemetry.tracer().start_span(
            "ledger.post",
            context=trace.set_span_in_context(parents[transaction.job_id]),
            start_time=started_ns,
            attributes={
                telemetry.JOB_ID: transaction.job_id,
                telemetry.TRANSACTION_ID: transaction.transaction_id,
            },
        )
        span.end()


def _ended_unix_ms(fact: JobUsage | JobVoided) -> int:
    return fact.finished_unix_ms if isinstance(fact, JobUsage) else fact.voided_unix_ms
