"""The scaling simulator beside a real run: the same arrivals, the same rule, real workers around the stub engine.

A real scheduler, node agent, RabbitMQ and PostgreSQL; workers are processes that take a set time to start and generate at a set
pace, and are scaled between one and three. Then the simulator plays the same arrivals with the start time and the pace
that were seen, for both are a little longer on a busy machine. What is compared is how long jobs waited until they ran.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import msgspec

from infra.local.layout import ROOT
from infra.local.scratch import execute, scratch_database, scratch_vhost
from infra.local.testservers import running_servers
from loadtest.report import Row, print_table, write_json
from loadtest.scaling_rules import Ours
from loadtest.scaling_simulation import Arrival, Machine, World
from services.gateway.owner import Finished, Owner
from services.scheduler.scaling_policy import TUNING
from shared import topology
from shared.broker import Broker
from shared.ids import new_id
from shared.messages import GenerateJob, JobVoided, ModelRef, SamplingParams
from shared.model_folder import ModelManifest

MODEL = ModelRef(model_id="mod_stub", revision=1, name="team/stub", folder="mod_stub/1", signature="0" * 16)
STEP_S, MAX_BATCH = 0.04, 4
"""A worker does a hundred tokens a second, which leaves most of a small machine to what is measured."""
START_S = 12.0
"""Beside what starting a process takes. Without it a busy machine would make of three seconds ten, now and then."""
LEAST, MOST = 1, 3
DOWN_S = 20.0
NO_CROWDS = 1.0
"""A share that no crowd is worth: workers come for each crowd and go after it, so that starts are in the waits."""
CROWDS = ((20.0, 40.0), (75.0, 90.0), (120.0, 150.0))
QUIET_PER_S, CROWD_PER_S = 0.6, 6.0
READY_LIMIT_S, JOBS_LIMIT_S = 60.0, 300.0
FLOOR, TARGET = 0.8, 0.9
"""The means lie within a fifth of each other."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Of the real run. token_s: the mean time of a token; starts_s: of the starts after the first job had come."""

    waits_s: list[float]
    token_s: float
    starts_s: list[float]

    @property
    def start_s(self) -> float:
        return statistics.mean(self.starts_s)


def arrivals(seconds: float, seed: int) -> Iterator[Arrival]:
    """A quiet stream with crowds in it; answers of some forty tokens."""
    rng = random.Random(seed)
    at = rng.expovariate(CROWD_PER_S)
    while at < seconds:
        rate = CROWD_PER_S if any(begin <= at < end for begin, end in CROWDS) else QUIET_PER_S
        if rng.random() < rate / CROWD_PER_S:
            yield Arrival(at, 3, min(max(int(rng.lognormvariate(3.5, 0.6)), 4), 200))
        at += rng.expovariate(CROWD_PER_S)


def simulate(jobs: list[Arrival], start_s: float, token_s: float, seconds: float) -> list[float]:
    """The wait of each job; a worker gives a token to each of its jobs in one step, the stub engine's prompts are free."""
    machine = Machine(start_s=start_s, max_batch=MAX_BATCH, base_s=token_s, per_job_s=0.0, prompt_weight=0.0)
    tuning = msgspec.structs.replace(TUNING, down_window_s=DOWN_S, crowd_share=NO_CROWDS)
    outcome = World(machine, jobs).run(Ours((LEAST, MOST), tuning), LEAST, seconds)
    return outcome.waits_s


def compare(jobs: list[Arrival], seen: Seen, seconds: float) -> list[Row]:
    """The rows of the report. The ratio is the smaller mean over the larger one, whichever that is."""
    real = statistics.mean(seen.waits_s)
    simulated = statistics.mean(simulate(jobs, seen.start_s, seen.token_s, seconds))
    agreement = min(real, simulated) / max(real, simulated)
    label = f"mean wait of {len(jobs)} jobs, simulated beside real"
    return [
        Row(label, "s", simulated, real, agreement, FLOOR, TARGET),
        Row("a start in the real run", "s", seen.start_s),
        Row("the longest start in the real run", "s", max(seen.starts_s)),
        Row("a token in the real run", "ms", 1000 * seen.token_s),
        Row("starts in the real run", "", len(seen.starts_s)),
    ]


class RealRun:
    """The processes, and the jobs' owner, which is this one."""

    def __init__(self, amqp_url: str, database_url: str, folder: Path) -> None:
        self._amqp_url, self._database_url, self._folder = amqp_url, database_url, folder
        self._resource_id = new_id("res")

    async def play(self, jobs: list[Arrival]) -> Seen:
        _make_store(self._folder / "store")
        execute(
            self._database_url,
            _ROWS.format(resource=self._resource_id, batch=MAX_BATCH, least=LEAST, most=MOST),
        )
        processes = [self._start("services.scheduler"), self._start("services.worker.agent")]
        try:
            async with AsyncExitStack() as stack:
                database = await asyncpg.connect(self._database_url)
                stack.push_async_callback(database.close)
                broker = await Broker.open(self._amqp_url, "scaling", stack)
                owner = Owner(broker, _no_void, lambda result: None)
                group = await stack.enter_async_context(asyncio.TaskGroup())
                await owner.start(group)
                serving = list(group._tasks)
                await self._until_live(database)
                began = await database.fetchval("SELECT now()")
                ends = await asyncio.wait_for(self._ask_all(owner, jobs), JOBS_LIMIT_S)
                took = await database.fetch(
                    "SELECT extract(epoch FROM ended_at - granted_at)::float8 AS s FROM scheduler.starts"
                    " WHERE succeeded AND granted_at > $1",
                    began,
                )
                for task in serving:
                    task.cancel()
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait(60)
        if not took:
            raise RuntimeError("no crowd was large enough to start a worker")
        ran_s = sum(end.timings.prefill_ms + end.timings.decode_ms for end in ends) / 1000
        return Seen(
            waits_s=[end.timings.queue_ms / 1000 for end in ends],
            token_s=ran_s / sum(end.completion_tokens for end in ends),
            starts_s=[row["s"] for row in took],
        )

    def _start(self, module: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "AMQP_URL": self._amqp_url,
            "DATABASE_URL": self._database_url,
            "OPS_PORT": "0",
            "LOG_LEVEL": "WARNING",
            "ROUNDHOUSE_HOME": str(self._folder / "home"),
            "ROUNDHOUSE_NODE_ID": "node-scaling",
            "ROUNDHOUSE_DEVICES": ",".join(f"cpu:{number}" for number in range(MOST)),
            "ROUNDHOUSE_WORKER_COMMAND": json.dumps([sys.executable, "-m", "loadtest.stub_worker"]),
            "ROUNDHOUSE_MODEL_STORE": str(self._folder / "store"),
            "ROUNDHOUSE_SCALE_DOWN_S": str(DOWN_S),
            "ROUNDHOUSE_CROWD_SHARE": str(NO_CROWDS),
            "STUB_START_S": str(START_S),
            "STUB_STEP_S": str(STEP_S),
        }
        with (self._folder / f"{module}.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, env=environment, stderr=log)

    async def _until_live(self, database: asyncpg.Connection[asyncpg.Record]) -> None:
        deadline_s = time.monotonic() + READY_LIMIT_S
        while await database.fetchval("SELECT state FROM scheduler.resources") != "live":
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"no worker was ready within {READY_LIMIT_S:g} s")
            await asyncio.sleep(0.1)

    async def _ask_all(self, owner: Owner, jobs: list[Arrival]) -> list[Finished]:
        began_s = time.monotonic()

        async def ask(job: Arrival) -> Finished:
            await asyncio.sleep(began_s + job.at - time.monotonic())
            stream = await owner.submit(
                self._message(owner, job), topology.job_queue(self._resource_id, "live")
            )
            end = [event async for event in stream][-1]
            if not isinstance(end, Finished) or end.outcome != "succeeded":
                raise RuntimeError(f"a job was not answered: {end}")
            return end

        return list(await asyncio.gather(*map(ask, jobs)))

    def _message(self, owner: Owner, job: Arrival) -> GenerateJob:
        now_ms = time.time_ns() // 1_000_000
        return GenerateJob(
            job_id=new_id("job"), request_id=new_id("req"), team_id="team_1", key_id="key_1",
            resource_id=self._resource_id, billing="resource", work_class="live", model_type="stub", model=MODEL,
            owner_queue=owner.queue, accepted_unix_ms=now_ms, deadline_unix_ms=now_ms + int(JOBS_LIMIT_S * 1000),
            operation="chat", prompt_tokens=[1, 2, 3], max_tokens=job.completion_tokens,
            sampling=SamplingParams(ignore_eos=True),
        )  # fmt: skip


_ROWS = """
    INSERT INTO scheduler.performance_options (option_id, model_type, name, device_kind, precision, max_batch,
        max_context_tokens, kv_tokens, hourly_rate_nanousd)
    VALUES ('opt_stub', 'stub', 'stub', 'cpu', 'bf16', {batch}, 2048, 1048576, 0);
    INSERT INTO scheduler.resources (resource_id, team_id, name, model_type, option_id, wanted, fixed_count,
        autoscaling, min_count, max_count)
    VALUES ('{resource}', 'team_1', 'stub', 'stub', 'opt_stub', 'on', {most}, true, {least}, {most});
"""


async def _no_void(fact: JobVoided, headers: dict[str, str]) -> None:
    raise RuntimeError(f"a job was given up: {fact.reason}")


def _make_store(store: Path) -> None:
    """One model without files: the stub engine reads none."""
    folder = store / MODEL.folder
    folder.mkdir(parents=True)
    manifest = ModelManifest(
        files=(), architecture="LlamaForCausalLM", signature=MODEL.signature, canonical_config={}, context_tokens=2048,
        vocab_size=1 << 16, eos_token_ids=(), parameter_count=1, has_chat_template=False,
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.scaling_real", description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0, help="of arrivals")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    jobs = list(arrivals(arguments.seconds, arguments.seed))
    with ExitStack() as stack:
        servers = stack.enter_context(running_servers(os.environ))
        if servers.amqp_management_url is None:
            raise SystemExit("loadtest: AMQP_URL is set without AMQP_MANAGEMENT_URL")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="roundhouse-scaling-")))
        database_url = stack.enter_context(scratch_database(servers.database_url, prefix="scaling"))
        amqp_url = stack.enter_context(
            scratch_vhost(servers.amqp_url, servers.amqp_management_url, "scaling")
        )
        environment = {**os.environ, "DATABASE_URL": database_url}
        subprocess.run([sys.executable, "-m", "infra.migrate", "up"], cwd=ROOT, env=environment, check=True)
        seen = asyncio.run(RealRun(amqp_url, database_url, folder).play(jobs))
    rows = compare(jobs, seen, arguments.seconds)
    print_table(rows)
    if arguments.json:
        write_json(rows, arguments.json)
    return 1 if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
