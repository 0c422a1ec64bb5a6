"""Finds and ends processes of a clone that no supervisor watches any more. By environment marker, never by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from infra.local.layout import CLONE_VARIABLE, PROCESS_VARIABLE

# Servers that need another signal than SIGTERM for a quick orderly end: PostgreSQL's SIGTERM waits for its clients.
STOP_SIGNALS = {"postgres": signal.SIGINT}
POLL_S = 0.05
KILL_TAKES_S = 5.0  # a killed process frees its memory first; one in a stuck disk read takes longer


@dataclass(frozen=True, slots=True)
class FoundProcess:
    """A process, told from a later one of the same pid by its start time (clock ticks since boot)."""

    pid: int
    start_ticks: int
    parent_pid: int
    name: str  # the marker's process name; that of the nearest marked ancestor, if it has none of its own


def start_ticks(pid: int) -> int | None:
    """When the process started; None if it is gone, or only a zombie is left of it."""
    stat = _read_stat(pid)
    return stat[2] if stat is not None and stat[0] != "Z" else None


def find_processes(clone_marker: str) -> list[FoundProcess]:
    """All processes that carry the marker or descend from one that does; never the caller or its ancestors.

    Descendants count since PostgreSQL and Redis overwrite their environment with their process title.
    """
    stats = {pid: stat for pid in _pids() if (stat := _read_stat(pid)) is not None and stat[0] != "Z"}
    ours = _with_ancestors(os.getpid(), {pid: stat[1] for pid, stat in stats.items()})
    names: dict[int, str] = {}
    for pid in stats:
        environment = _read_environment(pid)
        if environment.get(CLONE_VARIABLE) == clone_marker:
            names[pid] = environment.get(PROCESS_VARIABLE, "?")
    pending = list(names)
    while pending:
        parent = pending.pop()
        for pid, (_, parent_pid, _) in stats.items():
            if parent_pid == parent and pid not in names:
                names[pid] = names[parent]
                pending.append(pid)
    return [
        FoundProcess(pid, stats[pid][2], stats[pid][1], name)
        for pid, name in names.items()
        if pid not in ours
    ]


def still_there(processes: Iterable[FoundProcess]) -> list[FoundProcess]:
    return [each for each in processes if start_ticks(each.pid) == each.start_ticks]


def end_processes(processes: Iterable[FoundProcess], *, grace_s: float) -> list[FoundProcess]:
    """Ask them to stop, parents before their children; after `grace_s` kill what is left. Returns what survived that.

    Parents first, since a server ends its own children in order; a child is asked when its parent has gone without it.
    """
    asked: set[int] = set()
    alive = still_there(processes)
    end_s = time.monotonic() + grace_s
    while alive and time.monotonic() < end_s:
        pids = {each.pid for each in alive}
        for each in alive:
            if each.parent_pid not in pids and each.pid not in asked:
                asked.add(each.pid)
                _send(each, STOP_SIGNALS.get(each.name, signal.SIGTERM))
        time.sleep(POLL_S)
        alive = still_there(alive)
    for each in alive:
        _send(each, signal.SIGKILL)
    end_s = time.monotonic() + KILL_TAKES_S
    while alive and time.monotonic() < end_s:
        time.sleep(POLL_S)
        alive = still_there(alive)
    return alive


def _send(process: FoundProcess, number: signal.Signals) -> None:
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        pass  # it ended by itself in the meantime, which is what was wanted


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _read_stat(pid: int) -> tuple[str, int, int] | None:
    """State letter, parent pid, start ticks; None if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the command's name before it may hold anything
    return fields[0], int(fields[1]), int(fields[19])


def _read_environment(pid: int) -> dict[str, str]:
    """The environment the process started with; empty for another user's process, which cannot be ours."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    pairs = (entry.partition("=") for entry in raw.decode(errors="surrogateescape").split("\0"))
    return {name: value for name, equals, value in pairs if equals}


def _with_ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    line = {pid}
    while (parent := parents.get(pid)) is not None and parent not in line and parent > 0:
        line.add(parent)
        pid = parent
    return line
