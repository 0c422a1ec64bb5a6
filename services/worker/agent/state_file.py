"""What the agent must remember over its own death, in one small file that is replaced in one step."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import msgspec
import structlog

from services.worker.agent.decide import KnownProcess

log = structlog.get_logger()

LOCK_WAIT_S = 2.0  # an agent that was just killed lets go of the lock when the kernel has cleaned up


class AgentState(msgspec.Struct, frozen=True, kw_only=True):
    highest_epoch: int = 0
    processes: list[KnownProcess] = []


class AgentLocked(Exception):
    """Another agent of the same node is running."""


def load_state(path: Path) -> AgentState:
    """Read the file; a missing or damaged one counts as empty: living workers are then found by their environment."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=AgentState)
    except FileNotFoundError:
        return AgentState()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.error("agent_state_damaged", path=str(path), error=str(error))
        return AgentState()


def save_state(path: Path, state: AgentState) -> None:
    """Replace the file durably: a reader sees the old state or the new one, also after a power cut."""
    part = path.with_name(path.name + ".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(state))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def hold_lock(path: Path) -> int:
    """Take the node's lock for the life of this process; return its descriptor. Blocking; raises `AgentLocked`.

    The descriptor is not inherited, so a worker that outlives the agent does not keep the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                os.close(descriptor)
                raise AgentLocked(f"another agent holds {path}: one agent per node") from None
            time.sleep(0.1)
