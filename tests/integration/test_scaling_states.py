"""Policy, reconciler and their SQL against a world in which anything goes wrong in any order (Hypothesis' choice).

Workers crash, reports and commands are lost or late, leaders change, settings change, also between a look and its
writes. At every step the bounds hold, in the database too, and no process is told to go before its jobs are done. Left
alone under a constant load the number of workers settles, within the bounds, and what waits is done.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from msgspec.structs import replace

from services.scheduler.actions import NoteScaling, SendStart, SendStop
from services.scheduler.desired import Desired
from services.scheduler.queue_depths import Depth
from services.scheduler.scaling_keeper import ScalingKeeper
from services.scheduler.scaling_policy import Tuning
from services.scheduler.snapshot import Decided, Heard, Memory, Stored, decide_all
from services.scheduler.store import Store
from services.scheduler.views import Limits
from services.scheduler.writes import StaleView
from shared.database import Database
from shared.ids import new_id
from shared.lease import Lease
from shared.messages import (
    CreateOption,
    CreateResource,
    NodeDevice,
    NodeProcess,
    NodeReport,
    SchedulerCommand,
    SetScaling,
    TurnOffResource,
    TurnOnResource,
    WorkerReport,
)
from tests.integration.fleet import empty_tables

BATCH = 2
TOKENS = 10
"""Of each job; a worker gives each of its jobs one a second."""
DEVICES = 5
LIMITS = Limits(start_timeout_s=1e9, lost_after_s=1e9, scaling=Tuning(down_window_s=20.0))


@dataclass
class Process:
    incarnation: str
    place: int
    device: str
    phase: str = "loading"
    jobs: list[int] = field(default_factory=list)
    """Tokens left of each."""
    done_tokens: int = 0
    left_jobs: int = 0
    stream_s: float = 0.0
    alive: bool = True
    exit_code: int | None = None


class FakeDepths:
    """The broker's answers, without a broker."""

    def __init__(self) -> None:
        self.ready: int | None = 0

    def ask(self, resources: object) -> None:
        pass

    def of(self, resource_id: str) -> Depth | None:
        return None if self.ready is None else Depth(self.ready, 0, 0.0)


class World:
    """Everything outside of the scheduler, and the scheduler on a real database."""

    def __init__(self, database_url: str) -> None:
        self.url = database_url
        self.stack = AsyncExitStack()
        self.ahead_s = 0.0
        """Of our time before the database's: it passes in leaps."""
        self.processes: dict[str, Process] = {}
        self.reports: dict[str, tuple[WorkerReport, float]] = {}
        self.node: tuple[NodeReport, float] | None = None
        self.starts_sent: dict[str, float] = {}
        self.stops_sent: dict[str, float] = {}
        self.depths = FakeDepths()
        self.queue = 0
        self.now = 0.0
        self.highest = 0
        """Of the maxima in force since the last look that found no place."""
        self.wanted: list[int] = []

    async def open(self) -> None:
        self.admin = await asyncpg.connect(self.url)
        self.stack.push_async_callback(self.admin.close)
        await empty_tables(self.admin)
        self.database = await Database.open(self.url, "roundhouse_scheduler", self.stack)
        self.desired = Desired(self.database, _nothing)
        await self.lead()
        option = await self.command(
            CreateOption, model_type="tiny", name="o", device_kind="cpu", precision="bf16", max_batch=BATCH,
            max_context_tokens=128, kv_tokens=512, hourly_rate_nanousd=7,
        )  # fmt: skip
        made = await self.command(
            CreateResource,
            team_id="t",
            name="r",
            model_type="tiny",
            option_id=option["option_id"],
            fixed_count=1,
        )
        self.resource_id = str(made["resource_id"])
        await self.command(TurnOnResource, team_id="t", resource_id=self.resource_id)

    async def lead(self) -> None:
        """Another scheduler takes over: it knows what is stored and nothing else."""
        await self.admin.execute("UPDATE scheduler.lease SET expires_at = now() - interval '1 hour'")
        lease = Lease(self.database, new_id("sch"), 60.0)
        assert await lease.ensure()
        self.store = Store(self.database, lease)
        self.keeper = ScalingKeeper(self.depths, LIMITS.scaling)  # type: ignore[arg-type]
        self.starts_sent, self.stops_sent = {}, {}

    async def command(self, make: type[SchedulerCommand], **fields: Any) -> dict[str, Any]:
        result = await self.desired.run(
            make(command_id=new_id("cmd"), deadline_unix_ms=2**62, reply_queue="q", actor="test", **fields)
        )
        assert result.ok, result
        return result.body

    async def scale(self, least: int, most: int) -> None:
        await self.command(
            SetScaling, team_id="t", resource_id=self.resource_id, autoscaling=True, min_count=least, max_count=most,
            idle_timeout_s=30, when_asleep="wake",
        )  # fmt: skip

    # ---- a look of the scheduler

    async def snapshot(self) -> tuple[Stored, list[Decided]]:
        stored = await self.store.load()
        self.now = stored.now + self.ahead_s
        # The database measures starts on its own clock, which ours is ahead of.
        rows = [replace(row, usual_start_s=2.0) for row in stored.resources]
        stored = replace(stored, now=self.now, resources=rows)
        nodes = {} if self.node is None else {"n": (self.node[0], self.now)}
        heard = Heard(nodes, dict(self.reports), self.now - 3600)
        memory = Memory(self.starts_sent, self.stops_sent, {}, self.keeper.states(stored, heard))
        decided = decide_all(stored, heard, memory, LIMITS)
        assert all(each.error is None for each in decided), [each.error for each in decided]
        return stored, decided

    async def act(self, decided: list[Decided], arrives: bool = True) -> None:
        for each in decided:
            before = await self.taken()
            try:
                await self.store.apply(each)
            except StaleView:
                continue
            if await self.taken() > before:
                assert await self.taken() <= await self.maximum(), "a place beyond the maximum in force"
            was_ready = {p.incarnation for p in each.view.places if p.ready_at is not None}
            for action in each.actions:
                if isinstance(action, NoteScaling):
                    self.keeper.remember(self.resource_id, action, self.now)
                    self.wanted.append(action.memory.wanted)
                elif isinstance(action, SendStart):
                    self.starts_sent[action.incarnation] = self.now
                    place = next(p for p in each.view.places if p.incarnation == action.incarnation)
                    if arrives:
                        self.spawn(action.incarnation, place.place)
                elif isinstance(action, SendStop):
                    self.stops_sent[action.incarnation] = self.now
                    if action.incarnation in was_ready:
                        assert action.grace_s == LIMITS.drain_grace_s, "a drain without time to finish"
                    if arrives:
                        self.stop(action.incarnation)

    async def look(self, arrives: bool = True) -> None:
        _, decided = await self.snapshot()
        await self.act(decided, arrives)

    async def taken(self) -> int:
        return int(await self.admin.fetchval("SELECT count(*) FROM scheduler.places"))

    async def maximum(self) -> int:
        return int(
            await self.admin.fetchval(
                "SELECT CASE WHEN r.wanted = 'on' THEN s.max_now ELSE 0 END FROM scheduler_api.scaling_v1 s"
                " JOIN scheduler.resources r USING (resource_id)"
            )
        )

    # ---- processes

    def spawn(self, incarnation: str, place: int) -> None:
        used = {process.device for process in self.processes.values() if process.alive}
        free = [f"cpu:{n}" for n in range(DEVICES) if f"cpu:{n}" not in used]
        if incarnation not in self.processes:
            assert free, "more processes than devices"
            assert all(p.place != place for p in self.processes.values() if p.alive), "two at one seat"
            self.processes[incarnation] = Process(incarnation, place, free[0])

    def stop(self, incarnation: str) -> None:
        process = self.processes.get(incarnation)
        if process is None:  # remembered as exited, so that it never starts later
            self.processes[incarnation] = Process(incarnation, -1, "", alive=False, exit_code=None)
        elif process.alive:
            process.phase = "draining"

    def crash(self, number: int) -> None:
        alive = [process for process in self.processes.values() if process.alive]
        if alive:
            process = alive[number % len(alive)]
            self.queue += len(process.jobs)
            process.jobs, process.alive, process.exit_code = [], False, -9

    def second(self) -> None:
        self.ahead_s += 1.0
        for process in self.processes.values():
            if not process.alive:
                continue
            process.stream_s += len(process.jobs)
            process.done_tokens += len(process.jobs)
            process.left_jobs += sum(left <= 1 for left in process.jobs)
            process.jobs = [left - 1 for left in process.jobs if left > 1]
            if process.phase == "loading":
                process.phase = "ready"
            if process.phase == "draining" and not process.jobs:
                process.alive, process.exit_code = False, 0
        # The idlest first, one job each, as a broker deals them out.
        ready = [process for process in self.processes.values() if process.alive and process.phase == "ready"]
        for _ in range(BATCH):
            for process in ready:
                if self.queue and len(process.jobs) < BATCH:
                    process.jobs.append(TOKENS)
                    self.queue -= 1

    def report(self, lost: frozenset[int] = frozenset()) -> None:
        """lost: numbers of the workers whose reports do not arrive; 0 is the node's."""
        self.depths.ready = None if 9 in lost else self.queue
        processes = list(self.processes.values())
        if 0 not in lost:
            alive = {process.device: process.incarnation for process in processes if process.alive}
            self.node = (
                NodeReport(
                    node_id="n",
                    agent_id="a",
                    sent_unix_ms=0,
                    devices=[
                        NodeDevice(device=f"cpu:{n}", kind="cpu", incarnation=alive.get(f"cpu:{n}"))
                        for n in range(DEVICES)
                    ],
                    processes=[
                        NodeProcess(
                            incarnation=p.incarnation, resource_id=self.resource_id, place=p.place,
                            device=p.device, pid=1, start_ticks=1, state="running" if p.alive else "exited",
                            exit_code=p.exit_code, reason="" if p.alive else "exited",
                        )
                        for p in processes
                    ],
                ),
                self.now,
            )  # fmt: skip
        for number, process in enumerate(p for p in processes if p.alive):
            if number + 1 not in lost:
                said = WorkerReport(
                    worker_id="w", resource_id=self.resource_id, place=process.place,
                    incarnation=process.incarnation, phase=process.phase, sent_unix_ms=0,  # type: ignore[arg-type]
                    running_jobs=len(process.jobs), held_jobs=len(process.jobs),
                    running_sequences=len(process.jobs), completion_tokens=process.done_tokens,
                    left_jobs=process.left_jobs, stream_s=process.stream_s, remaining_tokens=sum(process.jobs),
                )  # fmt: skip
                self.reports[process.incarnation] = (said, self.now + 1.0)


async def _nothing(resource_id: str, pool: bool) -> None:
    """No queues: there is no broker here."""


class Scaling(RuleBasedStateMachine):
    database_url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.world = World(self.database_url)

    @initialize(bounds=st.tuples(st.integers(0, 2), st.integers(1, 4)))
    def begin(self, bounds: tuple[int, int]) -> None:
        self.runner.run(self.world.open())
        self.runner.run(self.world.scale(min(bounds), max(bounds)))

    @rule(jobs=st.integers(1, 40))
    def jobs_arrive(self, jobs: int) -> None:
        self.world.queue += jobs

    @rule(seconds=st.integers(1, 15), lost=st.frozensets(st.integers(0, 9), max_size=4))
    def time_passes(self, seconds: int, lost: frozenset[int]) -> None:
        for _ in range(seconds):
            self.world.second()
            self.world.report(lost)

    @rule(arrives=st.booleans())
    def look(self, arrives: bool) -> None:
        self.runner.run(self.world.look(arrives))

    @rule(seconds=st.integers(1, 5))
    def all_is_well_for_a_while(self, seconds: int) -> None:
        for _ in range(seconds):
            self.world.second()
            self.world.report()
            self.runner.run(self.world.look())

    @rule(number=st.integers(0, 9))
    def a_worker_crashes(self, number: int) -> None:
        self.world.crash(number)

    @rule()
    def another_scheduler_leads(self) -> None:
        self.runner.run(self.world.lead())

    @rule(bounds=st.tuples(st.integers(0, 4), st.integers(0, 4)))
    def settings_change(self, bounds: tuple[int, int]) -> None:
        self.runner.run(self.world.scale(min(bounds), max(bounds)))

    @rule(on=st.booleans())
    def turned(self, on: bool) -> None:
        make = TurnOnResource if on else TurnOffResource
        self.runner.run(self.world.command(make, team_id="t", resource_id=self.world.resource_id))

    @rule(bounds=st.tuples(st.integers(0, 4), st.integers(0, 4)), off=st.booleans())
    def settings_change_between_a_look_and_its_writes(self, bounds: tuple[int, int], off: bool) -> None:
        _, decided = self.runner.run(self.world.snapshot())
        self.settings_change(bounds)
        if off:
            self.turned(False)
        self.runner.run(self.world.act(decided))

    @invariant()
    def the_tables_are_sound(self) -> None:
        self.runner.run(self._check())

    async def _check(self) -> None:
        if not hasattr(self.world, "resource_id"):
            return
        admin = self.world.admin
        state = await admin.fetchval("SELECT state FROM scheduler.resources")
        assert state != "asleep" or await self.world.taken() == 0
        assert await self.world.taken() <= 4
        strays = await admin.fetchval(
            "SELECT count(*) FROM scheduler.state_intervals i WHERE ended_at IS NULL"
            " AND NOT EXISTS (SELECT 1 FROM scheduler.places p WHERE p.incarnation = i.incarnation)"
        )
        assert strays == 0
        taken = {row["incarnation"] for row in await admin.fetch("SELECT incarnation FROM scheduler.places")}
        for process in self.world.processes.values():
            assert not process.alive or process.incarnation in taken, (
                "a place was freed while its process lives"
            )

    def teardown(self) -> None:
        try:
            if hasattr(self.world, "resource_id"):
                self.runner.run(self._settles())
        finally:
            self.runner.run(self.world.stack.aclose())
            self.runner.close()

    async def _settles(self) -> None:
        """Left alone, with two jobs every five seconds for a worker that does one in five."""
        world = self.world
        await world.scale(0, 3)
        await world.command(TurnOnResource, team_id="t", resource_id=world.resource_id)
        # Failed starts of before would hold it up for minutes of the database's own time.
        await world.admin.execute("DELETE FROM scheduler.starts WHERE NOT succeeded")
        world.queue = min(world.queue, 10)  # a crowd of before would only take longer
        for second in range(150):
            world.queue += second % 5 == 0 and 2
            world.second()
            world.report()
            await world.look()
        assert world.queue <= 6, f"{world.queue} jobs wait"
        assert await world.admin.fetchval("SELECT state FROM scheduler.resources") == "live"
        changes = sum(a != b for a, b in zip(world.wanted[-60:-1], world.wanted[-59:], strict=True))
        assert changes <= 2, f"{changes} changes under a constant load: {world.wanted[-60:]}"
        for _ in range(70):
            world.second()
            world.report()
            await world.look()
        assert world.queue == 0 and await world.taken() == 0
        assert await world.admin.fetchval("SELECT state FROM scheduler.resources") == "asleep"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_any_interleaving_keeps_the_bounds_and_settles(module_database: str) -> None:
    Scaling.database_url = module_database
    run_state_machine_as_test(
        Scaling,
        settings=settings(
            max_examples=4,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # On a real database shrinking takes longer than reading the steps that are printed.
            phases=(Phase.explicit, Phase.reuse, Phase.generate),
        ),
    )
