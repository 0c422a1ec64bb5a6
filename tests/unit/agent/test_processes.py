"""Real processes: named by pid and start time, found by their environment, watched until nothing is left."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.worker.agent.processes import Held, find_workers, hold, kill_rest, spawn, start_ticks

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def environment(home: Path, incarnation: str = "inc_1") -> dict[str, str]:
    return {"ROUNDHOUSE_NODE_ID": "n1", "ROUNDHOUSE_HOME": str(home), "ROUNDHOUSE_INCARNATION": incarnation}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def end(held: Held) -> int | None:
    held.signal(signal.SIGKILL)
    code = held.reap()
    held.signal(signal.SIGKILL)  # gone: no error
    held.close()
    return code


def test_a_process_is_found_by_its_marks_and_only_under_its_own_home(tmp_path: Path) -> None:
    held, ticks = spawn(SLEEP, environment(tmp_path), None)
    try:
        wait_for(lambda: bool(find_workers("n1", str(tmp_path))))
        (found,) = find_workers("n1", str(tmp_path))
        assert (found.incarnation, found.pid, found.start_ticks, found.leader) == (
            "inc_1",
            held.pid,
            ticks,
            True,
        )
        assert find_workers("n2", str(tmp_path)) == []
        assert find_workers("n1", str(tmp_path / "other")) == []
    finally:
        assert end(held) == -signal.SIGKILL
    assert find_workers("n1", str(tmp_path)) == []


def test_a_pid_with_another_start_time_is_another_process(tmp_path: Path) -> None:
    held, ticks = spawn(SLEEP, environment(tmp_path), None)
    try:
        assert hold(held.pid, ticks + 1) is None
        again = hold(held.pid, ticks)
        assert again is not None
        again.close()
    finally:
        end(held)
    assert hold(held.pid, ticks) is None


def test_a_zombie_is_gone(tmp_path: Path) -> None:
    held, ticks = spawn([sys.executable, "-c", ""], environment(tmp_path), None)
    wait_for(lambda: start_ticks(held.pid) is None)
    assert os.path.exists(f"/proc/{held.pid}")
    assert hold(held.pid, ticks) is None
    assert held.reap() == 0
    held.close()


def test_a_worker_that_could_not_be_watched_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor_left(_pid: int) -> int:
        raise OSError(24, "Too many open files")

    started = tmp_path / "started"
    program = [sys.executable, "-c", f"open({str(started)!r}, 'w').close(); import time; time.sleep(60)"]
    monkeypatch.setattr(os, "pidfd_open", no_descriptor_left)
    with pytest.raises(OSError, match="Too many open files"):
        spawn(program, environment(tmp_path), None)
    assert find_workers("n1", str(tmp_path)) == []
    time.sleep(0.3)
    assert not started.exists()


def test_what_a_dead_worker_left_behind_is_killed(tmp_path: Path) -> None:
    helper = (
        f"import subprocess, sys, time; subprocess.Popen({SLEEP!r}, start_new_session=True); time.sleep(60)"
    )
    held, _ = spawn([sys.executable, "-c", helper], environment(tmp_path), None)
    other, _ = spawn(SLEEP, environment(tmp_path, "inc_2"), None)
    try:
        wait_for(lambda: len(find_workers("n1", str(tmp_path))) == 3)
        end(held)
        assert kill_rest("inc_1", "n1", str(tmp_path)) == 1
        wait_for(lambda: [f.incarnation for f in find_workers("n1", str(tmp_path))] == ["inc_2"])
    finally:
        end(other)
