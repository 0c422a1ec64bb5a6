"""A process with a gateway's real budget gate, for tests that kill one: `python -m tests.integration.budget_gateway`.

It reserves for many requests at once when it is told to. Each that gets its reservation is written down at once, for
what is true whatever happens to this process, and then reported to billing as if a worker had run it to its end.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import AsyncExitStack

from shared.broker import Broker
from shared.budgets.gate import BudgetGate, Reservation
from shared.budgets.table import BudgetTable
from shared.database import Database
from shared.ids import new_id
from shared.inference.errors import ApiError
from shared.messages import GenerateJob, JobUsage, JobVoided, ModelRef

PROMPT_TOKENS, MAX_TOKENS = 10, 20
WORST_NANOUSD = PROMPT_TOKENS * 20 + MAX_TOKENS * 60
"""At the price of `billing_stand.insert_price`."""


def make_job(**fields: object) -> GenerateJob:
    now_unix_ms = time.time_ns() // 1_000_000
    values = {
        "job_id": new_id("job"),
        "request_id": "req_1",
        "team_id": "team_a",
        "key_id": "key_a",
        "resource_id": "res_pool",
        "billing": "ppt",
        "work_class": "live",
        "model_type": "smollm2-135m",
        "model": ModelRef(model_id="mod_a", revision=1, name="a/m", folder="mod_a/1", signature="0" * 16),
        "owner_queue": "replies.v1.gw",
        "accepted_unix_ms": now_unix_ms,
        "deadline_unix_ms": now_unix_ms + 300_000,
        "operation": "chat",
        "prompt_tokens": [1] * PROMPT_TOKENS,
        "max_tokens": MAX_TOKENS,
        **fields,
    }
    return GenerateJob(**values)  # type: ignore[arg-type]


def usage_of(job: GenerateJob, completion_tokens: int) -> JobUsage:
    now_unix_ms = time.time_ns() // 1_000_000
    return JobUsage(
        event_id=f"use_{job.job_id}_1",
        job_id=job.job_id,
        attempt=1,
        request_id=job.request_id,
        team_id=job.team_id,
        key_id=job.key_id,
        resource_id=job.resource_id,
        worker_id="wrk_1",
        billing=job.billing,
        work_class=job.work_class,
        operation=job.operation,
        model_type=job.model_type,
        model_id=job.model.model_id,
        model_name=job.model.name,
        revision=job.model.revision,
        outcome="succeeded",
        prompt_tokens=job.input_token_count,
        completion_tokens=completion_tokens,
        prefill_ran=True,
        accepted_unix_ms=job.accepted_unix_ms,
        finished_unix_ms=now_unix_ms,
        lease_ids=job.lease_ids,
        reserved_nanousd=job.reserved_nanousd,
    )


def void_of(job: GenerateJob, *, had_worker: bool) -> JobVoided:
    """The gateway's word that its client went before the first token."""
    usage = usage_of(job, 0)
    shared = {
        name: getattr(usage, name) for name in JobVoided.__struct_fields__ if name in usage.__struct_fields__
    }
    return JobVoided(
        **shared | {"event_id": f"void_{job.job_id}"},
        reason="client_gone",
        delivered_tokens=0,
        voided_unix_ms=usage.finished_unix_ms,
        had_worker=had_worker,
    )


async def main(database_url: str, amqp_url: str, requests: int, completion_tokens: int) -> None:
    async with AsyncExitStack() as stack:
        database = await Database.open(database_url, "roundhouse_gateway", stack)
        broker = await Broker.open(amqp_url, "gateway", stack)
        table = BudgetTable(database)
        await table.refresh()
        gate = BudgetGate(broker, table, new_id("gw"), 300)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        await gate.start(group)
        say("ready")
        await asyncio.to_thread(sys.stdin.readline)

        async def one() -> None:
            try:
                reservation = await reserve_as_clients_do(gate)
            except ApiError as error:
                say(f"refused {error.status} {error.code} {error.headers.get('x-should-retry')}")
                return
            job = reservation.jobs[0]
            say(f"accepted {job.job_id} {job.reserved_nanousd}")
            reservation.published(0)
            reservation.resolve()
            assert isinstance(job, GenerateJob)
            await broker.publish_event(usage_of(job, completion_tokens))

        await asyncio.gather(*(one() for _ in range(requests)))
        await gate.drain()
        say("done")
        for task in group._tasks.copy():
            task.cancel()


async def reserve_as_clients_do(gate: BudgetGate) -> Reservation:
    """Try again when told that it is worth it: what is left is in other gateways' slices, or reserved by running jobs."""
    for _ in range(60):
        try:
            return await gate.reserve([make_job()])
        except ApiError as error:
            if error.headers.get("x-should-retry") != "true":
                raise
            await asyncio.sleep(0.25)
    return await gate.reserve([make_job()])


def say(line: str) -> None:
    os.write(1, (line + "\n").encode())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
