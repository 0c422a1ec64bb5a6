"""Linux processes: spawn a worker, find it again, watch it end, signal exactly it.

A process is named by (pid, start time) and held by a pidfd, which can never come to mean another process, and which
works for children and for the workers of an agent that died. Nothing here decides.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

INCARNATION_VARIABLE = "ROUNDHOUSE_INCARNATION"
NODE_VARIABLE = "ROUNDHOUSE_NODE_ID"
HOME_VARIABLE = "ROUNDHOUSE_HOME"


@dataclass(frozen=True, slots=True)
class FoundProcess:
    """A living process whose environment says which incarnation of which node it is."""

    incarnation: str
    pid: int
    start_ticks: int
    leader: bool
    """It leads its session: the worker itself, not a helper that it started."""
    environment: Mapping[str, str]


@dataclass(slots=True, eq=False)
class Held:
    """A process that is watched. `popen` only for our own children."""

    pid: int
    pidfd: int
    popen: subprocess.Popen[bytes] | None = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a process that is gone already is no error."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return

    def reap(self) -> int | None:
        """After its end: return the exit code of a child (negative: the signal), None for one we adopted."""
        return self.popen.wait() if self.popen is not None else None

    def close(self) -> None:
        os.close(self.pidfd)


def start_ticks(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process; None when it is gone or a zombie."""
    fields = _stat_fields(pid)
    if fields is None or fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


def _stat_fields(pid: int) -> list[str] | None:
    """Fields 3 and up of /proc/<pid>/stat; the name in field 2 may itself hold spaces and brackets."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def hold(pid: int, expected_start_ticks: int) -> Held | None:
    """Take hold of a process; None when it is gone or the pid belongs to another one by now."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    # Checked after the pidfd is open: from here on it cannot become another process.
    if start_ticks(pid) != expected_start_ticks:
        os.close(pidfd)
        return None
    return Held(pid, pidfd)


def spawn(
    command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None
) -> tuple[Held, int]:
    """Start a worker in a session of its own; return it with its start time. Raises OSError; then nothing runs.

    output: takes stdout and stderr; None leaves ours.
    """
    popen = subprocess.Popen(
        list(command),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    # A child cannot be reaped by anybody else, so its pid is its own until `reap`, even if it has ended by now.
    try:
        fields = _stat_fields(popen.pid)
        if fields is None:
            raise OSError(f"child {popen.pid} is not in /proc")
        return Held(popen.pid, os.pidfd_open(popen.pid), popen), int(fields[19])
    except OSError:
        # Nobody could watch it (no file descriptor left, say): its seat would be given away while it runs.
        popen.kill()
        popen.wait()
        raise


def find_workers(node_id: str, home: str) -> list[FoundProcess]:
    """Find all living processes that carry this node's marks in their environment, whoever is their parent.

    A process in the very middle of its exec shows no environment yet: an agent that looks for the workers of one that
    died comes up far later than that.
    """
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            raw = Path(f"/proc/{entry.name}/environ").read_bytes()
        except OSError:
            continue  # gone meanwhile, or of another user: not one of ours
        if INCARNATION_VARIABLE.encode() not in raw:
            continue
        environment = _parse_environment(raw)
        if environment.get(NODE_VARIABLE) != node_id or environment.get(HOME_VARIABLE) != home:
            continue
        incarnation = environment.get(INCARNATION_VARIABLE, "")
        pid = int(entry.name)
        ticks = start_ticks(pid)
        fields = _stat_fields(pid)
        if ticks is not None and fields is not None and incarnation:
            found.append(FoundProcess(incarnation, pid, ticks, int(fields[3]) == pid, environment))
    return found


def _parse_environment(raw: bytes) -> dict[str, str]:
    pairs = (part.partition("=") for part in raw.decode("utf-8", errors="replace").split("\0"))
    return {name: value for name, equals, value in pairs if equals}


def kill_rest(incarnation: str, node_id: str, home: str) -> int:
    """SIGKILL what a worker that has ended left behind (helpers of its libraries); return how many there were."""
    killed = 0
    for found in find_workers(node_id, home):
        if found.incarnation != incarnation:
            continue
        held = hold(found.pid, found.start_ticks)
        if held is not None:
            held.signal(signal.SIGKILL)
            held.close()
            killed += 1
    return killed
