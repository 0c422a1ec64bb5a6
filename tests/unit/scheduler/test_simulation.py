"""The scheduler's and the agent's pure parts against a world in which everything goes wrong, step by step.

Processes die, agents and schedulers forget, commands and reports are lost or late, counts change. At every step: no
seat has two living processes, no incarnation starts twice, and the bound holds. Left alone it ends as it was wanted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import pytest
from msgspec.structs import replace

from services.scheduler import actions as do
from services.scheduler.snapshot import (
    Heard,
    Memory,
    Stored,
    StoredPlace,
    StoredResource,
    decide_all,
    stray_stops,
)
from services.scheduler.states import PlaceState, ResourceState, advance_place, advance_resource
from services.scheduler.views import Limits
from services.worker.agent import decide
from services.worker.agent.decide import KnownProcess
from services.worker.agent.devices import Device
from shared.messages import (
    NodeDevice,
    NodeProcess,
    NodeReport,
    StartWorker,
    StopWorker,
    WorkerReport,
    WorkerSpec,
)

DEVICES = [Device(f"cpu:{index}", "cpu") for index in range(4)]
LIMITS = Limits(start_timeout_s=20, drain_grace_s=8, start_grace_s=2)


@dataclass
class World:
    """Everything that is true, said or stored."""

    rng: random.Random
    now: float = 1_000_000.0
    rows: dict[str, StoredResource] = field(default_factory=dict)
    places: dict[str, StoredPlace] = field(default_factory=dict)
    known: dict[str, KnownProcess] = field(default_factory=dict)
    alive: dict[str, str] = field(default_factory=dict)
    """Living processes: incarnation -> phase."""
    ever_started: list[str] = field(default_factory=list)
    in_flight: list[StartWorker | StopWorker] = field(default_factory=list)
    nodes: dict[str, tuple[NodeReport, float]] = field(default_factory=dict)
    workers: dict[str, tuple[WorkerReport, float]] = field(default_factory=dict)
    start_sent: dict[str, float] = field(default_factory=dict)
    stop_sent: dict[str, float] = field(default_factory=dict)
    maximum: dict[str, int] = field(default_factory=dict)
    """Per resource the highest count since a place was last granted or freed: what the bound is checked against."""
    count: int = 0

    # ---- the scheduler

    def look(self) -> None:
        stored = Stored(now=self.now, resources=list(self.rows.values()), places=list(self.places.values()))
        heard = Heard(dict(self.nodes), dict(self.workers), self.now - 3600)
        memory = Memory(self.start_sent, self.stop_sent)
        for decided in decide_all(stored, heard, memory, LIMITS):
            # A scheduler that is killed in the middle has stored one resource's actions wholly or not at all.
            for action in decided.actions:
                self.apply(decided.resource.resource_id, action)
        for stop in stray_stops(stored, heard, memory, LIMITS):
            self.send_stop(stop)

    def apply(self, resource_id: str, action: do.Action) -> None:
        row = self.rows[resource_id]
        match action:
            case do.GrantPlace():
                taken = {p.place for p in self.places.values() if p.resource_id == resource_id}
                assert action.place not in taken, "the primary key refuses this"
                assert row.wanted == "on" and action.place < row.fixed_count
                assert len(taken) < row.fixed_count, "more places than the maximum in force"
                self.count += 1
                self.places[f"i{self.count}"] = StoredPlace(
                    resource_id=resource_id,
                    place=action.place,
                    state="starting",
                    incarnation=f"i{self.count}",
                    worker_id=f"w{self.count}",
                    node_id=action.node_id,
                    device=action.device,
                    device_kind="cpu",
                    phase="placing",
                    start_attempt=action.start_attempt,
                    granted_at=self.now,
                    ready_at=None,
                    reported_at=None,
                    drain_sent_at=None,
                    given_up=False,
                    proved_until=None,
                )
            case do.SendStart():
                place = self.places[action.incarnation]
                self.start_sent[action.incarnation] = self.now
                self.in_flight.append(self.start_of(place))
            case do.SendStop():
                self.send_stop(action)
            case do.MarkReady():
                self.change(action.incarnation, PlaceState.READY, ready_at=action.at, proved_until=action.at)
                self.rows[resource_id] = replace(row, failures=0)
            case do.MovePlace():
                assert self.places[action.incarnation].state == action.came_from
                self.change(action.incarnation, action.to)
            case do.GiveUpStart():
                self.change(action.incarnation, PlaceState.DRAINING, given_up=True)
                self.rows[resource_id] = replace(row, failures=row.failures + 1, last_failure_at=self.now)
            case do.FreePlace():
                assert action.incarnation not in self.alive, "a place was freed while its process lives"
                del self.places[action.incarnation]
                if action.failed_start is not None:
                    self.rows[resource_id] = replace(row, failures=row.failures + 1, last_failure_at=self.now)
            case do.ProveInterval(until=at) | do.BeginInterval(at=at):
                self.set_place(action.incarnation, proved_until=at)
            case do.EndInterval():
                self.set_place(action.incarnation, proved_until=None)
            case do.NotePlace():
                self.set_place(action.incarnation, phase=action.phase, reported_at=action.reported_at)
            case do.SetResource():
                advance_resource(ResourceState(row.state), action.state)
                self.rows[resource_id] = replace(
                    row,
                    state=str(action.state),
                    reason=action.reason,
                    expected_live_at=action.expected_live_at,
                )

    def change(self, incarnation: str, to: PlaceState, **changes: object) -> None:
        state = advance_place(PlaceState(self.places[incarnation].state), to)
        self.set_place(incarnation, state=str(state), **changes)

    def set_place(self, incarnation: str, **changes: object) -> None:
        self.places[incarnation] = replace(self.places[incarnation], **changes)

    def send_stop(self, stop: do.SendStop) -> None:
        self.stop_sent[stop.incarnation] = self.now
        self.in_flight.append(
            StopWorker(node_id=stop.node_id, epoch=1, incarnation=stop.incarnation, grace_s=stop.grace_s)
        )
        if stop.incarnation in self.places and stop.drain:
            at = self.places[stop.incarnation].drain_sent_at
            self.set_place(stop.incarnation, drain_sent_at=at or self.now)

    def start_of(self, place: StoredPlace) -> StartWorker:
        spec = WorkerSpec(
            worker_id=place.worker_id,
            resource_id=place.resource_id,
            place=place.place,
            incarnation=place.incarnation,
            pool=False,
            model_type="tiny",
            precision="bf16",
            device_kind="cpu",
            max_batch=1,
            max_context_tokens=16,
            kv_tokens=16,
        )
        return StartWorker(node_id="n1", epoch=1, deadline_unix_ms=self.now_ms + 10_000, spec=spec)

    # ---- the node

    @property
    def now_ms(self) -> int:
        return int(self.now * 1000)

    def deliver(self, command: StartWorker | StopWorker) -> None:
        match command:
            case StartWorker():
                started = decide.on_start(
                    command,
                    node_id="n1",
                    highest_epoch=1,
                    known=self.known,
                    devices=DEVICES,
                    stopping=False,
                    now_unix_ms=self.now_ms,
                )
                incarnation, spec = command.spec.incarnation, command.spec
                if isinstance(started, decide.Spawn):
                    assert incarnation not in self.ever_started, "an incarnation was started twice"
                    self.ever_started.append(incarnation)
                    self.alive[incarnation] = "loading"
                    self.known[incarnation] = KnownProcess(
                        incarnation=incarnation,
                        resource_id=spec.resource_id,
                        place=spec.place,
                        device=started.device.name,
                        state="running",
                    )
                elif isinstance(started, decide.Refuse):
                    self.known[incarnation] = KnownProcess(incarnation=incarnation, ended_unix_ms=self.now_ms)
            case StopWorker():
                stopped = decide.on_stop(
                    command, node_id="n1", highest_epoch=1, known=self.known, now_unix_ms=self.now_ms
                )
                if isinstance(stopped, decide.Refuse):
                    self.known[command.incarnation] = KnownProcess(
                        incarnation=command.incarnation, ended_unix_ms=self.now_ms
                    )
                elif isinstance(stopped, decide.Terminate):
                    process = self.known[command.incarnation]
                    self.known[command.incarnation] = replace(
                        process, told_to_stop=True, kill_unix_ms=stopped.kill_unix_ms
                    )
                    if command.incarnation in self.alive:
                        self.alive[command.incarnation] = "draining"

    def pass_time(self) -> None:
        self.now += 0.5
        for incarnation in list(self.alive):
            kill_ms = self.known[incarnation].kill_unix_ms
            is_drained = self.alive[incarnation] == "draining" and self.rng.random() < 0.2
            if is_drained or (kill_ms is not None and self.now_ms > kill_ms):
                del self.alive[incarnation]
            elif self.alive[incarnation] == "loading" and self.rng.random() < 0.3:
                self.alive[incarnation] = "ready"
        for incarnation, process in list(self.known.items()):
            if process.alive and incarnation not in self.alive:
                self.known[incarnation] = replace(process, state="exited", ended_unix_ms=self.now_ms)
        for incarnation in decide.forgettable(self.known.values(), self.now_ms):
            del self.known[incarnation]

    def report(self, loss: float) -> None:
        if self.rng.random() >= loss:
            by_device = {
                process.device: process.incarnation for process in self.known.values() if process.alive
            }
            processes = [
                NodeProcess(
                    incarnation=p.incarnation,
                    resource_id=p.resource_id,
                    place=p.place,
                    device=p.device,
                    pid=1,
                    start_ticks=1,
                    state="running" if p.alive else "exited",
                )
                for p in self.known.values()
            ]
            devices = [
                NodeDevice(device=d.name, kind=d.kind, incarnation=by_device.get(d.name)) for d in DEVICES
            ]
            report = NodeReport(
                node_id="n1", agent_id="a", sent_unix_ms=self.now_ms, devices=devices, processes=processes
            )
            self.nodes["n1"] = (report, self.now)
        for incarnation, phase in self.alive.items():
            if self.rng.random() >= loss and incarnation in self.known:
                process = self.known[incarnation]
                self.workers[incarnation] = (
                    WorkerReport(
                        worker_id="w",
                        resource_id=process.resource_id,
                        place=process.place,
                        incarnation=incarnation,
                        phase=phase,  # type: ignore[arg-type]
                        sent_unix_ms=self.now_ms,
                    ),
                    self.now,
                )

    # ---- what goes wrong

    def break_something(self) -> None:
        match self.rng.randrange(10):
            case 0 if self.alive:
                del self.alive[self.rng.choice(sorted(self.alive))]
            case 1:
                self.start_sent.clear()  # another scheduler leads: it remembers nothing
                self.stop_sent.clear()
            case 2:
                self.nodes.clear()
                self.workers.clear()
            case 3 if self.in_flight:
                self.in_flight.append(self.rng.choice(self.in_flight))  # delivered twice
            case 4 if self.in_flight:
                self.in_flight.pop(self.rng.randrange(len(self.in_flight)))
            case 5:
                # The agent lost its file: it finds the living by their environment, and forgets the dead.
                self.known = {
                    k: replace(p, told_to_stop=False) for k, p in self.known.items() if k in self.alive
                }
            case 6:
                self.now += self.rng.choice([3.0, 9.0, 40.0])
            case _:
                row = self.rng.choice(sorted(self.rows.values(), key=lambda r: r.resource_id))
                wanted = self.rng.choice(["on", "on", "off"])
                self.rows[row.resource_id] = replace(row, wanted=wanted, fixed_count=self.rng.randrange(4))

    def check(self) -> None:
        seats = [(self.known[i].resource_id, self.known[i].place) for i in self.alive]
        assert len(seats) == len(set(seats)), f"two processes at one seat: {seats}"
        taken = [(p.resource_id, p.place) for p in self.places.values()]
        assert len(taken) == len(set(taken))


def make_row(resource_id: str) -> StoredResource:
    return StoredResource(
        resource_id=resource_id,
        team_id="t",
        model_type="tiny",
        option_id="o",
        pool=False,
        wanted="on",
        fixed_count=2,
        state="off",
        reason="",
        expected_live_at=None,
        device_kind="cpu",
        precision="bf16",
        max_batch=1,
        max_context_tokens=16,
        kv_tokens=16,
        hourly_rate_nanousd=1,
        failures=0,
        last_failure_at=None,
        last_failure="",
        usual_start_s=None,
    )


@pytest.mark.parametrize("seed", range(25))
def test_no_seat_is_ever_doubled_and_what_is_wanted_comes_true(seed: int) -> None:
    world = World(random.Random(seed))
    world.rows = {name: make_row(name) for name in ("r1", "r2")}
    for _ in range(250):
        if world.rng.random() < 0.15:
            world.break_something()
        world.report(loss=0.2)
        world.look()
        while world.in_flight and world.rng.random() < 0.7:
            command = world.in_flight.pop(world.rng.randrange(len(world.in_flight)))
            if world.rng.random() >= 0.2:
                world.deliver(command)
        world.pass_time()
        world.check()
    # Left alone, with two places wanted of each on four devices
    for name, row in world.rows.items():
        world.rows[name] = replace(row, wanted="on", fixed_count=2, failures=0, last_failure_at=None)
    for _ in range(400):
        world.report(loss=0.0)
        world.look()
        for command in world.in_flight:
            world.deliver(command)
        world.in_flight.clear()
        world.pass_time()
        world.check()
    assert {r.state for r in world.rows.values()} == {"live"}, [r.reason for r in world.rows.values()]
    assert sorted((p.resource_id, p.state) for p in world.places.values()) == [
        ("r1", "ready"),
        ("r1", "ready"),
        ("r2", "ready"),
        ("r2", "ready"),
    ]
    assert set(world.alive) == set(world.places)
    assert msgspec.json.encode(list(world.places.values()))
