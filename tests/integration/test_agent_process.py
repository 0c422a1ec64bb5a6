"""A node agent as a real process, told what to do over the real broker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.worker.agent.decide import KnownProcess
from services.worker.agent.devices import Device
from services.worker.agent.launch import worker_environment
from services.worker.agent.processes import spawn
from services.worker.agent.state_file import AgentState, save_state
from shared import topology
from shared.messages import FleetEvent, NodeProcess, NodeReport, StartWorker, StopWorker, WorkerSpec
from tests.conftest import Vhost
from tests.integration.fleet import Fleet, running_fleet


def make_spec(incarnation: str, place: int = 0) -> WorkerSpec:
    return WorkerSpec(
        worker_id=f"wrk_{incarnation}",
        resource_id="res_1",
        place=place,
        incarnation=incarnation,
        pool=False,
        model_type="tiny",
        precision="bf16",
        device_kind="cpu",
        max_batch=1,
        max_context_tokens=16,
        kv_tokens=16,
    )


@dataclass
class Node:
    """What the node says of itself, and commands to it."""

    fleet: Fleet
    latest: NodeReport | None = None

    def hear(self, message: Any) -> None:
        if isinstance(message, NodeReport) and message.node_id == self.fleet.node_id:
            self.latest = message

    def forget(self) -> None:
        self.latest = None

    async def start_worker(self, incarnation: str, place: int = 0, *, epoch: int = 1) -> None:
        deadline_unix_ms = time.time_ns() // 1_000_000 + 60_000
        spec = make_spec(incarnation, place)
        await self.fleet.broker.publish(
            topology.node_commands(self.fleet.node_id),
            StartWorker(
                node_id=self.fleet.node_id, epoch=epoch, deadline_unix_ms=deadline_unix_ms, spec=spec
            ),
        )

    async def stop_worker(self, incarnation: str, grace_s: float = 5.0, *, epoch: int = 1) -> None:
        await self.fleet.broker.publish(
            topology.node_commands(self.fleet.node_id),
            StopWorker(node_id=self.fleet.node_id, epoch=epoch, incarnation=incarnation, grace_s=grace_s),
        )

    def process(self, incarnation: str) -> NodeProcess | None:
        processes = self.latest.processes if self.latest is not None else []
        return next((process for process in processes if process.incarnation == incarnation), None)

    async def until(self, incarnation: str, state: str, reason: str = "") -> NodeProcess:
        async def is_so() -> bool:
            process = self.process(incarnation)
            return process is not None and process.state == state and reason in process.reason

        await self.fleet.until(is_so, f"{incarnation} is {state} {reason}: {self.latest}", 40)
        process = self.process(incarnation)
        assert process is not None
        return process

    async def until_handled(self) -> None:
        """Commands take effect in order, so this one's effect shows that of all before it."""
        marker = f"inc_marker_{time.monotonic_ns()}"
        await self.stop_worker(marker, epoch=1_000_000)
        await self.until(marker, "exited")


@pytest.fixture
async def node(tmp_path: Path, module_vhost: Vhost, module_database: str) -> AsyncIterator[Node]:
    async with running_fleet(tmp_path, module_vhost.amqp_url, module_database) as fleet:
        node = Node(fleet)
        await fleet.broker.subscribe(
            topology.scheduler_events("test"),
            FleetEvent,
            lambda d: node.hear(d.message),
            prefetch=100,
            no_ack=True,
        )
        await fleet.broker.declare([topology.node_commands(fleet.node_id)])
        yield node


async def test_a_killed_agent_leaves_its_workers_running_and_the_next_one_adopts_them(node: Node) -> None:
    agent = node.fleet.start_agent()
    await node.start_worker("inc_1")
    before = await node.until("inc_1", "running")
    assert before.device == "cpu:0"
    node.fleet.kill(agent)
    assert os.path.exists(f"/proc/{before.pid}")
    node.forget()
    node.fleet.start_agent()
    assert await node.until("inc_1", "running") == before
    # It watches a process that is not its child.
    os.kill(before.pid, signal.SIGKILL)
    await node.until("inc_1", "exited")
    node.fleet.assert_no_double()


async def test_workers_are_adopted_though_the_agents_file_is_lost(node: Node) -> None:
    agent = node.fleet.start_agent()
    await node.start_worker("inc_1", place=2)
    before = await node.until("inc_1", "running")
    node.fleet.kill(agent)
    (node.fleet.home / "agent" / f"{node.fleet.node_id}.json").unlink()
    node.forget()
    node.fleet.start_agent()
    assert await node.until("inc_1", "running") == before
    assert node.latest is not None
    assert {d.device: d.incarnation for d in node.latest.devices}["cpu:0"] == "inc_1"


async def test_a_worker_that_was_spawned_by_an_agent_that_died_right_then_is_found(node: Node) -> None:
    # Given the intent in the file, the process alive, and its pid written nowhere
    environment = worker_environment(
        node.fleet.environment,
        make_spec("inc_1"),
        Device("cpu:1", "cpu"),
        node_id=node.fleet.node_id,
        home=str(node.fleet.home),
        threads=1,
    )
    held, ticks = spawn(node.fleet.worker_command, environment, None)
    intents = [
        KnownProcess(
            incarnation=name, resource_id="res_1", place=place, device=f"cpu:{place}", state="intended"
        )
        for place, name in enumerate(["inc_0", "inc_1"])
    ]
    (node.fleet.home / "agent").mkdir()
    save_state(node.fleet.home / "agent" / f"{node.fleet.node_id}.json", AgentState(processes=intents))
    # When an agent starts, and the scheduler repeats its commands
    node.fleet.start_agent()
    await node.start_worker("inc_1", place=1)
    await node.start_worker("inc_0", place=0)
    # Then the one is adopted, and the other was never started and never will be.
    found = await node.until("inc_1", "running")
    assert (found.pid, found.start_ticks) == (held.pid, ticks)
    await node.until("inc_0", "exited", "never started")
    await node.until_handled()
    assert list(node.fleet.workers()) == ["inc_1"]
    os.kill(held.pid, signal.SIGKILL)
    held.reap()
    held.close()


async def test_a_stop_that_overtakes_its_start_keeps_it_from_ever_starting(node: Node) -> None:
    node.fleet.start_agent()
    await node.stop_worker("inc_1")
    await node.until("inc_1", "exited", "never started")
    await node.start_worker("inc_1")
    await node.until_handled()
    assert node.fleet.workers() == {} and node.fleet.runs() == []


async def test_commands_of_a_replaced_scheduler_are_refused_also_by_the_next_agent(node: Node) -> None:
    agent = node.fleet.start_agent()
    await node.start_worker("inc_1", epoch=7)
    await node.until("inc_1", "running")
    node.fleet.kill(agent)
    node.fleet.start_agent()
    await node.start_worker("inc_2", place=1, epoch=6)
    await node.stop_worker("inc_1", 0.0, epoch=6)
    await node.until_handled()
    assert list(node.fleet.workers()) == ["inc_1"]
    assert node.process("inc_2") is None


async def test_a_worker_that_does_not_leave_in_time_is_killed_and_its_seat_not_given_before(
    node: Node,
) -> None:
    node.fleet.start_agent()
    await node.start_worker("inc_1")
    await node.until("inc_1", "running")
    (node.fleet.behaviour / "busy").touch()
    await node.fleet.until(node.fleet.has_ready_worker, "the worker is up")
    await node.stop_worker("inc_1", grace_s=5.0)
    # The same seat again, while the old worker still finishes its work: this has to be read within the grace
    await node.start_worker("inc_2")
    await node.until("inc_2", "exited", "inc_1 still runs for place 0")
    process = await node.until("inc_1", "exited", "did not leave in the time it had")
    assert process.exit_code == -signal.SIGKILL
    node.fleet.assert_no_double()


async def test_all_devices_taken_is_a_refusal_that_is_reported(node: Node) -> None:
    node.fleet.start_agent(ROUNDHOUSE_DEVICES="cpu:0")
    await node.start_worker("inc_1")
    await node.start_worker("inc_2", place=1)
    await node.until("inc_2", "exited", "no free cpu device")
    await node.until("inc_1", "running")


@pytest.mark.parametrize("keep", [False, True])
async def test_an_agent_that_is_asked_to_stop_ends_its_workers_unless_it_is_to_keep_them(
    node: Node, keep: bool
) -> None:
    agent = node.fleet.start_agent(ROUNDHOUSE_AGENT_KEEP_WORKERS="1" if keep else "0")
    await node.start_worker("inc_1")
    await node.until("inc_1", "running")
    await node.fleet.until(node.fleet.has_ready_worker, "the worker is up")
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(40) == 0
    assert list(node.fleet.workers()) == (["inc_1"] if keep else [])
    if not keep:
        assert (await node.until("inc_1", "exited")).exit_code == 0


async def test_a_second_agent_of_the_node_does_not_start(node: Node) -> None:
    node.fleet.start_agent()
    await node.until_handled()
    second = node.fleet.start_agent()
    assert second.wait(40) == 1
    log = (node.fleet.folder / "agent-1.log").read_text()
    assert "one agent per node" in log


async def test_a_worker_that_cannot_be_spawned_is_reported(node: Node) -> None:
    node.fleet.start_agent(ROUNDHOUSE_WORKER_COMMAND=msgspec.json.encode(["/no/such/program"]).decode())
    await node.start_worker("inc_1")
    await node.until("inc_1", "exited", "never started: No such file or directory")
