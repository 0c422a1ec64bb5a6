"""The supervisor with tiny processes of our own: restarts, order, deadlines, and what a killed one leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from infra.local.layout import ROOT, Layout
from infra.local.leftovers import end_processes, find_processes, still_there
from infra.local.probes import EpmdProbe
from infra.local.process_spec import ProcessSpec
from infra.local.state import AlreadyLocked, exclusive_lock, read_report
from infra.local.supervisor import Supervisor, rotate_if_long

LIMIT_S = 20.0

# Writes its name and what happens to it into the file of its first argument.
OBEDIENT = """
import os, signal, sys, time
def note(word):
    with open(sys.argv[1], "a") as file: file.write(f"{sys.argv[2]} {word}\\n")
def leave(*_):
    note("stops"); sys.exit(0)
signal.signal(signal.SIGTERM, leave)
note("starts")
while True: time.sleep(0.05)
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
# As a node agent does: a child in a session of its own, which the death of its parent does not reach.
PARENT = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    "start_new_session=True); time.sleep(600)"
)


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout = Layout(tmp_path / "home")
    layout.make_folders()
    yield layout
    end_processes(find_processes(layout.marker), grace_s=0.0)


def make_spec(name: str, code: str, *arguments: str, **changes: object) -> ProcessSpec:
    command = (sys.executable, "-c", code, *arguments)
    return ProcessSpec(name=name, command=command, env=dict(os.environ), **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def running(layout: Layout, *specs: ProcessSpec) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(layout, specs)
    task = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        supervisor.request_stop()
        await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.02)


def log_text(layout: Layout, name: str) -> str:
    path = layout.logs / f"{name}.log"
    return path.read_text() if path.exists() else ""


def state_of(supervisor: Supervisor, name: str) -> str:
    return supervisor.processes[name].report().state


async def test_a_killed_process_is_started_again_and_it_says_so(
    layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(layout, make_spec("sleeper", "import time; time.sleep(600)")) as supervisor:
        await until(lambda: state_of(supervisor, "sleeper") == "ready")
        first = supervisor.processes["sleeper"].report()
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: supervisor.processes["sleeper"].report().starts == 2)
        await until(lambda: state_of(supervisor, "sleeper") == "ready")
        assert supervisor.processes["sleeper"].report().pid != first.pid
    assert "sleeper: ended (killed by SIGKILL); starting it again in 0.5 s" in capsys.readouterr().out
    assert find_processes(layout.marker) == []


async def test_a_process_that_keeps_dying_is_started_ever_more_slowly_and_its_last_words_are_told(
    layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(
        layout, make_spec("doomed", "import sys; sys.exit('no such thing')", ready=EpmdProbe(1))
    ) as supervisor:
        await until(lambda: supervisor.processes["doomed"].report().failures_in_a_row == 3)
        report = supervisor.processes["doomed"].report()
    assert report.detail == "ended (exit status 1): no such thing" and not report.ever_ready
    words = capsys.readouterr().out
    assert [f"in {delay} s" in words for delay in ("0.5", "1", "2")] == [True] * 3


async def test_processes_start_after_what_they_depend_on_and_stop_before_it(
    layout: Layout, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    one_shot = "import sys; open(sys.argv[1], 'a').write('migrations ran\\n')"
    specs = [
        make_spec("service", OBEDIENT, str(notes), "service", depends_on=("server", "migrations")),
        make_spec("late", OBEDIENT, str(notes), "late", depends_on=("service",)),
        make_spec("migrations", one_shot, str(notes), depends_on=("server",), one_shot=True),
        make_spec("server", OBEDIENT, str(notes), "server"),
    ]
    async with running(layout, *specs) as supervisor:
        await until(lambda: state_of(supervisor, "late") == "ready")
        await until(lambda: notes.read_text().count("starts") == 3)
        assert state_of(supervisor, "migrations") == "done"
    lines = notes.read_text().splitlines()
    # Without a probe "ready" means "runs", so what one writes at its start may come a moment after the next one's.
    assert lines[-3:] == ["late stops", "service stops", "server stops"]
    assert sorted(lines[:4]) == ["late starts", "migrations ran", "server starts", "service starts"]


async def test_a_failing_one_shot_is_tried_again_and_holds_back_what_depends_on_it(
    layout: Layout, tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    code = "import os, sys; sys.exit(0 if os.path.exists(sys.argv[1]) else 'not yet')"
    specs = [
        make_spec("migrations", code, str(allowed), one_shot=True),
        make_spec("service", "import time; time.sleep(600)", depends_on=("migrations",)),
    ]
    async with running(layout, *specs) as supervisor:
        await until(lambda: supervisor.processes["migrations"].report().failures_in_a_row >= 1)
        assert state_of(supervisor, "service") == "waiting"
        allowed.touch()
        await until(lambda: state_of(supervisor, "service") == "ready")


async def test_a_process_that_ignores_its_signal_is_killed_after_its_deadline(layout: Layout) -> None:
    async with running(layout, make_spec("deaf", DEAF, stop_deadline_s=0.5)) as supervisor:
        await until(lambda: "deaf" in log_text(layout, "deaf"))
        started_s = time.monotonic()
    assert 0.4 < time.monotonic() - started_s < 5
    assert state_of(supervisor, "deaf") == "stopped" and find_processes(layout.marker) == []


async def test_one_that_never_becomes_ready_is_killed_and_started_again(layout: Layout) -> None:
    spec = make_spec("mute", "import time; time.sleep(600)", ready=EpmdProbe(1), ready_timeout_s=0.3)
    async with running(layout, spec) as supervisor:
        await until(lambda: supervisor.processes["mute"].report().starts == 2)


async def test_stopping_does_not_wait_for_a_back_off_or_a_dependency(layout: Layout) -> None:
    doomed = make_spec("doomed", "import sys; sys.exit(1)", ready=EpmdProbe(1))
    waiting = make_spec("waiting", "import time; time.sleep(600)", depends_on=("doomed",))
    async with running(layout, doomed, waiting) as supervisor:
        await until(lambda: supervisor.processes["doomed"].report().failures_in_a_row >= 4)
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 2.0


@pytest.mark.parametrize("turns", range(6))
async def test_a_stop_that_comes_while_a_process_is_being_started_is_not_lost(
    layout: Layout, turns: int
) -> None:
    async with running(layout, make_spec("deaf", DEAF, stop_deadline_s=0.2)):
        for _ in range(turns):  # of the event loop: from not begun at all to just started
            await asyncio.sleep(0)
    assert find_processes(layout.marker) == []


async def test_a_child_that_left_its_parents_session_goes_too(layout: Layout) -> None:
    async with running(layout, make_spec("agent", PARENT)) as supervisor:
        await until(lambda: len(find_processes(layout.marker)) == 2)
        agent = supervisor.processes["agent"].report()
        assert agent.pid is not None
    assert find_processes(layout.marker) == []


async def test_only_one_supervisor_runs_per_clone(layout: Layout) -> None:
    async with running(layout, make_spec("sleeper", "import time; time.sleep(600)")) as supervisor:
        await until(lambda: state_of(supervisor, "sleeper") == "ready")
        with pytest.raises(AlreadyLocked):
            await Supervisor(layout, []).run()
        assert state_of(supervisor, "sleeper") == "ready"


async def test_the_state_file_tells_what_runs_and_goes_away(layout: Layout) -> None:
    async with running(layout, make_spec("sleeper", "import time; time.sleep(600)")):
        await until(lambda: (report := read_report(layout)) is not None and report.processes[0].ever_ready)
        report = read_report(layout)
        assert report is not None and report.pid == os.getpid()
        assert [(each.name, each.state) for each in report.processes] == [("sleeper", "ready")]
    assert read_report(layout) is None


def test_the_state_file_of_a_dead_supervisor_counts_as_none(layout: Layout) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale = {"pid": ended.pid, "start_ticks": 1, "started_s": 0.0, "processes": []}
    layout.state_file.write_text(json.dumps(stale))
    assert read_report(layout) is None


SUPERVISE = """
import asyncio, os, sys
from pathlib import Path
from infra.local.layout import Layout
from infra.local.process_spec import ProcessSpec
from infra.local.supervisor import Supervisor, run_until_signalled

async def main():
    code = sys.argv[2]
    spec = ProcessSpec(name="agent", command=(sys.executable, "-c", code), env=dict(os.environ))
    await run_until_signalled(Supervisor(Layout(Path(sys.argv[1])), [spec]))

asyncio.run(main())
"""


async def test_what_a_killed_supervisor_left_is_ended_by_the_next_one_and_nothing_else_is(
    layout: Layout, tmp_path: Path
) -> None:
    # Given a supervisor with a process and its child, killed, and a neighbour's process of the same program
    neighbour = Layout(tmp_path / "neighbour")
    neighbour.make_folders()
    command = [sys.executable, "-c", SUPERVISE]
    with (
        subprocess.Popen([*command, str(layout.home), PARENT], cwd=ROOT) as killed,
        subprocess.Popen([*command, str(neighbour.home), PARENT], cwd=ROOT) as other,
    ):
        await until(lambda: len(find_processes(layout.marker)) == 2 == len(find_processes(neighbour.marker)))
        leftovers, neighbours = find_processes(layout.marker), find_processes(neighbour.marker)
        killed.kill()
        killed.wait()
        assert still_there(leftovers) == leftovers

        # When the next supervisor of the clone starts
        async with running(layout, make_spec("agent", PARENT)) as supervisor:
            await until(lambda: state_of(supervisor, "agent") == "ready")

            # Then the leftovers are gone, its own and the neighbour's run
            assert still_there(leftovers) == []
            assert still_there(neighbours) == neighbours
        other.send_signal(signal.SIGTERM)
        assert other.wait(LIMIT_S) == 0
    assert still_there(neighbours) == [] == find_processes(layout.marker)


def test_an_over_long_log_is_moved_aside_under_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    with open(path, "ab") as writer:
        writer.write(b"a" * 50 + b"tail\n")
        writer.flush()
        assert rotate_if_long(path, 60) is False
        assert rotate_if_long(path, 40) is True
        writer.write(b"new\n")
        writer.flush()
    assert path.read_bytes() == b"new\n"
    older = (tmp_path / "x.log.1").read_bytes()
    assert older.endswith(b"tail\n") and len(older) == 40


def test_a_second_holder_of_a_lock_may_wait_for_the_first(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", list[str]()
    waiting = threading.Event()

    def second() -> None:
        with exclusive_lock(path, before_waiting=waiting.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with exclusive_lock(path):
        thread.start()
        assert waiting.wait(5)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
