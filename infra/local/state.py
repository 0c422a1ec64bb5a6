"""`run/state.json`: what the supervisor says about itself and its processes, for `status` and `up` to read."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from infra.local.layout import Layout, write_private
from infra.local.leftovers import start_ticks


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """One process as the supervisor sees it. Times are Unix seconds."""

    name: str
    state: str
    since_s: float
    pid: int | None = None
    starts: int = 0
    # Failures since it was last ready for a while; what the back-off is made from.
    failures_in_a_row: int = 0
    ever_ready: bool = False
    one_shot: bool = False
    detail: str = ""  # why it is not ready, or how it last ended


@dataclass(frozen=True, slots=True)
class SupervisorReport:
    pid: int
    start_ticks: int
    started_s: float
    processes: tuple[ProcessReport, ...]


def write_report(layout: Layout, report: SupervisorReport) -> None:
    write_private(layout.state_file, json.dumps(asdict(report), indent=1), durable=False)


def read_report(layout: Layout) -> SupervisorReport | None:
    """The report of the supervisor that runs now; None if there is none, or only the file of an earlier one."""
    try:
        stored = json.loads(layout.state_file.read_text())
        known = {each.name for each in fields(ProcessReport)}
        processes = tuple(
            ProcessReport(**{name: value for name, value in each.items() if name in known})
            for each in stored["processes"]
        )
        report = SupervisorReport(stored["pid"], stored["start_ticks"], stored["started_s"], processes)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return report if start_ticks(report.pid) == report.start_ticks else None


class AlreadyLocked(Exception):
    """Another process holds the lock."""


@contextmanager
def exclusive_lock(path: Path, *, before_waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file while the block runs; the kernel lets go of it when the process dies, however it dies.

    If another process has it: with `before_waiting`, call that and wait; without, raise AlreadyLocked at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if before_waiting is None:
                raise AlreadyLocked(str(path)) from None
            before_waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
