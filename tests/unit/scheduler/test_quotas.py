"""Quotas of places: what is left, who is refused, and that a look never grants more than there is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from msgspec.structs import replace

from services.scheduler.actions import GrantPlace, SetResource
from services.scheduler.command_rules import problem_of
from services.scheduler.quotas import QuotaBook, QuotaRoom
from services.scheduler.reconcile import reconcile
from services.scheduler.snapshot import Heard, Memory, Stored, decide_all
from services.scheduler.states import ResourceState
from services.scheduler.views import FreeDevice, Limits
from shared.messages import NodeDevice, NodeReport, SetQuota
from tests.unit.scheduler.builders import NOW, make_view
from tests.unit.scheduler.test_simulation import make_row


@pytest.mark.parametrize(
    ("quotas", "taken", "left", "reason"),
    [
        ({"every_team": 3, "platform": 9}, ["t", "t", "u"], 1, ""),
        ({"every_team": 3, "platform": 9, "t": 2}, ["t", "t"], 0, "the team's quota of 2 places is used up"),
        ({"every_team": 3, "platform": 9, "u": 1}, ["t"], 2, ""),
        ({"every_team": 3, "platform": 2}, ["u", "v"], 0, "the platform has no place left to give"),
        ({"every_team": 1, "platform": 9}, ["t", "t"], 0, "the team's quota of 1 places is used up"),
    ],
)
def test_what_is_left(quotas: dict[str, int], taken: list[str], left: int, reason: str) -> None:
    room = QuotaBook(quotas, taken).room("t")
    assert room is not None and room.left == left
    assert left > 0 or room.reason == reason


def test_without_quotas_there_is_no_bound() -> None:
    assert QuotaBook({}, ["t"]).room("t") is None


def test_a_resource_gets_what_is_left_and_says_why_not_more() -> None:
    room = QuotaRoom(team_places=4, team_left=1, platform_left=10)
    devices = [FreeDevice("n", f"cpu:{index}", "cpu") for index in range(4)]
    view = make_view(fixed_count=3, quota=room, free_devices=devices, state=ResourceState.STARTING)
    actions = reconcile(view)
    assert [action.place for action in actions if isinstance(action, GrantPlace)] == [0]
    (said,) = [action for action in actions if isinstance(action, SetResource)]
    assert "the team's quota of 4 places is used up" in said.reason


@pytest.mark.parametrize(
    ("quotas", "granted"),
    [
        ({"every_team": 3, "platform": 99}, 3),
        ({"every_team": 99, "platform": 2}, 2),
        ({"every_team": 99, "platform": 99}, 4),
        ({}, 4),
    ],
)
def test_one_look_grants_all_resources_of_a_team_together_no_more_than_there_is(
    quotas: dict[str, int], granted: int
) -> None:
    devices = [NodeDevice(device=f"cpu:{index}", kind="cpu") for index in range(8)]
    report = NodeReport(node_id="n1", agent_id="a", sent_unix_ms=0, devices=devices, processes=[])
    stored = Stored(now=NOW, resources=[make_row("r1"), make_row("r2")], places=[], quotas=quotas)
    decided = decide_all(stored, Heard({"n1": (report, NOW)}, {}, NOW - 60), Memory(), Limits())
    assert sum(isinstance(a, GrantPlace) for each in decided for a in each.actions) == granted


@pytest.mark.parametrize(
    ("quotas", "granted"),
    [
        ({"every_team": 99, "platform": 99, "a": 1}, {"a": 1, "b": 3}),
        ({"every_team": 2, "platform": 99, "b": 3}, {"a": 2, "b": 3}),
        ({"every_team": 2, "platform": 3}, {"a": 2, "b": 1}),
        ({"every_team": 99, "platform": 99, "a": 0}, {"b": 3}),
    ],
)
def test_a_team_at_its_quota_holds_up_no_other_and_all_share_what_the_platform_has(
    quotas: dict[str, int], granted: dict[str, int]
) -> None:
    devices = [NodeDevice(device=f"cpu:{index}", kind="cpu") for index in range(8)]
    report = NodeReport(node_id="n1", agent_id="a", sent_unix_ms=0, devices=devices, processes=[])
    rows = [replace(make_row(f"r_{team}"), team_id=team, fixed_count=3) for team in ("a", "b")]
    stored = Stored(now=NOW, resources=rows, places=[], quotas=quotas)
    decided = decide_all(stored, Heard({"n1": (report, NOW)}, {}, NOW - 60), Memory(), Limits())
    teams = [each.resource.team_id for each in decided for a in each.actions if isinstance(a, GrantPlace)]
    assert Counter(teams) == granted


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scope": "every_team", "places": None}, "may be null for one team's own"),
        ({"scope": "platform", "places": None}, "may be null"),
        ({"scope": "team_1", "places": -1}, "between 0 and 100000"),
        ({"scope": "team_1", "places": 100_001}, "between 0 and 100000"),
        ({"scope": "", "places": 1}, "scope must be"),
        ({"scope": "team_1", "places": None}, None),
        ({"scope": "platform", "places": 0}, None),
    ],
)
def test_what_a_quota_may_be(fields: dict[str, Any], words: str | None) -> None:
    problem = problem_of(SetQuota(command_id="c", deadline_unix_ms=1, reply_queue="q", actor="a", **fields))
    assert problem is None if words is None else problem is not None and words in problem
