"""Pure: what a command means, given the processes that the agent knows. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from services.worker.agent.devices import Device
from shared.messages import StartWorker, StopWorker

EXITS_KEPT_MS = 10 * 60 * 1000
"""How long an exited incarnation is remembered: far longer than a command can wait in the node's queue (30 s)."""

ProcessState = Literal["intended", "running", "exited"]


class KnownProcess(Struct, frozen=True, kw_only=True):
    """One incarnation: intended (written down before the spawn), running, exited. Kept in the agent's state file."""

    incarnation: str
    resource_id: str = ""
    place: int = -1
    device: str = ""
    state: ProcessState = "exited"
    pid: int = 0
    start_ticks: int = 0
    """Field 22 of /proc/<pid>/stat: with the pid it names a process for as long as the host is up."""
    exit_code: int | None = None
    """As in `subprocess`: negative is a signal; None when another parent reaped it."""
    reason: str = ""
    ended_unix_ms: int = 0
    told_to_stop: bool = False
    """SIGTERM was sent. It is sent once: a second one makes a service leave without finishing its work."""
    kill_unix_ms: int | None = None

    @property
    def alive(self) -> bool:
        return self.state != "exited"


@dataclass(frozen=True, slots=True)
class Spawn:
    device: Device


@dataclass(frozen=True, slots=True)
class Refuse:
    """Remember the incarnation as exited, so that its scheduler learns of it and it never starts later."""

    reason: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM now (unless it was sent before), SIGKILL at `kill_unix_ms`."""

    signal_now: bool
    kill_unix_ms: int


@dataclass(frozen=True, slots=True)
class Ignore:
    reason: str


def on_start(
    command: StartWorker,
    *,
    node_id: str,
    highest_epoch: int,
    known: Mapping[str, KnownProcess],
    devices: Sequence[Device],
    stopping: bool,
    now_unix_ms: int,
) -> Spawn | Refuse | Ignore:
    """Decide about a start.

    1. It is for another node, or from a scheduler that has been replaced (lower epoch) -> Ignore.
    2. The incarnation was ever known here, running or gone -> Ignore: one incarnation starts at most once.
    3. Its deadline is over, or the agent itself is stopping -> Ignore; the scheduler asks again or gives it up.
    4. Another incarnation of the same seat lives -> Refuse: two processes of one seat are never alive together.
    5. No device of the kind is free -> Refuse.
    6. Otherwise -> Spawn on the first free device.
    """
    spec = command.spec
    if command.node_id != node_id:
        return Ignore(f"for node {command.node_id}")
    if command.epoch < highest_epoch:
        return Ignore(f"epoch {command.epoch} is older than {highest_epoch}")
    if spec.incarnation in known:
        return Ignore("already known")
    if now_unix_ms > command.deadline_unix_ms:
        return Ignore("late")
    if stopping:
        return Ignore("the agent is stopping")
    for process in known.values():
        if process.alive and (process.resource_id, process.place) == (spec.resource_id, spec.place):
            return Refuse(f"never started: {process.incarnation} still runs for place {spec.place}")
    free = free_devices(devices, known.values(), spec.device_kind)
    if not free:
        return Refuse(f"never started: no free {spec.device_kind} device")
    return Spawn(free[0])


def on_stop(
    command: StopWorker,
    *,
    node_id: str,
    highest_epoch: int,
    known: Mapping[str, KnownProcess],
    now_unix_ms: int,
) -> Terminate | Refuse | Ignore:
    """Decide about a stop.

    1. It is for another node, or from a scheduler that has been replaced -> Ignore.
    2. The incarnation is unknown -> Refuse: remembered as exited, so that a start still on its way finds it known.
    3. It has exited -> Ignore; the report says so.
    4. Otherwise -> Terminate; of several deadlines the earliest holds.
    """
    if command.node_id != node_id:
        return Ignore(f"for node {command.node_id}")
    if command.epoch < highest_epoch:
        return Ignore(f"epoch {command.epoch} is older than {highest_epoch}")
    process = known.get(command.incarnation)
    if process is None:
        return Refuse("never started: stopped before its start arrived")
    if not process.alive:
        return Ignore("has exited")
    return terminate(process, int(command.grace_s * 1000), now_unix_ms)


def terminate(process: KnownProcess, grace_ms: int, now_unix_ms: int) -> Terminate:
    kill_unix_ms = now_unix_ms + max(grace_ms, 0)
    if process.kill_unix_ms is not None:
        kill_unix_ms = min(kill_unix_ms, process.kill_unix_ms)
    return Terminate(signal_now=not process.told_to_stop, kill_unix_ms=kill_unix_ms)


def free_devices(devices: Sequence[Device], known: Iterable[KnownProcess], kind: str) -> list[Device]:
    taken = {process.device for process in known if process.alive}
    return [device for device in devices if device.kind == kind and device.name not in taken]


def forgettable(known: Iterable[KnownProcess], now_unix_ms: int) -> list[str]:
    """Incarnations whose exit has been reported for long enough."""
    return [p.incarnation for p in known if not p.alive and now_unix_ms - p.ended_unix_ms > EXITS_KEPT_MS]


def exit_words(exit_code: int | None, *, killed_after_grace: bool = False) -> str:
    """Say in words how a process ended."""
    if killed_after_grace:
        return "killed: it did not leave in the time it had"
    if exit_code is None:
        return "exited; the status went to another parent"
    if exit_code < 0:
        return f"killed by signal {-exit_code}"
    return "exited" if exit_code == 0 else f"exited with status {exit_code}"
