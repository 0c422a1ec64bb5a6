"""`python -m loadtest.billing_catchup`: billing was down under load; is anything lost, and how fast does it catch up?

Everything is real: gateway, a worker with a stub engine, RabbitMQ, PostgreSQL, billing's own process. Requests are
measured twice, while billing runs and while it is down; then the queue gets as many facts as a long outage leaves
behind, and billing starts. Half of the facts are of jobs that were reserved from slices of budgets, which have to be let
go. Arrivals are open loop, as in `loadtest.path`. `--down-s 600` keeps billing down for ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import uvloop

from infra.local.scratch import execute
from loadtest.path import Client, measure_latency, percentile
from loadtest.report import Row, print_table, write_json
from loadtest.stack import MODEL_TYPE, Stack, running_stack
from shared.broker import Broker
from shared.messages import JobUsage, Timings

FLOOR_EVENTS_S = 1000.0
FACTS = 30_000
TEAMS = 25
REQUESTS_S = 20.0
PHASE_S = 8.0
PUBLISHING = 200
"""Facts that wait for the broker's confirmation at once."""
PROMPT_TOKENS, COMPLETION_TOKENS = 100, 50
PROMPT_NANOUSD, COMPLETION_NANOUSD = 20, 60
LEASE_FACTS = 20
"""Jobs that were reserved from one slice."""
JOB_NANOUSD = PROMPT_TOKENS * PROMPT_NANOUSD + COMPLETION_TOKENS * COMPLETION_NANOUSD
CATCH_UP_LIMIT_S = 300.0
SLOWER_LIMIT = 2.0
"""No request waits for billing, so its absence must not be felt; medians of short phases differ by less than this."""


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """What the ledger had when every fact was in it, and how long that took from the start of billing's process."""

    jobs: int
    charges: int
    charged_nanousd: int
    recorded: int
    """Of the requests that were measured."""
    held_leases: int
    start_s: float
    work_s: float


def facts(count: int, accepted_unix_ms: int) -> Iterator[JobUsage]:
    """Finished jobs of many teams, each a different one."""
    for number in range(count):
        yield JobUsage(
            event_id=f"evt_outage_{number}",
            job_id=f"job_outage_{number}",
            request_id=f"req_outage_{number}",
            team_id=f"team_outage_{number % TEAMS}",
            key_id=f"key_outage_{number % TEAMS}",
            resource_id="res_outage",
            billing="ppt",
            work_class="live",
            operation="chat",
            model_type=MODEL_TYPE,
            model_id="model_outage",
            model_name="load/outage",
            revision=1,
            prompt_tokens=PROMPT_TOKENS,
            accepted_unix_ms=accepted_unix_ms,
            attempt=1,
            worker_id="wrk_outage",
            outcome="succeeded",
            completion_tokens=COMPLETION_TOKENS,
            prefill_ran=True,
            finished_unix_ms=accepted_unix_ms + 900,
            first_token_unix_ms=accepted_unix_ms + 100,
            timings=Timings(queue_ms=1.0, prefill_ms=20.0, decode_ms=300.0),
            lease_ids=[] if (lease_id := lease_of(number)) is None else [lease_id],
            reserved_nanousd=0 if lease_of(number) is None else JOB_NANOUSD,
        )


def lease_of(number: int) -> str | None:
    """The slice that the job was reserved from: every other team has a cap."""
    team = number % TEAMS
    return f"lease_outage_{team}_{number // TEAMS // LEASE_FACTS}" if team % 2 else None


def keep_leases(database_url: str, count: int) -> None:
    """The slices' rows, as gateways closed them: all that was spent of each is reserved by its jobs."""
    spent = Counter(lease_id for number in range(count) if (lease_id := lease_of(number)) is not None)
    values = ", ".join(
        f"('{lease_id}', 'bud_outage', current_date, 'gw_outage', {jobs * JOB_NANOUSD}, '{{}}', 0,"
        f" {jobs * JOB_NANOUSD}, now() + interval '1 hour')"
        for lease_id, jobs in spent.items()
    )
    execute(
        database_url,
        "INSERT INTO billing.budget_leases (lease_id, budget_id, period_start, gateway_id, granted_nanousd, refused,"
        f" unposted_nanousd, spent_nanousd, horizon_at) VALUES {values}",
    )


async def publish_all(amqp_url: str, count: int) -> None:
    """Put the facts into billing's queue, each confirmed by the broker."""
    waiting = facts(count, time.time_ns() // 1_000_000)

    async def publish_next(broker: Broker) -> None:
        for fact in waiting:
            await broker.publish_event(fact)

    async with AsyncExitStack() as stack:
        broker = await Broker.open(amqp_url, "loadtest", stack)
        await asyncio.gather(*(publish_next(broker) for _ in range(PUBLISHING)))


async def _recorded(admin: Any, live_requests: int) -> int:
    """Request records of those that were measured, once all are there; they lie behind the others in the queue."""
    async with asyncio.timeout(CATCH_UP_LIMIT_S):
        while True:
            found = await admin.fetchval(
                "SELECT count(*) FROM billing.requests WHERE job_id NOT LIKE 'job_outage_%'"
            )
            if found >= live_requests:
                return int(found)
            await asyncio.sleep(0.25)


async def catch_up(stack: Stack, count: int, live_requests: int) -> CaughtUp:
    """Start billing and wait until all facts are charged. Raises `TimeoutError`. live_requests: all that were asked."""
    began_s = time.perf_counter()
    admin = await asyncpg.connect(stack.database_url)
    try:
        start = asyncio.create_task(asyncio.to_thread(stack.start_service, "billing"))
        first_s: float | None = None
        async with asyncio.timeout(CATCH_UP_LIMIT_S):
            while True:
                # By the primary key's index: looking must not cost what is measured.
                done = await admin.fetchval(
                    "SELECT count(*) FROM billing.usage_events WHERE event_id LIKE 'evt_outage_%'"
                )
                if done and first_s is None:
                    first_s = time.perf_counter()
                if done == count:
                    break
                await asyncio.sleep(0.25)
        ended_s = time.perf_counter()
        await start
        row = await admin.fetchrow(
            """
            SELECT count(DISTINCT job_id) AS jobs, count(*) AS charges, -sum(amount_nanousd)::bigint AS amount,
                   (SELECT count(*) FROM billing_api.held_leases_v1 WHERE lease_id LIKE 'lease_outage_%') AS held
            FROM billing_api.ledger_v1 WHERE job_id LIKE 'job_outage_%' AND account_id = 'team:' || team_id
            """
        )
        recorded = await _recorded(admin, live_requests)
    finally:
        await admin.close()
    assert row is not None and first_s is not None
    # The first look that saw a fact was up to one pause late, so the rate counts the whole time since the process began
    # to read: the pause is added.
    return CaughtUp(
        row["jobs"],
        row["charges"],
        row["amount"],
        recorded,
        row["held"],
        first_s - began_s,
        ended_s - first_s + 0.25,
    )


async def measure(stack: Stack, count: int, phase_s: float, down_s: float) -> list[Row]:
    set_price(stack.database_url)
    keep_leases(stack.database_url, count)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        client = Client(stack, session)
        await asyncio.to_thread(stack.start_worker, "worker", step_s=0.0, max_batch=64)
        await asyncio.to_thread(stack.start_service, "billing")
        warm_up = await measure_latency(client, REQUESTS_S, 2.0)
        with_billing = await measure_latency(client, REQUESTS_S, phase_s)
        await asyncio.to_thread(stack.stop, "billing")
        without = await measure_latency(client, REQUESTS_S, down_s)
        await publish_all(stack.amqp_url, count)
        live_requests = len(warm_up) + len(with_billing) + len(without)
        caught_up = await catch_up(stack, count, live_requests)
        await asyncio.to_thread(stack.stop, "billing")
    rate = count / caught_up.work_s
    whole = (caught_up.jobs, caught_up.charges, caught_up.charged_nanousd) == (
        count,
        count,
        count * JOB_NANOUSD,
    )
    kept = caught_up.recorded == live_requests
    rows = [
        Row("facts charged", f"of {count:,}, once each", caught_up.charges, None, float(whole), 1.0),
        Row("slices left over", "leases", caught_up.held_leases, None, float(not caught_up.held_leases), 1.0),
        Row("requests recorded", f"of {live_requests:,}", caught_up.recorded, None, float(kept), 1.0),
        Row("catching up", "facts/s", rate, None, rate / FLOOR_EVENTS_S, 1.0),
        Row("from the start of the process to the first charge", "s", caught_up.start_s),
    ]
    before_ms = statistics.median(with_billing)
    down_ms = statistics.median(without)
    rows.append(Row("request p50, billing running", "ms", before_ms))
    rows.append(
        Row("request p50, billing down", "ms", down_ms, before_ms, SLOWER_LIMIT * before_ms / down_ms, 1.0)
    )
    rows.append(Row("request p99, billing running", "ms", percentile(with_billing, 0.99)))
    rows.append(Row("request p99, billing down", "ms", percentile(without, 0.99)))
    return rows


def set_price(database_url: str) -> None:
    execute(
        database_url,
        f"""
        INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at)
        VALUES ('price_load', '{MODEL_TYPE}', 'live', {PROMPT_NANOUSD}, {COMPLETION_NANOUSD}, '1970-01-01T00:00:00Z')
        """,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.billing_catchup", description=__doc__)
    parser.add_argument("--facts", type=int, default=FACTS, help="how many facts the outage leaves behind")
    parser.add_argument("--phase-s", type=float, default=PHASE_S, help="length of each phase of requests")
    parser.add_argument(
        "--down-s", type=float, help="how long requests go on while billing is down; default: a phase"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with running_stack() as stack:
        down_s = arguments.down_s or arguments.phase_s
        rows = uvloop.run(measure(stack, arguments.facts, arguments.phase_s, down_s))
    print_table(rows)
    if arguments.json:
        write_json(rows, arguments.json)
    return 1 if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
