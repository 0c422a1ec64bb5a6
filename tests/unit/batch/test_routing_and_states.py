"""Where lines run and what they wait for; which moves a batch may make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.batch.pages import PAGE_BYTES, cut_page
from services.batch.preparation import job_id_at, line_seed
from services.batch.records import LineRef
from services.batch.routing import OwnGpus, Payer, Purse, Waiting, choose_line_route, choose_paid_route
from services.batch.states import BATCH_TRANSITIONS, OPEN_STATES
from shared.inference.principal import ResourceView, Route

OWN = ResourceView(
    resource_id="res_own", team_id="team_1", model_type="tiny", pool=False, wanted="on", state="live",
    live_count=1, max_context_tokens=100, expected_live_unix_s=None, created_unix_s=5.0,
)  # fmt: skip
POOL = replace(OWN, resource_id="res_pool", team_id="team_platform", pool=True)
OFF: dict[str, Any] = {"wanted": "off", "state": "off", "live_count": 0}
ASLEEP: dict[str, Any] = {"state": "asleep", "live_count": 0}
STARTING: dict[str, Any] = {"state": "starting", "live_count": 0}


@pytest.mark.parametrize(
    ("resources", "fallback", "chosen"),
    [
        ([OWN, POOL], False, ("res_own", "resource")),
        ([OWN, replace(OWN, resource_id="res_old", created_unix_s=1.0)], False, ("res_old", "resource")),
        ([replace(OWN, model_type="other"), POOL], False, ("res_pool", "ppt")),
        ([replace(OWN, team_id="team_2"), POOL], False, ("res_pool", "ppt")),
        ([replace(OWN, **OFF), POOL], True, ("res_pool", "ppt")),
        ([replace(OWN, **OFF), POOL], False, "off"),
        ([replace(OWN, **STARTING), POOL], False, "starting"),
        ([replace(OWN, state="draining", live_count=1)], False, ("res_own", "resource")),
        ([replace(POOL, **STARTING)], False, "pool is starting"),
        ([replace(POOL, **OFF), replace(OWN, **OFF)], True, "resource is off"),
        # asleep: lines wake it, if they may
        ([replace(OWN, **ASLEEP, wakes=True)], False, ("res_own", "resource")),
        ([replace(OWN, **ASLEEP, wakes=True), POOL], True, ("res_pool", "ppt")),
        ([replace(OWN, **ASLEEP, wakes=True), POOL], False, ("res_own", "resource")),
        ([replace(OWN, **ASLEEP)], False, "asleep"),
        ([replace(OWN, **STARTING, wakes=True)], False, "starting"),
        ([replace(OWN, **OFF, wakes=True)], False, "off"),
        ([replace(POOL, **ASLEEP, wakes=True)], False, ("res_pool", "ppt")),
        ([replace(POOL, **ASLEEP)], False, "pool is asleep"),
        # what is there for one batch is nobody else's
        ([replace(OWN, takes_traffic=False)], True, None),
        ([replace(OWN, takes_traffic=False), POOL], False, ("res_pool", "ppt")),
        ([replace(OWN, team_id="team_2")], True, None),
        ([], True, None),
    ],
)
def test_a_line_goes_to_its_resource_or_waits_for_it(
    resources: list[ResourceView], fallback: bool, chosen: tuple[str, str] | str | None
) -> None:
    found = choose_line_route("team_1", fallback, "tiny", resources)
    if isinstance(found, Route):
        assert (found.resource.resource_id, found.billing) == chosen
    else:
        assert isinstance(found, Waiting)
        assert found.missing == (chosen is None)
        assert chosen is None or (isinstance(chosen, str) and chosen in found.reason)


@pytest.mark.parametrize(
    ("resources", "own", "waits_for"),
    [
        ([replace(OWN, takes_traffic=False)], OwnGpus("res_own"), None),
        ([replace(OWN, takes_traffic=False, **STARTING)], OwnGpus("res_own"), "own resource is starting"),
        (
            [replace(OWN, takes_traffic=False, state="failed", live_count=0, reason="no device")],
            OwnGpus("res_own"),
            "no device",
        ),
        ([OWN, POOL], OwnGpus("res_gone"), "not there"),
        ([OWN, POOL], OwnGpus(None), "not there"),
    ],
)
def test_a_batch_with_a_resource_for_itself_runs_there_and_nowhere_else(
    resources: list[ResourceView], own: OwnGpus, waits_for: str | None
) -> None:
    found = choose_paid_route(PAYER, True, "tiny", resources, Purse({"tiny"}), own)
    if isinstance(found, Route):
        assert waits_for is None and (found.resource.resource_id, found.billing) == ("res_own", "resource")
    else:
        assert waits_for is not None and waits_for in found.reason and not found.missing


def test_a_budget_stops_a_batch_on_its_own_resource_too() -> None:
    purse = stopped("team_1", "resource", "res_own")
    found = choose_paid_route(PAYER, True, "tiny", [OWN], purse, OwnGpus("res_own"))
    assert isinstance(found, Waiting) and "budget" in found.reason


PAYER = Payer("team_1", "key_1", "mod_1")


def stopped(*budget: str) -> Purse:
    team_id, scope, scope_id = budget
    return Purse({"tiny"}, stopped={(team_id, scope, scope_id)})


@pytest.mark.parametrize(
    ("resources", "purse", "waits_for"),
    [
        ([OWN], Purse(), None),
        ([OWN], Purse(spent_teams={"team_1"}), None),
        ([POOL], Purse({"tiny"}), None),
        ([POOL], Purse({"tiny"}, {"team_2"}), None),
        ([POOL], Purse({"other"}), "no price"),
        ([POOL], Purse({"tiny"}, {"team_1"}), "no credit"),
        ([replace(POOL, **OFF)], Purse({"tiny"}, {"team_1"}), "pool is off"),
        ([POOL], stopped("team_1", "team", "team_1"), "budget"),
        ([POOL], stopped("team_1", "key", "key_1"), "budget"),
        ([POOL], stopped("team_1", "model", "mod_1"), "budget"),
        ([OWN], stopped("team_1", "resource", OWN.resource_id), "budget"),
        ([POOL], stopped("team_1", "resource", OWN.resource_id), None),
        ([POOL], stopped("team_1", "key", "key_2"), None),
        ([POOL], stopped("team_2", "key", "key_1"), None),
        ([POOL], Purse({"tiny"}, refused={("team_1", "model", "mod_1")}), "budget for shared GPUs"),
        ([OWN], Purse({"tiny"}, refused={("team_1", "model", "mod_1")}), None),
    ],
)
def test_what_nobody_pays_for_waits(
    resources: list[ResourceView], purse: Purse, waits_for: str | None
) -> None:
    found = choose_paid_route(PAYER, False, "tiny", resources, purse)
    assert isinstance(found, Waiting) == (waits_for is not None)
    if isinstance(found, Waiting):
        assert waits_for is not None and waits_for in found.reason


def test_every_state_leads_to_an_end_and_none_leads_out_of_one() -> None:
    ends = {state for state, moves in BATCH_TRANSITIONS.items() if not moves}
    assert ends == {"failed", "completed", "expired", "cancelled"}
    assert set(OPEN_STATES) == BATCH_TRANSITIONS.keys() - ends
    for state in OPEN_STATES:
        reached, todo = set[str](), [state]
        while todo:
            current = todo.pop()
            reached.add(current)
            todo += BATCH_TRANSITIONS[current] - reached
        assert reached & ends


def test_a_page_spans_no_more_of_the_file_than_is_read_at_once() -> None:
    lines = [LineRef(1, 0, 10), LineRef(2, 11, PAGE_BYTES - 11), LineRef(3, PAGE_BYTES + 1, 5)]
    assert [each.line for each in cut_page(lines)] == [1, 2]
    assert [
        each.line for each in cut_page([LineRef(1, 0, PAGE_BYTES + 5), LineRef(2, PAGE_BYTES + 6, 1)])
    ] == [1]
    assert cut_page([]) == []


def test_job_ids_of_a_line_follow_one_another() -> None:
    first = "job_" + "0" * 31 + "f"
    assert job_id_at(first, 0) == first
    assert job_id_at(first, 1) == "job_" + "0" * 30 + "10"


def test_a_line_without_a_seed_has_the_same_one_each_time_and_others_another() -> None:
    seeds = {line_seed(batch, line) for batch in ("batch_1", "batch_2") for line in range(50)}
    assert len(seeds) == 100 and all(0 <= seed < 2**63 for seed in seeds)
    assert line_seed("batch_1", 7) == line_seed("batch_1", 7)
