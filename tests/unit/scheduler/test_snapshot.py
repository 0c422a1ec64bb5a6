"""Joining rows with reports: free devices, strays, and what a view holds."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from services.scheduler import snapshot
from services.scheduler.actions import Action, GrantPlace
from services.scheduler.reconcile import reconcile
from services.scheduler.snapshot import (
    Heard,
    Memory,
    Stored,
    StoredPlace,
    clean,
    decide_all,
    free_devices,
    stray_stops,
)
from services.scheduler.states import IllegalTransition
from services.scheduler.views import Limits, ResourceView
from shared.messages import NodeDevice, NodeProcess, NodeReport
from tests.unit.scheduler.builders import NOW
from tests.unit.scheduler.test_simulation import make_row

LIMITS = Limits()


def make_stored_place(incarnation: str, **changes: Any) -> StoredPlace:
    fields: dict[str, Any] = {
        "resource_id": "r1",
        "place": 0,
        "state": "starting",
        "incarnation": incarnation,
        "worker_id": "w",
        "node_id": "n1",
        "device": "cpu:0",
        "device_kind": "cpu",
        "phase": "placing",
        "start_attempt": 1,
        "granted_at": NOW - 1,
        "ready_at": None,
        "reported_at": None,
        "drain_sent_at": None,
        "given_up": False,
        "proved_until": None,
    }
    return StoredPlace(**(fields | changes))


def make_report(
    devices: dict[str, str | None], running: tuple[str, ...] = (), node_id: str = "n1"
) -> NodeReport:
    return NodeReport(
        node_id=node_id,
        agent_id="a",
        sent_unix_ms=0,
        devices=[
            NodeDevice(
                device=name, kind="cuda" if name.startswith("cuda") else "cpu", incarnation=incarnation
            )
            for name, incarnation in devices.items()
        ],
        processes=[
            NodeProcess(
                incarnation=incarnation,
                resource_id="r1",
                place=0,
                device="cpu:0",
                pid=1,
                start_ticks=1,
                state="running",
            )
            for incarnation in running
        ],
    )


def heard_of(*reports: NodeReport, ago_s: float = 0.5) -> Heard:
    return Heard({report.node_id: (report, NOW - ago_s) for report in reports}, {}, NOW - 100)


def stored_with(*places: StoredPlace) -> Stored:
    return Stored(now=NOW, resources=[], places=list(places))


@pytest.mark.parametrize(
    ("report", "places", "expected"),
    [
        (make_report({"cpu:0": None, "cpu:1": None}), [], ["cpu:0", "cpu:1"]),
        (make_report({"cpu:0": "inc_9", "cpu:1": None}), [], ["cpu:1"]),
        # Granted, and not shown yet.
        (make_report({"cpu:0": None, "cpu:1": None}), [make_stored_place("inc_1")], ["cpu:1"]),
        # The agent took another device than the grant named: still one less, not two.
        (make_report({"cpu:0": None, "cpu:1": "inc_1"}, ("inc_1",)), [make_stored_place("inc_1")], ["cpu:0"]),
        (make_report({"cpu:0": "inc_9", "cpu:1": None}), [make_stored_place("inc_1")], []),
        (make_report({"cpu:0": None}), [make_stored_place("inc_1", node_id="n2")], ["cpu:0"]),
        (
            make_report({"cpu:0": None, "cuda:0": None}),
            [make_stored_place("inc_1", device_kind="cuda")],
            ["cpu:0"],
        ),
    ],
)
def test_a_device_is_free_when_neither_the_node_nor_a_grant_has_it(
    report: NodeReport, places: list[StoredPlace], expected: list[str]
) -> None:
    assert [d.device for d in free_devices(stored_with(*places), heard_of(report), LIMITS)] == expected


def test_a_silent_node_has_no_free_device() -> None:
    heard = heard_of(make_report({"cpu:0": None}), ago_s=5.1)
    assert free_devices(stored_with(), heard, LIMITS) == []


def test_one_device_is_not_granted_to_two_resources_in_one_look() -> None:
    stored = Stored(now=NOW, resources=[make_row("r2"), make_row("r1")], places=[])
    decided = decide_all(
        stored, heard_of(make_report({"cpu:0": None, "cpu:1": None, "cpu:2": None})), Memory(), LIMITS
    )
    grants = [
        (d.resource.resource_id, a.device) for d in decided for a in d.actions if isinstance(a, GrantPlace)
    ]
    assert grants == [("r1", "cpu:0"), ("r1", "cpu:1"), ("r2", "cpu:2")]


def test_a_running_process_without_a_place_is_stopped_and_not_at_every_look() -> None:
    heard = heard_of(make_report({"cpu:0": "inc_1"}, ("inc_1", "inc_2")))
    stored = stored_with(make_stored_place("inc_1"))
    (stop,) = stray_stops(stored, heard, Memory(), LIMITS)
    assert (stop.node_id, stop.incarnation, stop.drain) == ("n1", "inc_2", False)
    assert stray_stops(stored, heard, Memory(stop_sent_at={"inc_2": NOW - 9}), LIMITS) == []


def test_text_from_other_processes_is_made_storable() -> None:
    assert clean("a\x00b\ud800c\n" + "x" * 300) == "a b c " + "x" * 194


def test_a_bug_about_one_resource_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def reconcile_but_r1(view: ResourceView) -> list[Action]:
        if view.resource_id == "r1":
            raise IllegalTransition("off cannot become live")
        return reconcile(view)

    monkeypatch.setattr(snapshot, "reconcile", reconcile_but_r1)
    rows = [make_row("r1"), make_row("r2")]
    stored = Stored(now=NOW, resources=rows, places=[])
    heard = Heard({"n1": (make_report({"cpu:0": None}), NOW)}, {}, NOW - 60)
    first, second = decide_all(stored, heard, Memory(), LIMITS)
    assert (first.actions, type(first.error)) == ([], IllegalTransition)
    assert second.error is None
    assert any(isinstance(action, GrantPlace) for action in second.actions)


def test_a_view_has_its_resource_s_settings() -> None:
    row = replace(
        make_row("r1"), autoscaling=True, min_count=0, max_count=3, idle_timeout_s=900, target_wait_s=4
    )
    scaling = snapshot._scaling(row, None)
    assert scaling is not None
    assert (scaling.min_count, scaling.max_count) == (0, 3)
    assert (scaling.idle_timeout_s, scaling.target_wait_s) == (900, 4)
