"""What a new agent makes of the last one's file and of the processes that it finds."""

from __future__ import annotations

import msgspec
import pytest

from services.worker.agent.adopt import adopt
from services.worker.agent.decide import KnownProcess
from services.worker.agent.processes import FoundProcess
from tests.unit.agent.test_decide import NOW_MS, make_process, make_start


def found(
    incarnation: str = "inc_1", *, leader: bool = True, environment: dict[str, str] | None = None
) -> FoundProcess:
    return FoundProcess(incarnation, 42, 77, leader, environment or {})


@pytest.mark.parametrize(
    ("record", "processes", "state", "reason"),
    [
        (make_process(state="exited", reason="exited"), [found()], "exited", "exited"),
        (make_process(), [found()], "running", ""),
        (make_process(state="intended"), [found()], "running", ""),
        (make_process(), [], "exited", "ended while no agent watched"),
        (make_process(state="intended"), [], "exited", "never started: the agent died before it"),
        # What a worker left behind is not the worker.
        (make_process(), [found(leader=False)], "exited", "ended while no agent watched"),
    ],
)
def test_what_is_remembered(
    record: KnownProcess, processes: list[FoundProcess], state: str, reason: str
) -> None:
    known = adopt([record], processes, NOW_MS)["inc_1"]
    assert (known.state, known.reason) == (state, reason)
    if state == "running":
        assert (known.pid, known.start_ticks) == (42, 77)


def test_a_stop_that_was_under_way_is_still_under_way() -> None:
    record = make_process(told_to_stop=True, kill_unix_ms=NOW_MS + 5)
    known = adopt([record], [found()], NOW_MS)["inc_1"]
    assert known.told_to_stop and known.kill_unix_ms == NOW_MS + 5


def test_a_worker_is_known_by_its_environment_when_the_file_is_lost() -> None:
    spec = msgspec.json.encode(make_start(place=3).spec).decode()
    environment = {"ROUNDHOUSE_WORKER_SPEC": spec, "ROUNDHOUSE_DEVICE": "cpu:1"}
    known = adopt([], [found(environment=environment)], NOW_MS)["inc_1"]
    assert (known.resource_id, known.place, known.device, known.state) == ("res_1", 3, "cpu:1", "running")


def test_a_worker_with_a_damaged_environment_is_still_reported() -> None:
    known = adopt([], [found(environment={"ROUNDHOUSE_WORKER_SPEC": "{"})], NOW_MS)["inc_1"]
    assert known.state == "running" and known.resource_id == ""
