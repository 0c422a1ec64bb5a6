"""`make up` as a user sees it: a live demo, the files it writes, a status that tells the truth, a service that comes back."""

from __future__ import annotations

import os
import signal
import stat
import time

from infra.local.demo import first_answer
from infra.local.start import ensure_stack
from infra.local.state import ProcessReport, read_report
from tests.e2e.conftest import System


def processes(system: System) -> dict[str, ProcessReport]:
    report = read_report(system.layout)
    assert report is not None
    return {each.name: each for each in report.processes}


def test_the_first_answer_is_true_and_the_files_are_private(system: System) -> None:
    assert "Paris" in first_answer(system.team, system.model)
    for path in (system.layout.env_file, system.layout.secrets_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_second_run_changes_nothing_and_takes_seconds(system: System) -> None:
    before = processes(system)
    started_s = time.monotonic()
    again = ensure_stack(system.layout, os.environ)
    assert time.monotonic() - started_s < 20
    assert (again.base_url, again.demo.key) == (system.url, system.api_key)
    assert {name: each.pid for name, each in processes(system).items()} == {
        name: each.pid for name, each in before.items()
    }


def test_a_killed_service_is_started_again_and_serves(system: System) -> None:
    before = processes(system)["gateway"]
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    end_s = time.monotonic() + 20
    while (now := processes(system)["gateway"]).starts == before.starts or now.state != "ready":
        assert time.monotonic() < end_s, now
        time.sleep(0.1)
    assert "Paris" in ensure_stack(system.layout, os.environ).demo.answer
