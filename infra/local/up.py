"""Brings a clone up: ports, credentials, the supervisor, and the wait until everything is ready; and takes it down."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from infra.local.credentials import Credentials, ensure_credentials
from infra.local.daemon import servers_have_data
from infra.local.failures import SetupFailed, explain
from infra.local.layout import ROOT, Layout
from infra.local.leftovers import end_processes, find_processes, start_ticks
from infra.local.ports import Ports, ensure_ports, load_ports
from infra.local.process_spec import ProcessState
from infra.local.progress import done_line, say
from infra.local.state import ProcessReport, SupervisorReport, read_report
from infra.local.supervised import last_line_of
from infra.local.supervisor import SUPERVISOR_LOG, log_path

START_LIMIT_S = 180.0
# A process that dies this often in a row without ever being ready will not come up by itself.
GIVE_UP_AFTER_FAILURES = 3
# The supervisor's own worst case: gateway 25 s, scheduler and batch 25, agent 40, billing 25, servers 20.
DOWN_LIMIT_S = 150.0
LEAST_FREE_BYTES = 500 * 1024**2
POLL_S = 0.1


def ensure_running(
    layout: Layout, which: str, environ: Mapping[str, str], *, quiet: bool = False
) -> tuple[Ports, Credentials]:
    """Everything of the set runs and was ready once, when this returns; what already runs is left as it is.

    which: "all" or "servers". quiet: no progress lines. Raises SetupFailed, after having stopped what it had started.
    """
    _check_path(layout)
    layout.make_folders()
    if (report := read_report(layout)) is None:
        _check_free_space(layout)
        _end_leftovers(layout)
        _prepare_ports(layout, environ, quiet=quiet)
        ensure_credentials(layout, servers_have_data=servers_have_data(layout))
        supervisor = _start_supervisor(layout, which, environ)
        try:
            _wait_until_ready(layout, supervisor, quiet=quiet)
        except BaseException:  # interrupted too: nothing is left half-started
            stop(layout, quiet=True)
            raise
    else:
        if not quiet:
            say(f"  already running (supervisor {report.pid})")
        _wait_until_ready(layout, None, quiet=quiet)
    ports = load_ports(layout)
    if ports is None:
        raise SetupFailed(
            f"{layout.ports_file} has gone while the system runs: run 'make down', then 'make up'"
        )
    return ports, ensure_credentials(layout, servers_have_data=True)


def stop(layout: Layout, *, quiet: bool = False) -> bool:
    """Stop everything of the set, and leave no process. Says whether anything had been running."""
    report = read_report(layout)
    if report is not None:
        _signal(report, signal.SIGTERM)
        _wait_for_end(report, quiet=quiet)
    leftovers = find_processes(layout.marker)
    if leftovers:
        survivors = end_processes(leftovers, grace_s=10.0)
        if survivors:
            pids = " ".join(str(each.pid) for each in survivors)
            raise SetupFailed(
                f"these processes cannot be ended: {pids} (another user's? run 'make down' as that user)"
            )
    layout.state_file.unlink(missing_ok=True)
    return report is not None or bool(leftovers)


def _check_path(layout: Layout) -> None:
    """RabbitMQ hands its data folder to a shell between quotes (its disk monitor); with one in it, it hangs at start."""
    if any(character in str(layout.home) for character in "'\"`$\\\n"):
        raise SetupFailed(
            f"the folder {str(layout.home)!r} has a quote, $ or backslash in its path, which RabbitMQ cannot live with: "
            "move the clone elsewhere"
        )


def _check_free_space(layout: Layout) -> None:
    free = shutil.disk_usage(layout.home).free
    if free < LEAST_FREE_BYTES:
        raise SetupFailed(
            f"the disk of {layout.home} has {free // 1024**2} MB free and the servers need "
            f"{LEAST_FREE_BYTES // 1024**2} MB: free some space and run it again"
        )


def _end_leftovers(layout: Layout) -> None:
    leftovers = find_processes(layout.marker)
    if leftovers:
        say(f"  ending {len(leftovers)} left-over process(es) of an earlier run")
        end_processes(leftovers, grace_s=8.0)


def _prepare_ports(layout: Layout, environ: Mapping[str, str], *, quiet: bool) -> None:
    wish = environ.get("ROUNDHOUSE_HTTP_PORT", "")
    if wish and not (wish.isdigit() and 0 < int(wish) < 65_536):
        raise SetupFailed(f"ROUNDHOUSE_HTTP_PORT is {wish!r}: name a port number from 1 to 65535")
    plan = ensure_ports(layout, http_port=int(wish) if wish else None)
    for name, old, new in plan.moved:
        if not quiet:
            say(f"  port {old} is taken by another program: {name.replace('_', ' ')} uses {new} instead")


def _start_supervisor(layout: Layout, which: str, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that closing the terminal or Ctrl-C in it does not reach it."""
    with open(log_path(layout, SUPERVISOR_LOG), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "infra.local.daemon", str(layout.home), which],
            cwd=ROOT,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait_until_ready(layout: Layout, supervisor: subprocess.Popen[bytes] | None, *, quiet: bool) -> None:
    """Until every process was ready once (one-shots: done), saying each as it comes.

    supervisor: the one just started, whose early death is noticed; None for one that runs already.
    """
    started_s = time.monotonic()
    said: set[str] = set()
    while True:
        report = read_report(layout)
        if report is not None:
            for process in report.processes:
                if process.ever_ready and process.name not in said:
                    said.add(process.name)
                    if not quiet and supervisor is not None:
                        say(done_line(process.name, time.monotonic() - started_s))
            if all(process.ever_ready for process in report.processes):
                return
            _give_up_on_hopeless(layout, report)
        elif supervisor is None or supervisor.poll() is not None:
            last_line = last_line_of(log_path(layout, SUPERVISOR_LOG))
            raise SetupFailed(
                explain(last_line, step="the supervisor ended", log=_name(layout, SUPERVISOR_LOG))
            )
        if time.monotonic() - started_s > START_LIMIT_S:
            waiting = [each for each in report.processes if not each.ever_ready] if report else []
            words = "; ".join(f"{each.name} is {each.state} {each.detail}".strip() for each in waiting)
            raise SetupFailed(
                f"not ready after {START_LIMIT_S:g} s: {words or 'the supervisor says nothing'}"
            )
        time.sleep(POLL_S)


def _give_up_on_hopeless(layout: Layout, report: SupervisorReport) -> None:
    for process in report.processes:
        if not process.ever_ready and process.failures_in_a_row >= GIVE_UP_AFTER_FAILURES:
            log = log_path(layout, process.name)
            cause = explain(
                _tail(layout, process), step=f"{process.name} does not start", log=_name(layout, log.stem)
            )
            raise SetupFailed(cause)


def _tail(layout: Layout, process: ProcessReport) -> str:
    """What may tell why it does not start: its log's last lines, and the supervisor's words if it never ran."""
    try:
        lines = log_path(layout, process.name).read_text(errors="replace").splitlines()[-20:]
    except FileNotFoundError:
        lines = []
    return "\n".join([*lines, process.detail])


def _name(layout: Layout, log_name: str) -> str:
    return os.path.relpath(log_path(layout, log_name), ROOT)


def _wait_for_end(report: SupervisorReport, *, quiet: bool) -> None:
    """Until the supervisor is gone; one that does not end in time is killed, and what it leaves is swept up later."""
    started_s = time.monotonic()
    while start_ticks(report.pid) == report.start_ticks:
        if time.monotonic() - started_s > DOWN_LIMIT_S:
            if not quiet:
                say(f"  the supervisor did not end within {DOWN_LIMIT_S:g} s: killing it")
            _signal(report, signal.SIGKILL)
            return
        time.sleep(POLL_S)


def _signal(report: SupervisorReport, number: signal.Signals) -> None:
    try:
        os.kill(report.pid, number)
    except ProcessLookupError:
        pass  # it ended just now
    except PermissionError:
        raise SetupFailed(
            f"the supervisor (pid {report.pid}) belongs to another user: run this as that user"
        ) from None


def is_settled(process: ProcessReport) -> bool:
    return process.state in (ProcessState.READY, ProcessState.DONE)
