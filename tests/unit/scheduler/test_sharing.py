"""Who is asked to give jobs back because another worker of the resource has nothing to do."""

from __future__ import annotations

import msgspec
import pytest

from services.scheduler.sharing import ASK_AGAIN_S, FRESH_S, Sharing, find_holders
from services.scheduler.snapshot import Stored, StoredPlace
from shared.messages import WorkerPhase, WorkerReport
from tests.unit.scheduler.test_snapshot import make_stored_place

NOW = 1000.0


def report(
    name: str, held: int = 0, waiting: int = 0, phase: WorkerPhase = "ready", resource_id: str = "r1"
) -> WorkerReport:
    return WorkerReport(
        worker_id=f"wrk_{name}",
        resource_id=resource_id,
        place=0,
        incarnation=name,
        phase=phase,
        sent_unix_ms=0,
        held_jobs=held,
        running_jobs=held - waiting,
        waiting_jobs=waiting,
    )


IDLE, BUSY, HOLDS, HOLDS_TOO, WAITS = (
    report("idle"),
    report("busy", 4),
    report("holds", 6, 2),
    report("holds-too", 9, 1),
    report("waits", 2, 2),
)


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        pytest.param([HOLDS], [], id="alone"),
        pytest.param([HOLDS, BUSY], [], id="nobody is idle"),
        pytest.param([HOLDS, WAITS], [], id="a worker whose model is loading is not idle"),
        pytest.param([IDLE, BUSY], [], id="nobody holds too much"),
        pytest.param([IDLE, HOLDS, BUSY, HOLDS_TOO], ["holds", "holds-too"], id="all that hold jobs back"),
        pytest.param([IDLE, WAITS], [], id="what waits alone is about to begin"),
    ],
)
def test_find_holders(reports: list[WorkerReport], expected: list[str]) -> None:
    assert find_holders(reports) == expected


def stored(*reports: WorkerReport, state: str = "ready") -> Stored:
    places = [
        msgspec.structs.replace(
            make_stored_place(each.incarnation),
            resource_id=each.resource_id,
            worker_id=each.worker_id,
            state=state,
        )
        for each in reports
    ]
    return Stored(now=NOW, resources=[], places=places)


def asked(
    sharing: Sharing, *reports: WorkerReport, now_s: float = NOW, heard_s: float | None = None
) -> list[str]:
    heard = {each.incarnation: (each, now_s if heard_s is None else heard_s) for each in reports}
    messages = sharing.to_ask(stored(*reports), heard, now_s)
    assert all(message.worker_id == f"wrk_{message.incarnation}" for message in messages)
    return [message.incarnation for message in messages]


def test_a_holder_is_asked_and_again_after_a_while() -> None:
    sharing = Sharing()
    assert asked(sharing, IDLE, HOLDS) == ["holds"]
    assert asked(sharing, IDLE, HOLDS, now_s=NOW + ASK_AGAIN_S - 0.1) == []
    assert asked(sharing, IDLE, HOLDS, HOLDS_TOO, now_s=NOW + ASK_AGAIN_S - 0.1) == ["holds-too"]
    assert asked(sharing, IDLE, HOLDS, now_s=NOW + ASK_AGAIN_S) == ["holds"]


def test_only_what_is_known_now_counts_and_each_resource_for_itself() -> None:
    assert asked(Sharing(), IDLE, HOLDS, heard_s=NOW - FRESH_S) == []
    assert asked(Sharing(), report("idle", phase="draining"), HOLDS) == []
    assert asked(Sharing(), IDLE, report("holds", 6, 2, phase="draining")) == []
    assert asked(Sharing(), report("idle", resource_id="r2"), HOLDS) == []


def test_a_place_that_is_not_ready_or_not_heard_of_is_left_out() -> None:
    heard = {each.incarnation: (each, NOW) for each in (IDLE, HOLDS)}
    assert Sharing().to_ask(stored(IDLE, HOLDS, state="draining"), heard, NOW) == []
    unheard: list[StoredPlace] = list(stored(IDLE, HOLDS).places)
    assert Sharing().to_ask(Stored(now=NOW, resources=[], places=unheard), {}, NOW) == []
