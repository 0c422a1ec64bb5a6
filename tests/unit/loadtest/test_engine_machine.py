"""How much of the machine was somebody else's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from loadtest.engine_machine import OthersShare, describe_machine, read_cpu_seconds

TICKS = os.sysconf("SC_CLK_TCK")


def test_cpu_seconds_are_those_of_all_cores_and_stolen_ones_are_not_idle() -> None:
    #               user nice system idle iowait irq softirq steal guest guest_nice
    stat = "cpu  100 10 40 700 50 1 4 95 60 5\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert list(read_cpu_seconds(stat)) == pytest.approx([1000 / TICKS, 250 / TICKS])


def test_what_a_finished_child_used_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 50.0), (110.0, 58.0)])
    monkeypatch.setattr("loadtest.engine_machine.read_cpu_seconds", lambda stat: next(readings))
    share = OthersShare()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    # Of 10 s, 8 were busy, at least 0.5 of them ours.
    assert 60.0 < share.percent() <= 75.0


def test_the_machine_is_described_with_its_versions() -> None:
    assert "cores (" in describe_machine() and "torch " in describe_machine()
