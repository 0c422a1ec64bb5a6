"""The node agent at work: it alone writes the table of processes, and acts on what `decide` says.

Everything runs on one event loop and no step awaits between reading the table and writing it, so commands, exits and
reports never interleave. The table is written to the state file before its effect: an agent that dies at any line
finds its workers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Sequence

import structlog
from msgspec.structs import replace

from services.worker.agent import decide, processes
from services.worker.agent.adopt import adopt
from services.worker.agent.decide import Ignore, KnownProcess, Refuse, Spawn, Terminate
from services.worker.agent.devices import Device
from services.worker.agent.launch import Launcher
from services.worker.agent.state_file import AgentState, load_state, save_state
from shared.broker import Broker, Delivery
from shared.messages import NodeDevice, NodeProcess, NodeReport, StartWorker, StopWorker
from shared.outcomes import Done, Dropped, Outcome, Unavailable

log = structlog.get_logger()

REPORT_INTERVAL_S = 1.0


def unix_ms() -> int:
    return time.time_ns() // 1_000_000


class Agent:
    """One per host. `adopt` first, then commands."""

    def __init__(
        self,
        node_id: str,
        agent_id: str,
        devices: Sequence[Device],
        launcher: Launcher,
        now_unix_ms: Callable[[], int],
    ) -> None:
        self.node_id = node_id
        self.agent_id = agent_id
        self._devices = devices
        self._launcher = launcher
        self._now_unix_ms = now_unix_ms
        self._known: dict[str, KnownProcess] = {}
        self._held: dict[str, processes.Held] = {}
        self._kill_timers: dict[str, asyncio.TimerHandle] = {}
        self._killed: set[str] = set()
        self._highest_epoch = 0
        self._stopping = False
        self._changed = asyncio.Event()
        self._all_gone = asyncio.Event()

    @property
    def living(self) -> list[KnownProcess]:
        return [process for process in self._known.values() if process.alive]

    # ---- start of the agent

    def adopt(self) -> None:
        """Take over what an earlier agent of this node left running. Blocking and short; before any command."""
        state = load_state(self._launcher.state_file)
        self._highest_epoch = state.highest_epoch
        found = self._launcher.find_workers()
        self._known = adopt(state.processes, found, self._now_unix_ms())
        for process in self.living:
            held = processes.hold(process.pid, process.start_ticks)
            if held is None:
                self._set(process, state="exited", reason="ended while no agent watched", ended=True)
            else:
                self._watch(process.incarnation, held)
                log.info("worker_adopted", incarnation=process.incarnation, pid=process.pid)
        for incarnation in {p.incarnation for p in found} - {p.incarnation for p in self.living}:
            self._launcher.kill_rest(incarnation)
        self._save()
        for process in self.living:
            if process.kill_unix_ms is not None:
                self._schedule_kill(process.incarnation, process.kill_unix_ms)

    # ---- commands

    async def on_command(self, delivery: Delivery) -> Outcome:
        """Handle one command of the scheduler; nothing is answered, the next report shows the effect."""
        command: StartWorker | StopWorker = delivery.message
        match command:
            case StartWorker():
                outcome = self._on_start(command)
            case StopWorker():
                outcome = self._on_stop(command)
        if command.node_id == self.node_id and command.epoch > self._highest_epoch:
            self._highest_epoch = command.epoch
            self._save()
        return outcome

    def _on_start(self, command: StartWorker) -> Outcome:
        spec = command.spec
        decision = decide.on_start(
            command,
            node_id=self.node_id,
            highest_epoch=self._highest_epoch,
            known=self._known,
            devices=self._devices,
            stopping=self._stopping,
            now_unix_ms=self._now_unix_ms(),
        )
        match decision:
            case Ignore(reason):
                return Dropped(reason)
            case Refuse(reason):
                self._refuse(spec.incarnation, reason, spec.resource_id, spec.place)
                return Done()
            case Spawn(device):
                process = KnownProcess(
                    incarnation=spec.incarnation,
                    resource_id=spec.resource_id,
                    place=spec.place,
                    device=device.name,
                    state="intended",
                )
                self._known[spec.incarnation] = process
                self._save()
                self._spawn(process, command, device)
                return Done()

    def _spawn(self, process: KnownProcess, command: StartWorker, device: Device) -> None:
        try:
            held, ticks = self._launcher.spawn(command.spec, device)
        except OSError as error:
            log.error("worker_not_spawned", incarnation=process.incarnation, error=str(error))
            self._set(process, state="exited", reason=f"never started: {error.strerror or error}", ended=True)
            self._save()
            return
        self._set(process, state="running", pid=held.pid, ticks=ticks)
        self._watch(process.incarnation, held)
        self._save()
        log.info("worker_started", incarnation=process.incarnation, pid=held.pid, device=device.name)

    def _on_stop(self, command: StopWorker) -> Outcome:
        decision = decide.on_stop(
            command,
            node_id=self.node_id,
            highest_epoch=self._highest_epoch,
            known=self._known,
            now_unix_ms=self._now_unix_ms(),
        )
        match decision:
            case Ignore(reason):
                return Dropped(reason)
            case Refuse(reason):
                self._refuse(command.incarnation, reason)
                return Done()
            case Terminate():
                self._terminate(command.incarnation, decision)
                return Done()

    def _refuse(self, incarnation: str, reason: str, resource_id: str = "", place: int = -1) -> None:
        log.info("worker_refused", incarnation=incarnation, reason=reason)
        self._known[incarnation] = KnownProcess(
            incarnation=incarnation,
            resource_id=resource_id,
            place=place,
            reason=reason,
            ended_unix_ms=self._now_unix_ms(),
        )
        self._save()

    def _terminate(self, incarnation: str, decision: Terminate) -> None:
        process = self._known[incarnation]
        # Written down first: SIGTERM is sent at most once, also by the next agent.
        self._known[incarnation] = replace(process, told_to_stop=True, kill_unix_ms=decision.kill_unix_ms)
        self._save()
        if decision.signal_now:
            log.info("worker_told_to_stop", incarnation=incarnation, pid=process.pid)
            self._held[incarnation].signal(signal.SIGTERM)
        self._schedule_kill(incarnation, decision.kill_unix_ms)

    def _schedule_kill(self, incarnation: str, kill_unix_ms: int) -> None:
        if incarnation in self._kill_timers:
            self._kill_timers.pop(incarnation).cancel()
        delay_s = max(kill_unix_ms - self._now_unix_ms(), 0) / 1000
        self._kill_timers[incarnation] = asyncio.get_running_loop().call_later(
            delay_s, self._kill, incarnation
        )

    def _kill(self, incarnation: str) -> None:
        held = self._held.get(incarnation)
        if held is None:
            return
        log.warning("worker_killed", incarnation=incarnation, pid=held.pid)
        self._killed.add(incarnation)
        held.signal(signal.SIGKILL)

    # ---- ends

    def _watch(self, incarnation: str, held: processes.Held) -> None:
        self._held[incarnation] = held
        asyncio.get_running_loop().add_reader(held.pidfd, self._on_exit, incarnation)

    def _on_exit(self, incarnation: str) -> None:
        """The worker's process has ended: only when nothing of it is left does it count as gone."""
        held = self._held.pop(incarnation)
        asyncio.get_running_loop().remove_reader(held.pidfd)
        left_behind = self._launcher.kill_rest(incarnation)
        exit_code = held.reap()
        held.close()
        timer = self._kill_timers.pop(incarnation, None)
        if timer is not None:
            timer.cancel()
        reason = decide.exit_words(exit_code, killed_after_grace=incarnation in self._killed)
        self._killed.discard(incarnation)
        self._set(self._known[incarnation], state="exited", reason=reason, exit_code=exit_code, ended=True)
        self._save()
        log.info(
            "worker_exited",
            incarnation=incarnation,
            exit_code=exit_code,
            reason=reason,
            left_behind=left_behind,
        )

    async def stop_all(self, grace_s: float) -> None:
        """Stop every worker and wait until all are gone: SIGTERM now, SIGKILL after `grace_s`."""
        self._stopping = True
        for process in self.living:
            self._terminate(
                process.incarnation, decide.terminate(process, int(grace_s * 1000), self._now_unix_ms())
            )
        while self.living:
            self._all_gone.clear()
            await self._all_gone.wait()

    # ---- the table

    def _set(
        self,
        process: KnownProcess,
        *,
        state: decide.ProcessState,
        pid: int | None = None,
        ticks: int | None = None,
        exit_code: int | None = None,
        reason: str = "",
        ended: bool = False,
    ) -> None:
        self._known[process.incarnation] = replace(
            process,
            state=state,
            pid=process.pid if pid is None else pid,
            start_ticks=process.start_ticks if ticks is None else ticks,
            exit_code=exit_code,
            reason=reason,
            ended_unix_ms=self._now_unix_ms() if ended else process.ended_unix_ms,
        )

    def _save(self) -> None:
        for incarnation in decide.forgettable(self._known.values(), self._now_unix_ms()):
            del self._known[incarnation]
        save_state(
            self._launcher.state_file,
            AgentState(highest_epoch=self._highest_epoch, processes=list(self._known.values())),
        )
        self._changed.set()
        if not self.living:
            self._all_gone.set()

    # ---- reports

    def report(self) -> NodeReport:
        """All that this agent knows, as of now."""
        by_device = {process.device: process.incarnation for process in self.living}
        return NodeReport(
            node_id=self.node_id,
            agent_id=self.agent_id,
            sent_unix_ms=self._now_unix_ms(),
            devices=[
                NodeDevice(device=d.name, kind=d.kind, incarnation=by_device.get(d.name))
                for d in self._devices
            ],
            processes=[
                NodeProcess(
                    incarnation=p.incarnation,
                    resource_id=p.resource_id,
                    place=p.place,
                    device=p.device,
                    pid=p.pid,
                    start_ticks=p.start_ticks,
                    state="running" if p.alive else "exited",
                    exit_code=p.exit_code,
                    reason=p.reason,
                )
                for p in self._known.values()
            ],
        )

    async def send_report(self, broker: Broker) -> None:
        """Send one report; without a connection none is sent, and the scheduler sees the node as silent."""
        try:
            await broker.send_event(self.report())
        except Unavailable as error:
            log.info("report_not_sent", error=str(error))

    async def report_forever(self, broker: Broker) -> None:
        """Report every second and at once on a change."""
        while True:
            self._changed.clear()
            await self.send_report(broker)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._changed.wait()
