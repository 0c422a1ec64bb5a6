"""When requests count as cut: their worker was draining, and was killed before it had finished them."""

from __future__ import annotations

from typing import Any

import pytest

from services.scheduler.actions import FreePlace
from services.scheduler.place_rules import look_at_place
from services.scheduler.states import PlaceState
from services.scheduler.views import ProcessSeen, WorkerSeen
from tests.unit.scheduler.builders import NOW, make_place, make_view

DRAINING, READY, LOST = PlaceState.DRAINING, PlaceState.READY, PlaceState.LOST


@pytest.mark.parametrize(
    ("state", "process", "worker", "cut"),
    [
        (DRAINING, {"exit_code": -9}, {"running_jobs": 3, "phase": "draining"}, 3),
        (DRAINING, {"exit_code": 3}, {"running_jobs": 1, "phase": "draining"}, 1),
        # An agent that was away when it happened knows no status.
        (DRAINING, {}, {"running_jobs": 2, "phase": "draining"}, 2),
        # It has finished: the report is from before its end.
        (DRAINING, {"exit_code": 0}, {"running_jobs": 1, "phase": "draining"}, 0),
        (DRAINING, {"exit_code": -9}, {"running_jobs": 0, "phase": "draining"}, 0),
        (DRAINING, {"exit_code": -9}, {"running_jobs": 1, "phase": "drained"}, 0),
        # Crashes of workers that nobody asked to leave are no matter of scaling.
        (READY, {"exit_code": -9}, {"running_jobs": 3, "phase": "ready"}, 0),
        (LOST, {"exit_code": -9}, {"running_jobs": 3, "phase": "ready"}, 0),
    ],
)
def test_cut_requests(state: PlaceState, process: dict[str, Any], worker: dict[str, Any], cut: int) -> None:
    place = make_place(
        0,
        state,
        drain_sent_at=NOW - 5 if state == DRAINING else None,
        process=ProcessSeen(state="exited", reason="gone", **process),
        worker=WorkerSeen(heard_at=NOW - 1, **worker),
    )
    (free,) = [a for a in look_at_place(make_view(place), place).actions if isinstance(a, FreePlace)]
    assert free.cut_jobs == cut
    assert ("were cut" in free.words) is (cut > 0)
