"""What a resource needs: how many places, which victims, when the next start, which state."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from services.scheduler.actions import (
    FreePlace,
    GrantPlace,
    MovePlace,
    NotePlace,
    ProveInterval,
    SendStop,
    SetResource,
)
from services.scheduler.reconcile import (
    HOLDING,
    backoff_s,
    choose_device,
    choose_victims,
    next_start_at,
    reconcile,
    target_state,
)
from services.scheduler.states import PlaceState, ResourceState
from services.scheduler.views import FreeDevice, PlaceView, ProcessSeen, ResourceView, WorkerSeen
from tests.unit.scheduler.builders import LIMITS, NOW, make_place, make_view

STARTING, READY, DRAINING, LOST = PlaceState.STARTING, PlaceState.READY, PlaceState.DRAINING, PlaceState.LOST


def granted(view: ResourceView) -> list[int]:
    return [action.place for action in reconcile(view) if isinstance(action, GrantPlace)]


def moved(view: ResourceView) -> list[tuple[int, str]]:
    return [(action.place, action.action) for action in reconcile(view) if isinstance(action, MovePlace)]


def said(view: ResourceView) -> SetResource | None:
    return next((action for action in reconcile(view) if isinstance(action, SetResource)), None)


def devices(count: int) -> list[FreeDevice]:
    return [FreeDevice("node-1", f"cpu:{index}", "cpu") for index in range(count)]


def test_a_resource_that_is_as_wanted_needs_nothing() -> None:
    assert reconcile(make_view(make_place())) == []


@pytest.mark.parametrize(
    ("places", "count", "expected"),
    [
        ([], 1, [0]),
        ([], 3, [0, 1, 2]),
        ([make_place(1)], 3, [0, 2]),
        ([make_place(0, STARTING)], 2, [1]),
        # Draining and lost places are still taken: the bound counts them.
        ([make_place(0, DRAINING, drain_sent_at=NOW)], 1, []),
        ([make_place(0, LOST, worker=None)], 1, []),
        ([make_place(0), make_place(1, DRAINING, drain_sent_at=NOW)], 2, []),
        # A seat beyond a lowered maximum counts too, though its number is no longer given.
        ([make_place(4, DRAINING, drain_sent_at=NOW)], 2, [0]),
        ([make_place(0), make_place(1)], 2, []),
    ],
)
def test_free_places_are_granted_lowest_first_within_the_bound(
    places: list[PlaceView], count: int, expected: list[int]
) -> None:
    assert granted(make_view(*places, fixed_count=count, free_devices=devices(8))) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"wanted": "off"},
        {"fixed_count": 0},
        {"free_devices": []},
        {"free_devices": [FreeDevice("node-1", "cuda:0", "cuda")]},
        {"failures": 1, "last_failure_at": NOW - 1.9},
        {"last_exit_at": NOW - 0.1},
        {"observing_since": None},
    ],
)
def test_nothing_is_granted(changes: dict[str, Any]) -> None:
    assert granted(make_view(state=ResourceState.STARTING, **changes)) == []


def test_a_place_that_became_free_in_this_look_is_granted_at_the_next_when_its_end_is_counted() -> None:
    exited = ProcessSeen(state="exited", reason="exited with status 1")
    view = make_view(make_place(0, STARTING, process=exited), state=ResourceState.STARTING)
    assert [a for a in reconcile(view) if isinstance(a, FreePlace | GrantPlace)][1:] == []


@pytest.mark.parametrize(
    ("places", "count", "victims"),
    [
        # The highest place when all else is equal.
        ([make_place(0), make_place(1), make_place(2)], 1, [2]),
        # Starting before ready, lost before both.
        ([make_place(0, STARTING), make_place(1)], 1, [0]),
        ([make_place(0, LOST, worker=None), make_place(1, STARTING), make_place(2)], 2, [0, 1]),
        # Idle before busy.
        (
            [make_place(0), make_place(1, worker=WorkerSeen(phase="ready", heard_at=NOW, jobs=1))],
            1,
            [0],
        ),
        # Fewest hot models.
        (
            [
                make_place(0, worker=WorkerSeen(phase="ready", heard_at=NOW, hot_models=1)),
                make_place(1, worker=WorkerSeen(phase="ready", heard_at=NOW, hot_models=3)),
            ],
            1,
            [0],
        ),
    ],
)
def test_the_victims_are_those_that_serve_least(
    places: list[PlaceView], count: int, victims: list[int]
) -> None:
    assert [p.place for p in choose_victims(places, count)] == victims


def test_the_surplus_drains_when_the_count_is_lowered_and_is_told_at_the_next_look() -> None:
    view = make_view(make_place(0), make_place(1), make_place(2), fixed_count=1)
    assert moved(view) == [(2, "drain"), (1, "drain")]
    assert not any(isinstance(action, SendStop) for action in reconcile(view))


def test_all_drain_when_it_is_turned_off() -> None:
    view = make_view(make_place(0), make_place(1, STARTING), fixed_count=2, wanted="off")
    assert sorted(moved(view)) == [(0, "drain"), (1, "drain")]


@pytest.mark.parametrize(
    ("place", "grace_s"),
    [
        (make_place(0, DRAINING), LIMITS.drain_grace_s),
        (make_place(0, DRAINING, ready_at=None, proved_until=None), LIMITS.start_grace_s),
        (make_place(0, DRAINING, stop_sent_at=NOW - 9), None),
        (make_place(0, DRAINING, stop_sent_at=NOW - 10), LIMITS.drain_grace_s),
    ],
)
def test_a_draining_place_is_told_again_and_again(place: PlaceView, grace_s: float | None) -> None:
    stops = [a for a in reconcile(make_view(place, wanted="off")) if isinstance(a, SendStop)]
    assert [stop.grace_s for stop in stops] == ([] if grace_s is None else [grace_s])
    assert all(stop.drain and stop.worker_id == "wrk_0" for stop in stops)


def test_a_drain_that_nobody_was_told_of_is_taken_back_when_wanted_again() -> None:
    view = make_view(make_place(0, DRAINING), state=ResourceState.DRAINING)
    assert moved(view) == [(0, "keep")]
    assert not any(isinstance(action, SendStop) for action in reconcile(view))


@pytest.mark.parametrize(
    "place",
    [
        make_place(0, DRAINING, drain_sent_at=NOW - 1),
        make_place(0, DRAINING, ready_at=None, proved_until=None),
        make_place(0, DRAINING, worker=WorkerSeen(phase="draining", heard_at=NOW)),
        make_place(0, DRAINING, worker=None),
    ],
)
def test_a_drain_that_may_be_known_goes_on_and_its_seat_is_not_given_twice(place: PlaceView) -> None:
    view = make_view(place, state=ResourceState.DRAINING)
    assert moved(view) == []
    assert granted(view) == []


@pytest.mark.parametrize(
    ("failures", "expected_s"), [(1, 2), (2, 4), (3, 8), (7, 128), (8, 256), (9, 300), (1000, 300)]
)
def test_the_back_off_doubles_to_five_minutes(failures: int, expected_s: float) -> None:
    assert backoff_s(LIMITS, failures) == expected_s


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, NOW),
        ({"failures": 3, "last_failure_at": NOW - 3}, NOW + 5),
        ({"last_exit_at": NOW}, NOW + 0.2),
        ({"failures": 1, "last_failure_at": NOW - 60}, NOW - 58),
    ],
)
def test_the_next_start(changes: dict[str, Any], expected: float) -> None:
    assert next_start_at(make_view(**changes)) == expected


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ([], None),
        ([("b", "cpu:0"), ("a", "cpu:0")], ("a", "cpu:0")),
        ([("a", "cpu:0"), ("b", "cpu:0"), ("b", "cpu:1")], ("b", "cpu:0")),
    ],
)
def test_the_emptiest_node_is_chosen(free: list[tuple[str, str]], expected: tuple[str, str] | None) -> None:
    chosen = choose_device([FreeDevice(node, device, "cpu") for node, device in free], "cpu")
    assert (None if chosen is None else (chosen.node_id, chosen.device)) == expected


@pytest.mark.parametrize(
    ("changes", "places", "expected"),
    [
        ({"wanted": "off"}, [], ResourceState.OFF),
        ({"wanted": "off"}, [make_place(0, DRAINING)], ResourceState.DRAINING),
        ({}, [make_place(0)], ResourceState.LIVE),
        ({"failures": 9}, [make_place(0)], ResourceState.LIVE),
        ({}, [make_place(0), make_place(1, LOST)], ResourceState.LIVE),
        ({}, [], ResourceState.STARTING),
        ({}, [make_place(0, LOST)], ResourceState.STARTING),
        ({}, [make_place(0, DRAINING)], ResourceState.STARTING),
        ({"failures": 4}, [make_place(0, STARTING)], ResourceState.STARTING),
        ({"failures": 5}, [make_place(0, STARTING)], ResourceState.FAILED),
        ({"fixed_count": 0}, [], ResourceState.ASLEEP),
        ({"fixed_count": 0}, [make_place(0, DRAINING)], ResourceState.DRAINING),
    ],
)
def test_the_state_follows_from_the_places(
    changes: dict[str, Any], places: list[PlaceView], expected: ResourceState
) -> None:
    assert target_state(make_view(*places, **changes), places) == expected


def test_it_holds_and_says_so_while_the_broker_is_away() -> None:
    places = [
        make_place(0, worker=None, node_heard_at=None, process=None),
        make_place(1),
        make_place(2, DRAINING),
    ]
    view = make_view(*places, observing_since=None)
    assert reconcile(view) == [SetResource(ResourceState.LIVE, HOLDING, None)]
    assert reconcile(msgspec.structs.replace(view, reason=HOLDING)) == []


@pytest.mark.parametrize(
    ("changes", "places", "words"),
    [
        ({"free_devices": []}, [], "no free cpu device on any node"),
        (
            {"failures": 2, "last_failure_at": NOW - 1, "last_failure": "exited with status 3"},
            [],
            "2 failed starts in a row (exited with status 3); next start at 13:46:43 UTC",
        ),
        (
            {},
            [make_place(0, LOST, worker=None, node_heard_at=NOW - 99)],
            "taken until it says that the process is gone",
        ),
        ({}, [make_place(0, STARTING)], "place 0 loading on node-1"),
        ({"wanted": "off"}, [make_place(0, DRAINING)], "waiting for 1 worker to finish"),
    ],
)
def test_the_reason_says_why(changes: dict[str, Any], places: list[PlaceView], words: str) -> None:
    told = said(make_view(*places, **changes))
    assert told is not None and words in told.reason


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, NOW - 5 + 20), ({"usual_start_s": 7.5}, NOW + 2.5), ({"device_kind": "cuda"}, NOW - 5 + 60)],
)
def test_the_expected_time_comes_from_earlier_starts(changes: dict[str, Any], expected: float) -> None:
    told = said(make_view(make_place(0, STARTING), state=ResourceState.STARTING, **changes))
    assert told is not None and told.expected_live_at == expected


def test_a_stored_decision_can_be_replayed_from_its_inputs() -> None:
    view = make_view(
        make_place(0, LOST), make_place(1, STARTING), fixed_count=3, failures=1, last_failure_at=NOW - 9
    )
    stored = msgspec.json.encode(view)
    assert reconcile(msgspec.json.decode(stored, type=ResourceView)) == reconcile(view)
    assert any(not isinstance(action, NotePlace | ProveInterval) for action in reconcile(view))


def test_a_spent_budget_stops_more_gpus_and_keeps_those_that_run() -> None:
    devices = [FreeDevice("node-1", f"cpu:{index}", "cpu") for index in range(4)]
    view = make_view(make_place(0), fixed_count=3, free_devices=devices, is_capped=True)
    actions = reconcile(view)
    assert not any(isinstance(action, GrantPlace | MovePlace) for action in actions)
    (said,) = [action for action in actions if isinstance(action, SetResource)]
    assert said.state == ResourceState.LIVE and "a budget is used up" in said.reason
    again = reconcile(msgspec.structs.replace(view, is_capped=False))
    assert [action.place for action in again if isinstance(action, GrantPlace)] == [1, 2]
