"""Real schedulers, agents and stand-in workers for tests: start, kill, freeze, command, and look into the tables."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from services.worker.agent.processes import find_workers
from shared import topology
from shared.broker import Broker
from shared.ids import new_id
from shared.messages import (
    CommandResult,
    CreateOption,
    CreateResource,
    ScaleResource,
    SchedulerCommand,
    TurnOffResource,
    TurnOnResource,
)

ROOT = Path(__file__).resolve().parents[2]


class Fleet:
    """One database, one vhost, one home folder, and the processes that a test starts in them."""

    def __init__(
        self,
        folder: Path,
        amqp_url: str,
        database_url: str,
        broker: Broker,
        database: asyncpg.Connection[Any],
    ) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.behaviour = folder / "behaviour"
        self.home.mkdir()
        self.behaviour.mkdir()
        # A name of its own, so that tests on one broker never see each other's commands and reports.
        self.node_id = f"node-{secrets.token_hex(4)}"
        self.broker = broker
        self.database = database
        self.processes: list[subprocess.Popen[bytes]] = []
        self._results: dict[str, asyncio.Future[CommandResult]] = {}
        self.reply_queue = topology.reply_queue(new_id("test"))
        self.worker_command = [sys.executable, "-m", "tests.integration.standin_worker", str(self.behaviour)]
        self.environment = {
            **os.environ,
            "AMQP_URL": amqp_url,
            "DATABASE_URL": database_url,
            "OPS_PORT": "0",
            "DRAIN_TIMEOUT_S": "5",
            "ROUNDHOUSE_HOME": str(self.home),
            "ROUNDHOUSE_NODE_ID": self.node_id,
            "ROUNDHOUSE_DEVICES": "cpu:0,cpu:1,cpu:2",
            "ROUNDHOUSE_WORKER_COMMAND": json.dumps(self.worker_command),
            "ROUNDHOUSE_LEASE_S": "2",
            "ROUNDHOUSE_SCHEDULER_TICK_S": "0.3",
            # Longer than a busy machine stalls a worker, whose live time would then be in two parts
            "ROUNDHOUSE_LOST_AFTER_S": "10",
        }

    async def listen(self) -> None:
        await self.broker.subscribe(
            self.reply_queue,
            CommandResult,
            lambda delivery: self._results[delivery.message.command_id].set_result(delivery.message),
            prefetch=10,
            no_ack=True,
        )

    # ---- processes

    def start(self, module: str, **environment: str) -> subprocess.Popen[bytes]:
        name = f"{module.rpartition('.')[2]}-{len(self.processes)}"
        with open(self.folder / f"{name}.log", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=ROOT,
                env=self.environment | environment,
                stdout=output,
                stderr=output,
            )
        self.processes.append(process)
        return process

    def start_scheduler(self, **environment: str) -> subprocess.Popen[bytes]:
        return self.start("services.scheduler", **environment)

    def start_agent(self, **environment: str) -> subprocess.Popen[bytes]:
        return self.start("services.worker.agent", **environment)

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def workers(self) -> dict[str, int]:
        """Pids of the living workers of this test, by incarnation."""
        return {
            found.incarnation: found.pid
            for found in find_workers(self.node_id, str(self.home))
            if found.leader
        }

    def runs(self) -> list[list[str]]:
        """Every start of a stand-in: [what, resource, place, incarnation, pid, device]."""
        path = self.behaviour / "runs"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    async def has_ready_worker(self) -> bool:
        """Whether a stand-in listens to signals by now: one that is hit while Python starts just dies."""
        return any(run[0] == "up" for run in self.runs())

    def assert_no_double(self) -> None:
        assert [run for run in self.runs() if run[0] == "DOUBLE"] == []
        incarnations = [run[3] for run in self.runs() if run[0] == "run"]
        assert len(incarnations) == len(set(incarnations)), "an incarnation was started twice"

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()
        for pid in self.workers().values():
            os.kill(pid, signal.SIGKILL)

    # ---- commands

    def make_command(
        self, make: Callable[..., SchedulerCommand], *, again: str = "", late: bool = False, **fields: Any
    ) -> SchedulerCommand:
        """again: the id of an earlier command, to repeat it."""
        return make(
            command_id=again or new_id("cmd"),
            deadline_unix_ms=time.time_ns() // 1_000_000 + (-1 if late else 10_000),
            reply_queue=self.reply_queue.name,
            actor="test",
            **fields,
        )

    async def command(
        self, make: Callable[..., SchedulerCommand], *, again: str = "", **fields: Any
    ) -> CommandResult:
        """Send a command and wait for its answer."""
        command = self.make_command(make, again=again, **fields)
        answer = self._results[command.command_id] = asyncio.get_running_loop().create_future()
        await self.broker.publish(topology.SCHEDULER_COMMANDS, command)
        return await asyncio.wait_for(answer, 15)

    async def create_resource(self, count: int, **fields: Any) -> str:
        option = await self.command(
            CreateOption,
            model_type="tiny",
            name=f"o-{new_id('x')[-8:]}",
            device_kind="cpu",
            precision="bf16",
            max_batch=4,
            max_context_tokens=128,
            kv_tokens=512,
            hourly_rate_nanousd=10**9,
        )
        assert option.ok, option
        fields = {"team_id": "team_1", "name": "r1", "model_type": "tiny", "fixed_count": count, **fields}
        created = await self.command(CreateResource, option_id=option.body["option_id"], **fields)
        assert created.ok, created
        return str(created.body["resource_id"])

    async def turn_on(self, resource_id: str) -> None:
        assert (await self.command(TurnOnResource, team_id="team_1", resource_id=resource_id)).ok

    async def turn_off(self, resource_id: str) -> None:
        assert (await self.command(TurnOffResource, team_id="team_1", resource_id=resource_id)).ok

    async def scale(self, resource_id: str, count: int) -> None:
        assert (
            await self.command(ScaleResource, team_id="team_1", resource_id=resource_id, fixed_count=count)
        ).ok

    # ---- tables

    async def state(self, resource_id: str) -> str:
        return str(
            await self.database.fetchval(
                "SELECT state FROM scheduler.resources WHERE resource_id = $1", resource_id
            )
        )

    async def places(self) -> list[dict[str, Any]]:
        return [
            dict(row)
            for row in await self.database.fetch("SELECT * FROM scheduler.places ORDER BY resource_id, place")
        ]

    async def is_live(self, resource_id: str, count: int = 1) -> bool:
        places = [p for p in await self.places() if p["resource_id"] == resource_id]
        return (
            await self.state(resource_id) == "live"
            and [p["state"] for p in places] == ["ready"] * count
            and len(self.workers()) >= count
        )

    async def until(
        self, condition: Callable[[], Coroutine[Any, Any, bool]], what: str, timeout_s: float = 40
    ) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not await condition():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not within {timeout_s} s: {what}\n{await self.story()}")
            await asyncio.sleep(0.05)

    async def story(self) -> str:
        """All that helps to see what went wrong."""
        decisions = await self.database.fetch(
            "SELECT action, words FROM scheduler.decisions ORDER BY decision_id"
        )
        lines = [f"{row['action']}: {row['words']}" for row in decisions]
        lines += [str(place) for place in await self.places()]
        lines += [str(run) for run in self.runs()]
        for path in sorted(self.folder.rglob("*.log")):
            lines += [f"--- {path.name}", path.read_text(errors="replace")[-2500:]]
        return "\n".join(lines)


@asynccontextmanager
async def running_fleet(folder: Path, amqp_url: str, database_url: str) -> AsyncIterator[Fleet]:
    """Everything of one test; the scheduler's tables are emptied first, so that a database can serve a module."""
    async with AsyncExitStack() as stack:
        broker = await Broker.open(amqp_url, "test", stack)
        database = await asyncpg.connect(database_url)
        stack.push_async_callback(database.close)
        await empty_tables(database)
        fleet = Fleet(folder, amqp_url, database_url, broker, database)
        stack.callback(fleet.end)
        await fleet.listen()
        yield fleet


async def empty_tables(database: asyncpg.Connection[Any]) -> None:
    """Empty the scheduler's tables, as the administrator."""
    names = await database.fetch(
        "SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables WHERE schemaname = 'scheduler'"
    )
    await database.execute(f"TRUNCATE {', '.join(row['name'] for row in names)}")
