"""`python -m loadtest.budget_check`: what a gateway's look at its hard caps adds to a request.

The gateway's real gate in this process, billing's real process, RabbitMQ, PostgreSQL. A request is reserved and,
50 ms later, reported to billing as finished. Arrivals are open loop. First there is no cap, then there are three that are far
(of the team, the model and the key), then one that holds only a few requests at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from infra.local.scratch import execute
from loadtest.path import percentile
from loadtest.report import Row, print_table, write_json
from loadtest.stack import MODEL_TYPE, Stack, running_stack
from shared.broker import Broker
from shared.budgets.gate import BudgetGate
from shared.budgets.table import BudgetTable
from shared.database import Database
from shared.ids import new_id
from shared.inference.errors import ApiError
from shared.messages import GenerateJob, JobUsage, ModelRef, Outcome

P50_LIMIT_MS = 1.0
RATE_S = 200.0
PHASE_S = 15.0
RUNS_S = 0.05
PROMPT_TOKENS, MAX_TOKENS = 100, 50
PROMPT_NANOUSD, COMPLETION_NANOUSD = 20, 60
WORST_NANOUSD = PROMPT_TOKENS * PROMPT_NANOUSD + MAX_TOKENS * COMPLETION_NANOUSD
AMPLE_NANOUSD = 10**15
NEAR_RATE_S = 100.0
AT_ONCE = 24
"""So many requests fit under the small cap at a time."""


@dataclass
class Seen:
    """How long each look took, and how it ended."""

    taken_ms: list[float] = field(default_factory=list)
    refused: int = 0


def make_job(team_id: str) -> GenerateJob:
    now_unix_ms = time.time_ns() // 1_000_000
    return GenerateJob(
        job_id=new_id("job"),
        request_id="req_load",
        team_id=team_id,
        key_id="key_load",
        resource_id="res_pool",
        billing="ppt",
        work_class="live",
        model_type=MODEL_TYPE,
        model=ModelRef(model_id="mod_load", revision=1, name="l/m", folder="mod_load/1", signature="0" * 16),
        owner_queue="replies.v1.load",
        accepted_unix_ms=now_unix_ms,
        deadline_unix_ms=now_unix_ms + 300_000,
        operation="chat",
        prompt_tokens=[1] * PROMPT_TOKENS,
        max_tokens=MAX_TOKENS,
    )


def usage_of(job: GenerateJob, outcome: Outcome) -> JobUsage:
    return JobUsage(
        event_id=f"use_{job.job_id}_1",
        job_id=job.job_id,
        attempt=1,
        request_id=job.request_id,
        team_id=job.team_id,
        key_id=job.key_id,
        resource_id=job.resource_id,
        worker_id="wrk_load",
        billing=job.billing,
        work_class=job.work_class,
        operation=job.operation,
        model_type=job.model_type,
        model_id=job.model.model_id,
        model_name=job.model.name,
        revision=job.model.revision,
        outcome=outcome,
        prompt_tokens=PROMPT_TOKENS,
        completion_tokens=MAX_TOKENS,
        prefill_ran=True,
        accepted_unix_ms=job.accepted_unix_ms,
        finished_unix_ms=time.time_ns() // 1_000_000,
        lease_ids=job.lease_ids,
        reserved_nanousd=job.reserved_nanousd,
    )


async def measure_looks(
    gate: BudgetGate, broker: Broker, team_id: str, rate_s: float, duration_s: float, outcome: Outcome
) -> Seen:
    """Poisson arrivals of one team's requests, each from its look at the caps to the fact of its end."""
    seen = Seen()
    rng = random.Random(7)

    async def one(due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        job = make_job(team_id)
        began_s = time.perf_counter()
        try:
            reservation = await gate.reserve([job])
        except ApiError:
            seen.refused += 1
            return
        finally:
            seen.taken_ms.append((time.perf_counter() - began_s) * 1000)
        reservation.published(0)
        reservation.resolve()
        reserved = reservation.jobs[0]
        assert isinstance(reserved, GenerateJob)
        await asyncio.sleep(RUNS_S)
        await broker.publish_event(usage_of(reserved, outcome))

    due_s = time.perf_counter() + 0.2
    end_s = due_s + duration_s
    async with asyncio.TaskGroup() as group:
        while due_s < end_s:
            group.create_task(one(due_s))
            due_s += rng.expovariate(rate_s)
    return seen


def insert_budgets(database_url: str) -> None:
    """Of team_far three caps that are never near, of team_near one that holds a few requests at a time."""
    budgets = [
        ("team_far", "team", "team_far", AMPLE_NANOUSD),
        ("team_far", "model", "mod_load", AMPLE_NANOUSD),
        ("team_far", "key", "key_load", AMPLE_NANOUSD),
        ("team_near", "team", "team_near", AT_ONCE * WORST_NANOUSD),
    ]
    rows = ", ".join(
        f"('bud_{number}', '{team}', '{scope}', '{scope_id}', 'month', {limit}, '{{}}', '{{refuse_ppt}}')"
        for number, (team, scope, scope_id, limit) in enumerate(budgets)
    )
    execute(
        database_url,
        f"""
        INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at)
        VALUES ('price_load', '{MODEL_TYPE}', 'live', {PROMPT_NANOUSD}, {COMPLETION_NANOUSD}, '1970-01-01T00:00:00Z');
        INSERT INTO billing.budgets (budget_id, team_id, scope, scope_id, period, limit_nanousd, alert_percents, actions)
        VALUES {rows}
        """,
    )


async def measure(stack: Stack, phase_s: float) -> list[Row]:
    insert_budgets(stack.database_url)
    await asyncio.to_thread(stack.start_service, "billing")
    async with AsyncExitStack() as opened:
        database = await Database.open(stack.database_url, "roundhouse_gateway", opened)
        broker = await Broker.open(stack.amqp_url, "loadtest", opened)
        table = BudgetTable(database)
        await table.refresh()
        gate = BudgetGate(broker, table, new_id("gw"), 300)
        group = await opened.enter_async_context(asyncio.TaskGroup())
        await gate.start(group)
        free = await measure_looks(gate, broker, "team_free", RATE_S, phase_s, "succeeded")
        far = await measure_looks(gate, broker, "team_far", RATE_S, phase_s, "succeeded")
        # They cost nothing in the end, so that the cap stays as near as it is.
        near = await measure_looks(gate, broker, "team_near", NEAR_RATE_S, phase_s, "failed")
        await gate.drain()
        for task in group._tasks.copy():
            task.cancel()
    p50_ms = statistics.median(far.taken_ms)
    return [
        Row("without a cap, p50", "ms", statistics.median(free.taken_ms)),
        Row("under three caps, p50", "ms", p50_ms, None, P50_LIMIT_MS / p50_ms, 1.0),
        Row("under three caps, p99", "ms", percentile(far.taken_ms, 0.99)),
        Row("under three caps, refused", "requests", far.refused),
        Row("at the cap, p50", "ms", statistics.median(near.taken_ms)),
        Row("at the cap, p99", "ms", percentile(near.taken_ms, 0.99)),
        Row("at the cap, refused", f"of {len(near.taken_ms)}", near.refused),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.budget_check", description=__doc__)
    parser.add_argument("--phase-s", type=float, default=PHASE_S, help="length of each of the three phases")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with running_stack() as stack:
        rows = uvloop.run(measure(stack, arguments.phase_s))
    print_table(rows)
    if arguments.json:
        write_json(rows, arguments.json)
    return 1 if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
