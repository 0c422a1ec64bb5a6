"""What one place needs: a table per rule."""

from __future__ import annotations

from typing import Any

import pytest

from services.scheduler.actions import (
    BeginInterval,
    EndInterval,
    FreePlace,
    GiveUpStart,
    MarkReady,
    MovePlace,
    NotePlace,
    ProveInterval,
    SendStart,
    SendStop,
)
from services.scheduler.place_rules import look_at_place
from services.scheduler.states import PlaceState
from services.scheduler.views import PlaceView, ProcessSeen, WorkerSeen
from tests.unit.scheduler.builders import LIMITS, NOW, make_place, make_view

ABSENT = ProcessSeen(state="absent")
EXITED = ProcessSeen(state="exited", reason="killed by signal 9")
STARTING, READY, DRAINING, LOST = PlaceState.STARTING, PlaceState.READY, PlaceState.DRAINING, PlaceState.LOST


def worker(phase: str, ago_s: float = 0.5) -> WorkerSeen:
    return WorkerSeen(phase=phase, heard_at=NOW - ago_s)


def kinds(place: PlaceView, **view: Any) -> list[str]:
    actions = look_at_place(make_view(place, **view), place).actions
    return [type(action).__name__ for action in actions if not isinstance(action, NotePlace)]


@pytest.mark.parametrize(
    ("place", "failed_start", "unexpected"),
    [
        (make_place(0, STARTING, process=EXITED), "killed by signal 9", False),
        (make_place(0, READY, process=EXITED), None, True),
        (make_place(0, LOST, process=EXITED), None, True),
        (make_place(0, DRAINING, process=EXITED), None, False),
        (make_place(0, DRAINING, process=EXITED, ready_at=None, given_up=True), None, False),
    ],
)
def test_a_place_is_freed_when_its_node_says_that_the_process_has_exited(
    place: PlaceView, failed_start: str | None, unexpected: bool
) -> None:
    looked = look_at_place(make_view(place), place)
    (freed,) = [action for action in looked.actions if isinstance(action, FreePlace)]
    assert looked.after is None
    assert (freed.failed_start, freed.unexpected) == (failed_start, unexpected)


@pytest.mark.parametrize("state", PlaceState)
@pytest.mark.parametrize("process", [None, ABSENT, ProcessSeen(state="running")])
@pytest.mark.parametrize("silence_s", [0.5, 7.0, 60.0, 100_000.0])
def test_nothing_but_the_nodes_word_frees_a_place(
    state: PlaceState, process: ProcessSeen | None, silence_s: float
) -> None:
    place = make_place(
        0, state, process=process, worker=worker("ready", silence_s), node_heard_at=NOW - silence_s
    )
    looked = look_at_place(make_view(place), place)
    assert looked.after is not None
    assert not any(isinstance(action, FreePlace) for action in looked.actions)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        # Rule 2 and 3: what its worker says.
        (make_place(0, STARTING, worker=worker("ready")), ["MarkReady"]),
        (make_place(0, STARTING, worker=worker("loading")), []),
        (make_place(0, STARTING, worker=worker("draining")), ["MovePlace"]),
        # Rule 4: given up at the time-out, unless it says ready just then.
        (make_place(0, STARTING, granted_at=NOW - 179), []),
        (make_place(0, STARTING, granted_at=NOW - 181), ["GiveUpStart"]),
        (make_place(0, STARTING, granted_at=NOW - 181, worker=worker("ready")), ["MarkReady"]),
        (make_place(0, STARTING, granted_at=NOW - 181, worker=None, process=None), ["GiveUpStart"]),
        # Rule 5: sent at once, and again while the node reports without it.
        (make_place(0, STARTING, worker=None, process=None, start_sent_at=None), ["SendStart"]),
        (make_place(0, STARTING, worker=None, process=ABSENT, start_sent_at=None), ["SendStart"]),
        (make_place(0, STARTING, worker=None, process=ABSENT, start_sent_at=NOW - 4), ["SendStart"]),
        (make_place(0, STARTING, worker=None, process=ABSENT, start_sent_at=NOW - 2), []),
        (
            make_place(
                0, STARTING, worker=None, process=ABSENT, start_sent_at=NOW - 4, node_heard_at=NOW - 5
            ),
            [],
        ),
        (make_place(0, STARTING, worker=None, start_sent_at=None), []),
    ],
)
def test_a_starting_place(place: PlaceView, expected: list[str]) -> None:
    assert kinds(place) == expected


def test_live_time_begins_at_the_report_that_said_ready() -> None:
    place = make_place(0, STARTING, worker=worker("ready", 1.5))
    (ready,) = [a for a in look_at_place(make_view(place), place).actions if isinstance(a, MarkReady)]
    assert (ready.at, ready.started) == (NOW - 1.5, True)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (make_place(), []),
        (make_place(proved_until=NOW - 3), ["ProveInterval"]),
        # A silence that is too long to be billed.
        (make_place(proved_until=NOW - 31), ["EndInterval", "BeginInterval"]),
        (make_place(proved_until=None), ["BeginInterval"]),
        (make_place(worker=worker("draining")), ["MovePlace"]),
        (make_place(worker=worker("drained")), ["EndInterval", "MovePlace"]),
        # Rule 7.
        (make_place(worker=worker("ready", 7.9), reported_at=NOW - 7.9), []),
        (make_place(worker=worker("ready", 8.1), reported_at=NOW - 8.1), ["EndInterval", "MovePlace"]),
        (make_place(worker=None, reported_at=NOW - 60, proved_until=NOW - 60), ["EndInterval", "MovePlace"]),
        # Rule 9.
        (make_place(process=ABSENT), ["SendStop"]),
        (make_place(process=ABSENT, stop_sent_at=NOW - 9), []),
        (make_place(process=ABSENT, node_heard_at=NOW - 6), []),
    ],
)
def test_a_ready_place(place: PlaceView, expected: list[str]) -> None:
    assert kinds(place) == expected


def test_a_silent_worker_is_not_lost_while_the_scheduler_itself_could_not_hear() -> None:
    place = make_place(worker=None, reported_at=NOW - 600, proved_until=NOW - 600)
    assert kinds(place, observing_since=NOW - 7.9) == []
    assert kinds(place, observing_since=NOW - 8.1) == ["EndInterval", "MovePlace"]


def test_the_interval_of_a_lost_worker_ends_at_its_last_report() -> None:
    place = make_place(worker=worker("ready", 9), reported_at=NOW - 10, proved_until=NOW - 10)
    actions = look_at_place(make_view(place), place).actions
    assert EndInterval("inc_0", NOW - 9) in actions
    assert [a.to for a in actions if isinstance(a, MovePlace)] == [LOST]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (make_place(0, LOST, worker=worker("ready")), ["MarkReady"]),
        (make_place(0, LOST, worker=worker("draining")), ["MovePlace"]),
        (make_place(0, LOST, worker=worker("ready", 9)), []),
        (make_place(0, LOST, worker=None), []),
        (make_place(0, LOST, worker=None, process=ABSENT), ["SendStop"]),
    ],
)
def test_a_lost_place(place: PlaceView, expected: list[str]) -> None:
    assert kinds(place) == expected


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (make_place(0, DRAINING, worker=worker("draining")), []),
        (
            make_place(0, DRAINING, worker=worker("draining"), proved_until=NOW - 3),
            [ProveInterval("inc_0", NOW - 0.5)],
        ),
        (make_place(0, DRAINING, worker=worker("drained")), [EndInterval("inc_0", NOW - 0.5)]),
        (make_place(0, DRAINING, worker=worker("drained"), proved_until=None), []),
        (
            make_place(0, DRAINING, worker=worker("draining", 9), proved_until=NOW - 9),
            [EndInterval("inc_0", NOW - 9)],
        ),
        (make_place(0, DRAINING, proved_until=NOW - 40), [EndInterval("inc_0", NOW - 40)]),
    ],
)
def test_live_time_of_a_draining_place_is_proved_until_it_is_drained(
    place: PlaceView, expected: list[object]
) -> None:
    actions = look_at_place(make_view(place), place).actions
    assert [action for action in actions if not isinstance(action, NotePlace)] == expected


def test_a_worker_that_was_found_again_begins_a_new_interval_and_is_no_new_start() -> None:
    place = make_place(0, LOST)
    (ready,) = look_at_place(make_view(place), place).actions
    assert isinstance(ready, MarkReady) and not ready.started


def test_a_start_that_is_given_up_drains_its_place() -> None:
    place = make_place(0, STARTING, granted_at=NOW - LIMITS.start_timeout_s - 1)
    looked = look_at_place(make_view(place), place)
    assert looked.after is not None and looked.after.state == DRAINING and looked.after.given_up
    assert [type(a) for a in looked.actions] == [GiveUpStart]


def test_what_the_agent_chose_is_noted() -> None:
    place = make_place(0, STARTING, device="cpu:0", process=ProcessSeen(state="running", device="cpu:1"))
    (note,) = [a for a in look_at_place(make_view(place), place).actions if isinstance(a, NotePlace)]
    assert note.device == "cpu:1"


def test_actions_name_their_own_incarnation_only() -> None:
    for state in PlaceState:
        place = make_place(
            3, state, worker=None, process=ABSENT, proved_until=NOW - 50, granted_at=NOW - 9999
        )
        for action in look_at_place(make_view(place), place).actions:
            assert isinstance(
                action,
                EndInterval | MovePlace | SendStop | GiveUpStart | SendStart | BeginInterval | NotePlace,
            )
            assert action.incarnation == "inc_3"
