"""Which bounds are in force at a time, what settings are refused, and what the reconciler makes of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from services.scheduler.actions import GrantPlace, MovePlace, SetBounds, SetResource
from services.scheduler.command_rules import problem_of
from services.scheduler.reconcile import reconcile, wanted_count
from services.scheduler.scaling_policy import Load
from services.scheduler.scaling_settings import Bounds, bounds_at
from services.scheduler.states import ResourceState
from services.scheduler.views import FreeDevice, ResourceView, Scaling
from shared.cron import DAY_S
from shared.messages import ScalingWindow, SetScaling
from tests.unit.scheduler.builders import NOW, make_place, make_view

OFFICE = ScalingWindow(
    name="office",
    start="0 8 * * mon-fri",
    duration_minutes=600,
    time_zone="Europe/Berlin",
    min_count=2,
    max_count=8,
)
LAUNCH = ScalingWindow(
    name="launch", start="0 12 25 11 *", duration_minutes=120, time_zone="UTC", min_count=5, max_count=5
)


def unix(text: str) -> float:
    return datetime.fromisoformat(text).astimezone(UTC).timestamp()


@pytest.mark.parametrize(
    ("windows", "now", "expected", "until"),
    [
        ([], "2026-11-25T12:00Z", (0, 3, None), None),
        ([OFFICE], "2026-11-25T06:59Z", (0, 3, None), "2026-11-25T07:00Z"),
        ([OFFICE], "2026-11-25T07:00Z", (2, 8, "office"), "2026-11-25T17:00Z"),
        ([OFFICE], "2026-11-25T16:59Z", (2, 8, "office"), "2026-11-25T17:00Z"),
        ([OFFICE], "2026-11-25T17:00Z", (0, 3, None), "2026-11-26T07:00Z"),
        # Nothing for days: looked at anew after one.
        ([OFFICE], "2026-11-28T00:00Z", (0, 3, None), "2026-11-29T00:00Z"),
        ([LAUNCH, OFFICE], "2026-11-25T12:30Z", (5, 5, "launch"), "2026-11-25T14:00Z"),
        # The first in the list holds; the other's turns are looked at all the same.
        ([OFFICE, LAUNCH], "2026-11-25T12:30Z", (2, 8, "office"), "2026-11-25T14:00Z"),
    ],
)
def test_bounds_in_force(
    windows: list[ScalingWindow], now: str, expected: tuple[int, int, str | None], until: str | None
) -> None:
    bounds = bounds_at(0, 3, windows, unix(now))
    assert (bounds.min_count, bounds.max_count, bounds.window) == expected
    assert bounds.until == (until and unix(until))


def command(**changes: Any) -> SetScaling:
    fields: dict[str, Any] = {
        "command_id": "c",
        "deadline_unix_ms": 1,
        "reply_queue": "q",
        "actor": "a",
        "team_id": "t",
        "resource_id": "r",
        "autoscaling": True,
        "min_count": 0,
        "max_count": 4,
        "idle_timeout_s": 600,
        "when_asleep": "wake",
    }
    return SetScaling(**(fields | changes))


def window(**changes: Any) -> list[ScalingWindow]:
    return [msgspec.structs.replace(OFFICE, **changes)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_count": 5}, "min must be between 0 and max"),
        ({"min_count": -1}, "min must be"),
        ({"max_count": 65}, "max must be between 0 and 64"),
        ({"autoscaling": False}, "one number"),
        ({"idle_timeout_s": 9}, "idle_timeout_s must be between 10 and 604800"),
        ({"idle_timeout_s": 604_801}, "idle_timeout_s"),
        ({"target_wait_s": 0}, "target_wait_s must be between 1 and 3600"),
        ({"target_wait_s": 3601}, "target_wait_s"),
        ({"windows": window(name="")}, "windows[0].name"),
        ({"windows": window(name="a\nb")}, "windows[0].name"),
        ({"windows": window(duration_minutes=0)}, "windows[0].duration_minutes must be between 1 and 10080"),
        ({"windows": window(duration_minutes=10_081)}, "duration_minutes"),
        ({"windows": window(time_zone="Berlin")}, "windows[0].time_zone"),
        ({"windows": window(start="8 o'clock")}, "windows[0].start must have five fields"),
        ({"windows": window(min_count=9)}, "windows[0].min"),
        ({"windows": window(max_count=65)}, "windows[0].max"),
        ({"windows": window() * 2}, "a name of its own"),
        ({"windows": [w for i in range(17) for w in window(name=f"w{i}")]}, "at most 16"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], words: str) -> None:
    problem = problem_of(command(**changes))
    assert problem is not None and words in problem


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"min_count": 64, "max_count": 64},
        {"max_count": 0},
        {"autoscaling": False, "min_count": 3, "max_count": 3},
        {"windows": [OFFICE, LAUNCH]},
        {"windows": [w for i in range(16) for w in window(name=f"w{i}")]},
        {"idle_timeout_s": 10},
        {"idle_timeout_s": 604_800},
    ],
)
def test_right_settings_pass(changes: dict[str, Any]) -> None:
    assert problem_of(command(**changes)) is None


# ---- what the reconciler makes of them


def scaled(*places: Any, least: int, most: int, **changes: Any) -> ResourceView:
    windows = changes.pop("windows", [])
    scaling = Scaling(
        version=3,
        min_count=least,
        max_count=most,
        idle_timeout_s=600,
        windows=windows,
        noted=changes.pop("noted", None),
    )
    devices = [FreeDevice("node-1", f"cpu:{index}", "cpu") for index in range(8)]
    return make_view(*places, scaling=scaling, free_devices=devices, **changes)


def always(least: int, most: int) -> list[ScalingWindow]:
    return window(
        name="always",
        start="* * * * *",
        duration_minutes=9,
        time_zone="UTC",
        min_count=least,
        max_count=most,
    )


def turned(view: ResourceView) -> list[SetBounds]:
    return [action for action in reconcile(view) if isinstance(action, SetBounds)]


@pytest.mark.parametrize(("target_wait_s", "wanted"), [(1.0, 2), (10.0, 1)])
def test_who_may_wait_less_is_given_more_room(target_wait_s: float, wanted: int) -> None:
    """80 tokens/s by workers that do 100: 0.8 of one is over what those have room for whose requests hardly wait."""
    view = scaled(make_place(0), least=0, most=5)
    assert view.scaling is not None
    measured = Load(ready_messages=1, job_tokens=10.0, arriving_tokens_per_s=80.0, worker_tokens_per_s=100.0)
    scaling = replace(view.scaling, target_wait_s=target_wait_s, load=measured)
    assert wanted_count(replace(view, scaling=scaling)) == wanted


def test_at_least_the_minimum_is_granted() -> None:
    actions = reconcile(scaled(make_place(0), least=3, most=5))
    assert [a.place for a in actions if isinstance(a, GrantPlace)] == [1, 2]


def test_a_window_that_opens_is_stored_before_its_places_are_granted() -> None:
    view = scaled(make_place(0), least=1, most=1, windows=always(2, 4))
    first, *rest = reconcile(view)
    assert isinstance(first, SetBounds)
    assert (first.version, first.bounds.min_count, first.bounds.max_count, first.bounds.window) == (
        3, 2, 4, "always",
    )  # fmt: skip
    assert first.words == "window 'always' is open: 2 to 4 places"
    assert [a.place for a in rest if isinstance(a, GrantPlace)] == [1]


def test_what_is_noted_holds_until_its_time_and_no_longer() -> None:
    noted = Bounds(min_count=1, max_count=1, window="before", until=NOW + 1)
    held = scaled(make_place(0), least=1, most=1, windows=always(2, 4), noted=noted)
    assert turned(held) == []
    passed = msgspec.structs.replace(held, now=NOW + 1)
    assert [action.bounds.window for action in turned(passed)] == ["always"]


def test_a_daily_look_that_finds_the_same_window_says_nothing() -> None:
    noted = Bounds(min_count=2, max_count=4, window="always", until=NOW - 1)
    (action,) = turned(scaled(make_place(0), least=1, most=1, windows=always(2, 4), noted=noted))
    assert action.words == "" and action.bounds.until is not None and NOW < action.bounds.until < NOW + DAY_S


def test_a_window_that_lowers_the_maximum_drains_the_surplus_at_once() -> None:
    places = [make_place(index) for index in range(3)]
    view = scaled(*places, least=3, most=3, windows=always(1, 1))
    drained = [a.place for a in reconcile(view) if isinstance(a, MovePlace)]
    assert drained == [2, 1]


def test_windows_turn_also_while_the_broker_is_away_but_nothing_is_granted_or_drained() -> None:
    view = scaled(
        make_place(0),
        make_place(1),
        least=1,
        most=1,
        windows=always(1, 1),
        observing_since=None,
        fixed_count=1,
    )
    kinds = {type(action) for action in reconcile(view)}
    assert kinds == {SetBounds, SetResource}


def test_on_with_a_minimum_of_none_is_asleep() -> None:
    view = scaled(least=0, most=3, state=ResourceState.OFF)
    (action,) = [each for each in reconcile(view) if isinstance(each, SetResource)]
    assert action.state == ResourceState.ASLEEP
