"""Billing on a real broker: batches, poison, held facts, redelivery, and a process that is killed at the worst moment."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from services.billing.commands import CommandHandler
from shared import telemetry, topology
from shared.broker import Broker, Delivery
from shared.ids import new_id
from shared.messages import BillingCommand, CommandResult, JobUsage, JobVoided
from tests.conftest import Vhost
from tests.integration.billing_stand import (
    CHARGE_NANOUSD,
    insert_price,
    job_charges,
    open_stand,
    running_events,
    until,
)
from tests.unit.billing.builders import make_set_price, make_usage, make_void

ROOT = Path(__file__).resolve().parents[2]


@asynccontextmanager
async def open_broker(vhost: Vhost) -> AsyncIterator[Broker]:
    async with AsyncExitStack() as stack:
        yield await Broker.open(vhost.amqp_url, "test", stack)


async def charged(admin: asyncpg.Connection[asyncpg.Record], count: int) -> None:
    async def all_charged() -> bool:
        return len(await job_charges(admin)) >= count

    await until(all_charged)


async def queue_is_empty(broker: Broker, queue: topology.Queue = topology.BILLING_EVENTS) -> bool:
    return await broker.depth(queue) == 0


async def test_facts_from_the_queue_are_charged_and_a_bad_one_does_not_stop_the_others(
    vhost: Vhost, database: str
) -> None:
    async with open_broker(vhost) as broker, open_stand(database) as stand:
        for number in range(30):
            await broker.publish_event(make_usage(job_id=f"job_{number}"))
            if number == 15:
                await broker.publish_event(make_usage(job_id="job_bad", completion_tokens=-7))
        async with running_events(broker, stand):
            await charged(stand.admin, 30)
            await until(lambda: _depth_is(broker, topology.DEAD, 1))
        charges = await job_charges(stand.admin)
    assert charges == {f"job_{n}": (CHARGE_NANOUSD, 1) for n in range(30)}


async def _depth_is(broker: Broker, queue: topology.Queue, depth: int) -> bool:
    return await broker.depth(queue) == depth


async def test_facts_are_held_while_the_database_refuses_and_none_is_lost(
    vhost: Vhost, database: str
) -> None:
    async with open_broker(vhost) as broker, open_stand(database) as stand:
        await stand.admin.execute("ALTER TABLE billing.usage_events RENAME TO elsewhere")
        async with running_events(broker, stand):
            for number in range(10):
                await broker.publish_event(make_usage(job_id=f"job_{number}"))
            with capture_logs() as logged:
                await until(lambda: _was_logged(logged, "facts_held"))
            assert await job_charges(stand.admin) == {}
            await stand.admin.execute("ALTER TABLE billing.elsewhere RENAME TO usage_events")
            await charged(stand.admin, 10)
        assert await broker.depth(topology.DEAD) == 0


async def _was_logged(logged: Sequence[Mapping[str, Any]], event: str) -> bool:
    return any(entry["event"] == event for entry in logged)


async def test_facts_survive_that_all_sessions_are_cut(vhost: Vhost, database: str) -> None:
    async with open_broker(vhost) as broker, open_stand(database) as stand:
        async with running_events(broker, stand):
            for number in range(40):
                await broker.publish_event(make_usage(job_id=f"job_{number}"))
                if number % 10 == 5:
                    await stand.admin.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
            await charged(stand.admin, 40)
        assert await job_charges(stand.admin) == {f"job_{n}": (CHARGE_NANOUSD, 1) for n in range(40)}
        assert await broker.depth(topology.DEAD) == 0


async def test_a_fact_that_was_committed_and_never_acked_is_charged_once(vhost: Vhost, database: str) -> None:
    async with open_stand(database) as stand:
        # Given a process that commits and dies before its ack
        async with open_broker(vhost) as broker:
            taken: asyncio.Queue[Delivery] = asyncio.Queue()
            await broker.subscribe(
                topology.BILLING_EVENTS, JobUsage | JobVoided, taken.put_nowait, prefetch=10
            )
            await broker.publish_event(make_usage())
            await stand.record((await taken.get()).message)
        # When the broker delivers the fact again
        async with open_broker(vhost) as broker, running_events(broker, stand):
            await broker.publish_event(make_usage(job_id="job_2"))
            await charged(stand.admin, 2)
            await until(lambda: queue_is_empty(broker))
        # Then it is a duplicate
        assert await job_charges(stand.admin) == {"job_1": (CHARGE_NANOUSD, 1), "job_2": (CHARGE_NANOUSD, 1)}


async def test_eight_racing_consumers_charge_repeated_facts_once(vhost: Vhost, database: str) -> None:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(open_broker(vhost))
        stands = [await stack.enter_async_context(open_stand(database, priced=(n == 0))) for n in range(8)]
        for stand in stands:
            await stack.enter_async_context(
                running_events(await stack.enter_async_context(open_broker(vhost)), stand)
            )
        for _ in range(3):
            for number in range(100):
                await broker.publish_event(make_usage(job_id=f"job_{number}", team_id=f"team_{number % 7}"))
        await charged(stands[0].admin, 100)
        await until(lambda: queue_is_empty(broker))
        assert await job_charges(stands[0].admin) == {f"job_{n}": (CHARGE_NANOUSD, 1) for n in range(100)}
        assert await broker.depth(topology.DEAD) == 0


async def test_the_ledger_row_belongs_to_the_requests_trace(
    vhost: Vhost, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("test"))
    async with open_broker(vhost) as broker, open_stand(database) as stand:
        with telemetry.span("request") as request:
            await broker.publish_event(make_usage())
        async with running_events(broker, stand):
            await charged(stand.admin, 1)
            await until(lambda: _has_span(exporter, "process events.v1.billing"))
        row = await stand.admin.fetchrow("SELECT transaction_id, trace_id FROM billing.transactions")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    consumer, post = spans["process events.v1.billing"], spans["ledger.post"]
    assert row is not None
    assert row["trace_id"] == f"{request.get_span_context().trace_id:032x}"
    assert consumer.parent is not None and consumer.parent.span_id == request.get_span_context().span_id
    assert consumer.kind == trace.SpanKind.CONSUMER
    assert post.parent is not None and post.parent.span_id == consumer.context.span_id
    assert post.attributes is not None
    assert post.attributes[telemetry.TRANSACTION_ID] == row["transaction_id"]
    assert post.attributes[telemetry.JOB_ID] == "job_1"


async def _has_span(exporter: InMemorySpanExporter, name: str) -> bool:
    return any(span.name == name for span in exporter.get_finished_spans())


async def test_a_price_is_set_once_and_the_command_gets_the_same_answer_again(
    vhost: Vhost, database: str
) -> None:
    reply_queue = topology.reply_queue("test")
    answers: asyncio.Queue[Delivery] = asyncio.Queue()
    async with open_broker(vhost) as broker, open_stand(database, priced=False) as stand:
        await broker.subscribe(reply_queue, CommandResult, answers.put_nowait, prefetch=10, no_ack=True)
        commands = CommandHandler(broker, stand.database)
        task = asyncio.create_task(
            broker.consume(topology.BILLING_COMMANDS, BillingCommand, commands.on_command)
        )
        try:
            results = []
            for command in (
                make_set_price(reply_queue=reply_queue.name),
                make_set_price(reply_queue=reply_queue.name),
                make_set_price(reply_queue=reply_queue.name, command_id="cmd_2", starts_unix_ms=1),
                make_set_price(reply_queue=reply_queue.name, command_id="cmd_3", prompt_nanousd=-1),
                make_set_price(reply_queue=reply_queue.name, command_id="cmd_late", deadline_unix_ms=1),
                make_set_price(reply_queue=reply_queue.name),
            ):
                await broker.publish(topology.BILLING_COMMANDS, command)
                if command.command_id != "cmd_late":
                    results.append((await asyncio.wait_for(answers.get(), 10)).message)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        prices = await stand.admin.fetch("SELECT * FROM billing_api.prices_v1")
    assert [r.code for r in results] == ["ok", "ok", "price_starts_in_past", "invalid_price", "ok"]
    assert [price["price_id"] for price in prices] == [results[0].body["price_id"]]
    assert results[0] == results[1] == results[4]


class Process:
    """`python -m services.billing` as it is run."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, vhost: Vhost, database: str, **environment: str) -> Process:
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "services.billing",
                cwd=ROOT,
                env={
                    **os.environ,
                    "DATABASE_URL": database,
                    "AMQP_URL": vhost.amqp_url,
                    "OPS_PORT": "0",
                    "LOG_LEVEL": "WARNING",
                    **environment,
                },
            )
        )

    async def end(self, number: int) -> int:
        self._process.send_signal(number)
        return await asyncio.wait_for(self._process.wait(), 20)


@pytest.mark.timeout(180)
async def test_kill_9_between_read_and_ack_loses_and_doubles_nothing(vhost: Vhost, database: str) -> None:
    admin: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(database)
    try:
        await insert_price(admin)
        async with open_broker(vhost) as broker:
            for number in range(300):
                await broker.publish_event(make_usage(job_id=f"job_{number:03d}"))
                if number % 3 == 0:
                    await broker.publish_event(make_void(job_id=f"job_{number:03d}"))
            for round_number in range(3):
                # Given a process that has read facts and waits inside its transaction
                holder: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(database)
                blocked = holder.transaction()
                await blocked.start()
                table = ("usage_events", "requests", "entries")[round_number]
                await holder.execute(f"LOCK TABLE billing.{table} IN EXCLUSIVE MODE")
                process = await Process.start(vhost, database)
                await until(lambda: _billing_waits_for_a_lock(admin))
                # When it is killed
                await process.end(signal.SIGKILL)
                await blocked.rollback()
                await holder.close()
            # Then nothing of it was committed, and the next one finds all facts
            assert await _facts_are(admin, 0)
            process = await Process.start(vhost, database)
            await charged(admin, 300)
            await until(lambda: queue_is_empty(broker))
            await until(lambda: _facts_are(admin, 400))
            assert await process.end(signal.SIGTERM) == 0
            assert await broker.depth(topology.DEAD) == 0
        charges = await job_charges(admin)
        assert {job: amount for job, (amount, _) in charges.items()} == {
            f"job_{n:03d}": 500 if n % 3 == 0 else CHARGE_NANOUSD for n in range(300)
        }
        assert await admin.fetchval("SELECT sum(amount_nanousd) FROM billing.entries") == 0
    finally:
        await admin.close()


async def _billing_waits_for_a_lock(admin: asyncpg.Connection[asyncpg.Record]) -> bool:
    return bool(
        await admin.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'roundhouse_billing' AND wait_event_type = 'Lock' AND query LIKE '%INSERT INTO%'"
        )
    )


async def _facts_are(admin: asyncpg.Connection[asyncpg.Record], count: int) -> bool:
    return int(await admin.fetchval("SELECT count(*) FROM billing.usage_events")) == count


async def test_the_process_stops_cleanly_with_nothing_to_do(vhost: Vhost, database: str) -> None:
    admin: Any = await asyncpg.connect(database)
    try:
        await insert_price(admin)
        process = await Process.start(vhost, database)
        async with open_broker(vhost) as broker:
            await broker.publish_event(make_usage(event_id=new_id("evt")))
            await charged(admin, 1)
        assert await process.end(signal.SIGTERM) == 0
    finally:
        await admin.close()
