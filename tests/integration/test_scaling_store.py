"""Scaling settings on a real database: done once, for the version they were made for, and bounds that nobody passes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from services.scheduler.actions import FreePlace, GrantPlace, NoteScaling, SetBounds
from services.scheduler.crowds import SeenCrowds
from services.scheduler.load_meter import LoadMeter, Measured
from services.scheduler.scaling_policy import ScalingMemory
from services.scheduler.scaling_settings import Bounds
from services.scheduler.snapshot import Decided, Heard, Memory, StoredResource, decide_all
from services.scheduler.views import Limits
from services.scheduler.writes import StaleView
from shared.messages import ScaleResource, ScalingWindow, SetQuota, SetScaling, TurnOnResource
from tests.integration import test_scheduler_store
from tests.integration.test_scheduler_store import Tables

tables = test_scheduler_store.tables  # a fixture

ALWAYS = ScalingWindow(
    name="always", start="* * * * *", duration_minutes=5, time_zone="UTC", min_count=1, max_count=3
)


async def set_scaling(tables: Tables, resource: str, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "team_id": "t1",
        "resource_id": resource,
        "autoscaling": True,
        "min_count": 0,
        "max_count": 2,
        "idle_timeout_s": 900,
        "when_asleep": "refuse",
        "target_wait_s": 4,
    }
    return await tables.run(SetScaling, **(fields | changes))


async def row(tables: Tables) -> dict[str, Any]:
    found = await tables.database.fetchrow("SELECT * FROM scheduler.resources")
    assert found is not None
    return dict(found)


async def shown(tables: Tables) -> dict[str, Any]:
    found = await tables.database.fetchrow("SELECT * FROM scheduler_api.scaling_v1")
    assert found is not None
    return dict(found)


async def grant(tables: Tables, place: int) -> None:
    await tables.apply(GrantPlace(place, "n1", f"cpu:{place}", 1, "words"))


async def test_settings_are_stored_shown_and_done_once(tables: Tables) -> None:
    resource_id = await tables.resource(count=1)
    first = await set_scaling(tables, resource_id, command_id="cmd_1")
    again = await set_scaling(tables, resource_id, command_id="cmd_1")
    assert first.ok and again == first
    now = await shown(tables)
    assert (now["autoscaling"], now["min_count"], now["max_count"], now["idle_timeout_s"]) == (
        True,
        0,
        2,
        900,
    )
    assert (now["when_asleep"], now["target_wait_s"], now["scaling_version"]) == ("refuse", 4, 2)
    assert [each.target_wait_s for each in (await tables.store.load()).resources] == []
    await tables.run(TurnOnResource, team_id="t1", resource_id=resource_id)
    assert [each.target_wait_s for each in (await tables.store.load()).resources] == [4]
    assert (now["min_now"], now["max_now"], now["window_now"], now["bounds_until"]) == (0, 2, None, None)
    words = await tables.database.fetchrow("SELECT words FROM scheduler.decisions WHERE action = 'scaled'")
    assert words is not None and words["words"] == "between 0 and 2 by test"


async def test_a_fixed_number_and_the_older_command_for_it(tables: Tables) -> None:
    resource_id = await tables.resource(count=1)
    await set_scaling(tables, resource_id, windows=[ALWAYS])
    assert (await set_scaling(tables, resource_id, autoscaling=False, min_count=4, max_count=4)).ok
    now = await shown(tables)
    assert (now["autoscaling"], now["min_count"], now["max_count"], now["windows"]) == (False, 4, 4, "[]")
    await set_scaling(tables, resource_id, windows=[ALWAYS])
    assert (await tables.run(ScaleResource, team_id="t1", resource_id=resource_id, fixed_count=2)).ok
    now = await shown(tables)
    assert (now["autoscaling"], now["min_count"], now["max_count"]) == (False, 2, 2)
    assert (now["min_now"], now["max_now"], now["window_now"]) == (1, 3, "always"), "the window went with it"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"team_id": "t2"}, "not_found"),
        ({"resource_id": "res_none"}, "not_found"),
        ({"min_count": 3}, "invalid_value"),
        ({"if_version": 7}, "precondition_failed"),
    ],
)
async def test_a_refusal_changes_nothing(tables: Tables, changes: dict[str, Any], code: str) -> None:
    resource_id = await tables.resource(count=1)
    before = await row(tables)
    result = await set_scaling(tables, resource_id, **changes)
    assert (result.ok, result.code) == (False, code)
    assert await row(tables) == before


async def test_of_two_changes_for_one_version_one_is_done(tables: Tables) -> None:
    resource_id = await tables.resource(count=1)
    results = await asyncio.gather(
        *(set_scaling(tables, resource_id, max_count=most, if_version=1) for most in (3, 4))
    )
    assert sorted(result.code for result in results) == ["ok", "precondition_failed"]
    assert (await row(tables))["scaling_version"] == 2


async def test_the_database_bounds_the_places_by_what_is_in_force(tables: Tables) -> None:
    resource_id = await tables.resource(count=5)
    await tables.run(TurnOnResource, team_id="t1", resource_id=resource_id)
    await set_scaling(tables, resource_id)
    await grant(tables, 1)
    with pytest.raises(StaleView):
        await grant(tables, 2)
    await grant(tables, 0)
    # A lowered maximum counts what is there, whatever its number: place 0 would be below it.
    (zero,) = [place for place in await tables.places() if place.place == 0]
    await tables.apply(FreePlace(0, zero.incarnation, None, False, "words"))
    await set_scaling(tables, resource_id, max_count=1)
    with pytest.raises(StaleView):
        await grant(tables, 0)


async def test_an_open_window_bounds_the_places_until_its_end(tables: Tables) -> None:
    resource_id = await tables.resource(count=1)
    await tables.run(TurnOnResource, team_id="t1", resource_id=resource_id)
    await set_scaling(tables, resource_id, windows=[ALWAYS])
    await grant(tables, 2)
    async with tables.database.transaction() as connection:
        await connection.execute("UPDATE scheduler.resources SET bounds_until = now() - interval '1 second'")
    with pytest.raises(StaleView):
        await grant(tables, 0)
    # The leader finds the turn, stores it, and what it grants in the same look counts by it.
    stored = await tables.store.load()
    (decided,) = decide_all(stored, Heard({}, {}, stored.now), Memory(), Limits())
    (turn,) = [action for action in decided.actions if isinstance(action, SetBounds)]
    assert turn.words == ""
    await tables.apply(turn, GrantPlace(0, "n1", "cpu:0", 1, "words"))
    assert sorted(place.place for place in await tables.places()) == [0, 2]


async def test_a_turn_that_was_found_before_the_settings_changed_is_not_stored(tables: Tables) -> None:
    resource_id = await tables.resource(count=1)
    await tables.run(TurnOnResource, team_id="t1", resource_id=resource_id)
    await set_scaling(tables, resource_id, windows=[ALWAYS])
    wide = Bounds(min_count=0, max_count=64, until=time.time() + 60)
    with pytest.raises(StaleView):
        await tables.apply(SetBounds(1, wide, "words"))
    assert (await shown(tables))["max_now"] == 3


async def test_quotas_bound_a_team_and_all_teams_in_the_database_itself(tables: Tables) -> None:
    async def quota(scope: str, places: int | None) -> None:
        assert (await tables.run(SetQuota, scope=scope, places=places)).ok

    await quota("every_team", 2)
    await quota("platform", 3)
    mine = await tables.resource(count=2)
    refused = await set_scaling(tables, mine, max_count=3)
    assert (refused.ok, refused.code) == (False, "over_quota")
    assert "may have 2 GPUs at once, and 3 were asked for" in refused.message
    await quota("t1", 4)
    assert (await set_scaling(tables, mine, max_count=4)).ok
    await tables.run(TurnOnResource, team_id="t1", resource_id=mine)
    for place in (0, 1, 2):
        await grant(tables, place)
    with pytest.raises(StaleView):
        await grant(tables, 3)  # the platform's
    await quota("platform", 9)
    await quota("t1", None)
    with pytest.raises(StaleView):
        await grant(tables, 3)  # every team's
    await quota("every_team", 4)
    await grant(tables, 3)
    stored = await tables.store.load()
    assert stored.quotas == {"every_team": 4, "platform": 9}


async def test_two_teams_have_quotas_of_their_own_and_share_the_platforms(tables: Tables) -> None:
    async def grant_to(resource_id: str, place: int) -> None:
        decided = decide_all(await tables.store.load(), Heard({}, {}, None), Memory(), Limits())
        (one,) = [each for each in decided if each.resource.resource_id == resource_id]
        action = GrantPlace(place, "n1", f"cpu:{place}", 1, "words")
        await tables.store.apply(Decided(one.resource, one.view, [action]))

    for scope, places in (("every_team", 9), ("platform", 4), ("t1", 2)):
        assert (await tables.run(SetQuota, scope=scope, places=places)).ok
    mine = await tables.resource("mine", count=2)
    also_mine = await tables.resource("also-mine", count=2)
    theirs = await tables.resource("theirs", count=6, team_id="t2")
    for team_id, resource_id in (("t1", mine), ("t1", also_mine), ("t2", theirs)):
        assert (await tables.run(TurnOnResource, team_id=team_id, resource_id=resource_id)).ok
    await grant_to(mine, 0)
    await grant_to(also_mine, 0)
    with pytest.raises(StaleView):
        await grant_to(also_mine, 1)  # the team's, over all that it has
    await grant_to(theirs, 0)
    await grant_to(theirs, 1)
    with pytest.raises(StaleView):
        await grant_to(theirs, 2)  # the platform's: two of four are the other team's
    taken = await tables.database.fetch(
        "SELECT team_id, count(*) AS places FROM scheduler.places JOIN scheduler.resources USING (resource_id)"
        " GROUP BY team_id ORDER BY team_id"
    )
    assert [tuple(each) for each in taken] == [("t1", 2), ("t2", 2)]


async def test_what_autoscaling_has_learned_is_there_for_the_next_leader(tables: Tables) -> None:
    resource_id = await tables.resource(count=1)
    await set_scaling(tables, resource_id)
    await tables.run(TurnOnResource, team_id="t1", resource_id=resource_id)
    memory = ScalingMemory(wanted=2, busy_at=1.0)
    crowds = SeenCrowds(at=1_700_000_000.125, requests=120.5, usual_per_s=0.25, late=[30.25, 4.0])
    measured = Measured(job_tokens=50.0, worker_tokens_per_s=400.0)

    async def note(measured: Measured | None, crowds: SeenCrowds | None) -> StoredResource:
        await tables.apply(NoteScaling(memory, measured, crowds, "2 wanted", note=True, record=False))
        (stored,) = (await tables.store.load()).resources
        return stored

    stored = await note(measured, crowds)
    assert (stored.wanted_count, stored.job_tokens, stored.worker_tokens_per_s) == (2, 50.0, 400.0)
    assert stored.crowds == crowds
    # Of one that is new and has seen nothing yet, nothing is lost.
    assert (await note(None, None)).crowds == crowds
    assert LoadMeter(8, measured, stored.crowds).load().crowds == crowds
