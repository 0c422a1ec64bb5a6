"""Runs a set of processes: starts them in the order of their dependencies, keeps them running, stops them in order.

Knows nothing of what the processes are. One supervisor per clone, by a lock file. Controlled by signals: SIGTERM or
SIGINT stops everything in order, a second one kills. Reports through `run/state.json`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from infra.local.layout import Layout
from infra.local.leftovers import end_processes, find_processes, start_ticks
from infra.local.process_spec import ProcessSpec, stop_order
from infra.local.state import SupervisorReport, exclusive_lock, write_report
from infra.local.supervised import SupervisedProcess

LOG_LIMIT_BYTES = 10 * 1024 * 1024  # and as much again in the one older file that is kept
LOG_CHECK_EVERY_S = 5.0


class Supervisor:
    """Build it inside a running event loop, then `run()`. `request_stop()` ends it, from a signal or a test."""

    def __init__(self, layout: Layout, specs: Sequence[ProcessSpec]) -> None:
        self._layout = layout
        self._stop_order = stop_order(specs)
        self._started_s = time.time()
        self._stop_requested = asyncio.Event()
        self._changed = asyncio.Event()
        self.processes = {
            spec.name: SupervisedProcess(
                spec,
                marker=layout.marker,
                log_file=log_path(layout, spec.name),
                say=_say,
                on_change=self._changed.set,
            )
            for spec in specs
        }

    def request_stop(self) -> None:
        """The first call stops in order; any later one kills what is left at once."""
        if self._stop_requested.is_set():
            for process in self.processes.values():
                process.kill()
        self._stop_requested.set()

    async def run(self) -> None:
        """Until a stop is requested and everything has ended. Raises AlreadyLocked if another supervisor runs."""
        self._layout.make_folders()
        with exclusive_lock(self._layout.supervisor_lock):
            _end_leftovers(self._layout)
            try:
                await self._supervise()
            finally:
                # What a killed process left behind (a worker whose agent was killed) goes too; and everything, if the
                # supervisor itself fails.
                _end_leftovers(self._layout)
                self._layout.state_file.unlink(missing_ok=True)
            _say("stopped")

    async def _supervise(self) -> None:
        async with asyncio.TaskGroup() as group:
            side_tasks = [group.create_task(self._report_changes()), group.create_task(self._bound_logs())]
            for process in self.processes.values():
                dependencies = [self.processes[name].is_up for name in process.spec.depends_on]
                group.create_task(process.run(dependencies))
            await self._stop_requested.wait()
            _say("stopping")
            for names in self._stop_order:
                await asyncio.gather(*(self.processes[name].stop() for name in names))
            for task in side_tasks:
                task.cancel()

    async def _report_changes(self) -> None:
        """Write the state file after every change; bursts become one write. A full disk is said, and tried again."""
        own_ticks = start_ticks(os.getpid()) or 0
        while True:
            self._changed.clear()
            reports = tuple(process.report() for process in self.processes.values())
            try:
                write_report(self._layout, SupervisorReport(os.getpid(), own_ticks, self._started_s, reports))
            except OSError as error:
                _say(f"the state file could not be written: {error}")
                await asyncio.sleep(1.0)
                continue
            await self._changed.wait()
            await asyncio.sleep(0.02)

    async def _bound_logs(self) -> None:
        """Keep every log file under a bound. The processes hold their files open for appending, so an over-long one
        is copied aside and emptied in place; what is written between the two is lost."""
        names = [*self.processes, SUPERVISOR_LOG]
        while True:
            await asyncio.sleep(LOG_CHECK_EVERY_S)
            for name in names:
                try:
                    rotate_if_long(log_path(self._layout, name), LOG_LIMIT_BYTES)
                except OSError as error:
                    _say(f"the log of {name} could not be shortened: {error}")


SUPERVISOR_LOG = "supervisor"


def log_path(layout: Layout, name: str) -> Path:
    return layout.logs / f"{name}.log"


def rotate_if_long(path: Path, limit_bytes: int) -> bool:
    """Move the content of an over-long log to `NAME.1` and empty it in place. Says whether it did."""
    try:
        if path.stat().st_size <= limit_bytes:
            return False
    except FileNotFoundError:
        return False
    older = path.with_name(path.name + ".1")
    with open(path, "rb") as source, open(older, "wb") as target:
        source.seek(max(0, path.stat().st_size - limit_bytes))
        while block := source.read(1 << 20):
            target.write(block)
    os.truncate(path, 0)
    return True


async def run_until_signalled(supervisor: Supervisor) -> None:
    """`run()` with SIGTERM and SIGINT wired to `request_stop`."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.request_stop)
    await supervisor.run()


def _end_leftovers(layout: Layout) -> None:
    leftovers = find_processes(layout.marker)
    if not leftovers:
        return
    names = ", ".join(sorted({each.name for each in leftovers}))
    _say(f"ending {len(leftovers)} left-over process(es) of an earlier run: {names}")
    survivors = end_processes(leftovers, grace_s=8.0)
    for each in survivors:
        _say(f"{each.name} (pid {each.pid}) cannot be killed")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stdout, flush=True)
