"""The scheduler's tables on a real database: the fence, the bounds, and the answers to commands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest

from services.scheduler import desired
from services.scheduler.actions import (
    Action,
    EndInterval,
    FreePlace,
    GrantPlace,
    MarkReady,
    MovePlace,
    SetResource,
)
from services.scheduler.desired import Desired
from services.scheduler.preload import models_to_preload
from services.scheduler.snapshot import Decided, Heard, Memory, StoredPlace, decide_all
from services.scheduler.states import PlaceState, ResourceState
from services.scheduler.store import Store
from services.scheduler.views import Limits
from services.scheduler.writes import StaleView
from shared.database import Database
from shared.ids import new_id
from shared.lease import Fenced, Lease
from shared.messages import (
    CommandResult,
    CreateOption,
    CreateResource,
    DeleteResource,
    NodeReport,
    ScaleResource,
    SchedulerCommand,
    TurnOffResource,
    TurnOnResource,
    WeightsRef,
)
from shared.outcomes import Unavailable
from tests.integration.fleet import empty_tables

LEASE_S = 0.3
NODE = NodeReport(node_id="n", agent_id="a", sent_unix_ms=0, devices=[], processes=[])
OPTION: dict[str, Any] = {
    "model_type": "tiny",
    "device_kind": "cpu",
    "precision": "bf16",
    "max_batch": 4,
    "max_context_tokens": 128,
    "kv_tokens": 512,
    "hourly_rate_nanousd": 7,
}


@dataclass
class Tables:
    """One database with a leader's store and the commands' tables."""

    database: Database
    lease: Lease
    store: Store
    desired: Desired
    declared: list[tuple[str, bool]] = field(default_factory=list)

    async def run(self, make: type[SchedulerCommand], command_id: str = "", **fields: Any) -> CommandResult:
        common: dict[str, Any] = {
            "command_id": command_id or new_id("cmd"),
            "deadline_unix_ms": time.time_ns() // 1_000_000 + 10_000,
            "reply_queue": "q",
            "actor": "test",
        }
        return await self.desired.run(make(**common, **fields))

    async def option(self, name: str = "o1", **changes: Any) -> str:
        result = await self.run(CreateOption, name=name, **(OPTION | changes))
        assert result.ok, result
        return str(result.body["option_id"])

    async def resource(self, name: str = "r1", count: int = 1, **changes: Any) -> str:
        fields: dict[str, Any] = {
            "team_id": "t1",
            "name": name,
            "model_type": "tiny",
            "fixed_count": count,
        } | changes
        if "option_id" not in fields:
            fields["option_id"] = await self.option(f"o-{name}")
        result = await self.run(CreateResource, **fields)
        assert result.ok, result
        return str(result.body["resource_id"])

    async def live(self, count: int = 1, **changes: Any) -> str:
        """A resource that is on, with the first place ready."""
        resource_id = await self.resource(count=count, **changes)
        await self.run(TurnOnResource, team_id="t1", resource_id=resource_id)
        await self.apply(
            GrantPlace(0, "n1", "cpu:0", 1, "words"), SetResource(ResourceState.STARTING, "", None)
        )
        (place,) = await self.places()
        await self.apply(
            MarkReady(0, place.incarnation, time.time(), True, "words"),
            SetResource(ResourceState.LIVE, "", None),
        )
        return resource_id

    async def places(self) -> list[StoredPlace]:
        return (await self.store.load()).places

    async def apply(self, *actions: Action, store: Store | None = None) -> None:
        stored = await self.store.load()
        (decided,) = decide_all(stored, Heard({}, {}, None), Memory(), Limits())
        await (store or self.store).apply(Decided(decided.resource, decided.view, list(actions)))


@pytest.fixture
async def tables(module_database: str) -> AsyncIterator[Tables]:
    administrator = await asyncpg.connect(module_database)
    await empty_tables(administrator)
    await administrator.close()
    async with AsyncExitStack() as stack:
        connected = await Database.open(module_database, "roundhouse_scheduler", stack, size=4)
        declared: list[tuple[str, bool]] = []

        async def declare(resource_id: str, pool: bool) -> None:
            declared.append((resource_id, pool))

        lease = Lease(connected, "one", LEASE_S)
        assert await lease.ensure()
        yield Tables(connected, lease, Store(connected, lease), Desired(connected, declare), declared)


async def take_over(tables: Tables) -> Lease:
    await asyncio.sleep(LEASE_S + 0.1)
    other = Lease(tables.database, "two", LEASE_S)
    assert await other.ensure()
    return other


async def test_the_lease_has_one_holder_and_its_epoch_grows_with_each_change(tables: Tables) -> None:
    await tables.lease.release()
    # Long ones: what is asserted here holds however long the test is held up in between.
    first, other = Lease(tables.database, "one", 60), Lease(tables.database, "two", 60)
    assert await first.ensure()
    first_epoch = first.epoch
    assert first_epoch is not None
    assert not await other.ensure()
    await tables.database.fetch(
        "UPDATE scheduler.lease SET expires_at = clock_timestamp() - interval '1 second'"
    )
    assert await other.ensure()
    assert other.epoch == first_epoch + 1
    first._renewed_s -= 60  # it is due to renew
    assert not await first.ensure(), "the old holder renewed a lease that another one has"
    assert first.epoch is None


async def test_a_lease_that_nobody_took_over_is_renewed_though_it_ran_out(tables: Tables) -> None:
    epoch = tables.lease.epoch
    await asyncio.sleep(LEASE_S + 0.1)
    assert await tables.lease.ensure()
    assert tables.lease.epoch == epoch


async def test_a_released_lease_is_free_at_once(tables: Tables) -> None:
    await tables.lease.release()
    assert await Lease(tables.database, "two", LEASE_S).ensure()


@pytest.mark.parametrize("kind", ["grant", "free", "move", "state", "interval", "nodes", "prune"])
async def test_every_write_of_a_replaced_leader_is_refused(tables: Tables, kind: str) -> None:
    await tables.live(count=2)
    (place,) = await tables.places()
    actions: dict[str, Action] = {
        "grant": GrantPlace(1, "n1", "cpu:1", 1, "words"),
        "free": FreePlace(0, place.incarnation, None, False, "words"),
        "move": MovePlace(0, place.incarnation, PlaceState.READY, PlaceState.DRAINING, "drain", "words"),
        "state": SetResource(ResourceState.DRAINING, "", None),
        "interval": EndInterval(place.incarnation, time.time()),
    }
    await take_over(tables)
    before = await tables.store.load()
    with pytest.raises(Fenced):
        match kind:
            case "nodes":
                await tables.store.note_nodes([(NODE, time.time())])
            case "prune":
                await tables.store.prune()
            case _:
                await tables.apply(actions[kind])
    after = await tables.store.load()
    assert (after.places, after.resources) == (before.places, before.resources)


async def test_a_hand_over_waits_for_a_write_that_is_under_way(tables: Tables) -> None:
    await tables.resource()
    async with tables.database.transaction() as connection:
        await tables.lease.fence(connection)
        await asyncio.sleep(LEASE_S + 0.1)
        other = Lease(tables.database, "two", LEASE_S)
        taking = asyncio.create_task(other.ensure())
        await asyncio.sleep(0.3)
        assert not taking.done(), "the lease changed hands under a write of its holder"
    assert await taking


async def test_a_leader_that_freezes_in_the_middle_of_a_write_holds_up_its_successor_for_three_seconds_only(
    tables: Tables,
) -> None:
    await tables.resource()
    began_s = time.monotonic()
    with pytest.raises(Unavailable):
        async with tables.database.transaction() as connection:
            await tables.lease.fence(connection)
            await connection.execute("UPDATE scheduler.resources SET reason = 'by the frozen leader'")
            await asyncio.sleep(LEASE_S + 0.1)
            assert await Lease(tables.database, "two", LEASE_S).ensure()
            assert 2 < time.monotonic() - began_s < 5
            await connection.execute("SELECT 1")
    row = await tables.database.fetchrow("SELECT reason FROM scheduler.resources")
    assert row is not None and row["reason"] == ""


async def test_a_team_has_a_bounded_number_of_resources_and_others_are_not_touched_by_it(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desired, "RESOURCES_PER_TEAM", 2)
    first = await tables.resource("r1")
    option_id = await tables.option("shared")
    fields: dict[str, Any] = {"model_type": "tiny", "fixed_count": 1, "option_id": option_id}
    # Two at once for one place
    results = await asyncio.gather(
        *(tables.run(CreateResource, team_id="t1", name=name, **fields) for name in ("r2", "r3"))
    )
    assert sorted(result.code for result in results) == ["ok", "too_many_resources"]
    assert len(tables.declared) == 2, "a refused resource has queues"
    assert (await tables.run(CreateResource, team_id="t2", name="r1", **fields)).ok
    assert (await tables.run(DeleteResource, team_id="t1", resource_id=first)).ok
    assert (await tables.run(CreateResource, team_id="t1", name="r4", **fields)).ok


async def test_the_database_itself_bounds_the_places(tables: Tables) -> None:
    resource_id = await tables.resource(count=1)
    await tables.run(TurnOnResource, team_id="t1", resource_id=resource_id)
    with pytest.raises(StaleView):
        await tables.apply(GrantPlace(1, "n1", "cpu:0", 1, "words"))
    await tables.apply(GrantPlace(0, "n1", "cpu:0", 1, "words"))
    with pytest.raises(StaleView):
        await tables.apply(GrantPlace(0, "n1", "cpu:1", 1, "words"))
    # Turned off after it was looked at: the start that was decided on is refused.
    await tables.apply(FreePlace(0, (await tables.places())[0].incarnation, None, False, "words"))
    await tables.run(TurnOffResource, team_id="t1", resource_id=resource_id)
    async with tables.database.transaction() as connection:
        await connection.execute("UPDATE scheduler.resources SET state = 'starting'")
    with pytest.raises(StaleView):
        await tables.apply(GrantPlace(0, "n1", "cpu:0", 1, "words"))
    assert await tables.places() == []


async def test_one_refused_action_undoes_all_of_its_look(tables: Tables) -> None:
    await tables.live(count=1)
    (place,) = await tables.places()
    drain = MovePlace(0, place.incarnation, PlaceState.READY, PlaceState.DRAINING, "drain", "words")
    with pytest.raises(StaleView):
        await tables.apply(drain, GrantPlace(7, "n1", "cpu:0", 1, "words"))
    assert [p.state for p in await tables.places()] == ["ready"]


async def test_an_ended_interval_is_never_changed_and_a_new_one_follows(tables: Tables) -> None:
    await tables.live()
    (place,) = await tables.places()
    ended_at = time.time() + 1
    await tables.apply(EndInterval(place.incarnation, ended_at))
    await tables.apply(MovePlace(0, place.incarnation, PlaceState.READY, PlaceState.LOST, "lost", "words"))
    await tables.apply(MarkReady(0, place.incarnation, ended_at + 5, False, "words"))
    rows = await tables.database.fetch("SELECT * FROM scheduler.state_intervals ORDER BY started_at")
    assert [row["ended_at"] is None for row in rows] == [False, True]
    assert await tables.database.fetchrow("SELECT 1 FROM scheduler.starts WHERE succeeded") is not None
    with pytest.raises(asyncpg.RestrictViolationError):
        async with tables.database.transaction() as connection:
            await connection.execute(
                "UPDATE scheduler.state_intervals SET proved_until = now() + interval '1 day'"
            )


async def test_a_shared_pool_costs_its_team_no_minutes(tables: Tables) -> None:
    await tables.live(pool=True)
    row = await tables.database.fetchrow("SELECT * FROM scheduler.state_intervals")
    assert row is not None and (row["pool"], row["hourly_rate_nanousd"]) == (True, 0)


async def test_a_failed_start_counts_until_the_next_success_or_turning_on(tables: Tables) -> None:
    resource_id = await tables.resource()
    await tables.run(TurnOnResource, team_id="t1", resource_id=resource_id)
    for _ in range(2):
        await tables.apply(GrantPlace(0, "n1", "cpu:0", 1, "words"))
        (place,) = await tables.places()
        await tables.apply(FreePlace(0, place.incarnation, "exited with status 3", False, "words"))
    (row,) = (await tables.store.load()).resources
    assert (row.failures, row.last_failure) == (2, "exited with status 3")
    await tables.run(TurnOffResource, team_id="t1", resource_id=resource_id)
    await tables.run(TurnOnResource, team_id="t1", resource_id=resource_id)
    (row,) = (await tables.store.load()).resources
    assert row.failures == 0


# ---- commands


async def test_creating_a_resource_declares_its_queues_and_is_done_once(tables: Tables) -> None:
    option_id = await tables.option()
    fields: dict[str, Any] = {
        "team_id": "t1",
        "name": "r",
        "model_type": "tiny",
        "option_id": option_id,
        "fixed_count": 2,
    }
    first = await tables.run(CreateResource, "cmd_1", **fields)
    again = await tables.run(CreateResource, "cmd_1", **fields)
    assert first.ok and again == first
    assert tables.declared == [(first.body["resource_id"], False)]
    row = await tables.database.fetchrow("SELECT * FROM scheduler.resources")
    assert row is not None and (row["state"], row["wanted"], row["fixed_count"]) == ("off", "off", 2)


async def test_a_command_that_comes_twice_at_once_is_done_once(tables: Tables) -> None:
    option_id = await tables.option()
    fields: dict[str, Any] = {
        "team_id": "t1",
        "name": "r",
        "model_type": "tiny",
        "option_id": option_id,
        "fixed_count": 1,
    }
    results = await asyncio.gather(*(tables.run(CreateResource, "cmd_1", **fields) for _ in range(4)))
    assert len({str(result) for result in results}) == 1 and results[0].ok
    assert len(tables.declared) == 1


async def test_each_refusal_has_its_code_and_changes_nothing(tables: Tables) -> None:
    option_id = await tables.option()
    mine = await tables.resource("mine", option_id=option_id)
    await tables.resource("pool", option_id=option_id, pool=True)
    new = {"team_id": "t1", "name": "new", "model_type": "tiny", "option_id": option_id, "fixed_count": 1}
    refused: list[tuple[str, type[SchedulerCommand], dict[str, Any]]] = [
        ("name_taken", CreateOption, OPTION | {"name": "o1"}),
        ("invalid_value", CreateOption, OPTION | {"name": "O1"}),
        ("option_not_found", CreateResource, new | {"option_id": "opt_none"}),
        ("model_type_mismatch", CreateResource, new | {"model_type": "other"}),
        ("name_taken", CreateResource, new | {"name": "mine"}),
        ("pool_exists", CreateResource, new | {"pool": True}),
        ("invalid_value", CreateResource, new | {"fixed_count": 65}),
        ("invalid_value", ScaleResource, {"team_id": "t1", "resource_id": mine, "fixed_count": -1}),
        ("not_found", ScaleResource, {"team_id": "t2", "resource_id": mine, "fixed_count": 1}),
        ("not_found", TurnOnResource, {"team_id": "t1", "resource_id": "res_none"}),
        ("not_found", TurnOffResource, {"team_id": "t2", "resource_id": mine}),
        ("not_found", DeleteResource, {"team_id": "t2", "resource_id": mine}),
    ]
    before = await tables.database.fetch("SELECT * FROM scheduler.resources ORDER BY resource_id")
    for code, make, fields in refused:
        result = await tables.run(make, **fields)
        assert (result.ok, result.code) == (False, code), (make, result)
        assert result.message
    assert await tables.database.fetch("SELECT * FROM scheduler.resources ORDER BY resource_id") == before


async def test_a_refusal_is_repeated_as_it_was(tables: Tables) -> None:
    first = await tables.run(TurnOnResource, "cmd_1", team_id="t1", resource_id="res_none")
    assert await tables.run(TurnOnResource, "cmd_1", team_id="t1", resource_id="res_none") == first


async def test_a_resource_is_deleted_only_when_it_is_off_and_its_name_is_free_again(tables: Tables) -> None:
    resource_id = await tables.live()
    for _ in range(2):
        result = await tables.run(DeleteResource, team_id="t1", resource_id=resource_id)
        assert (result.ok, result.code) == (False, "resource_not_off")
        await tables.run(TurnOffResource, team_id="t1", resource_id=resource_id)
    (place,) = await tables.places()
    await tables.apply(
        FreePlace(0, place.incarnation, None, False, "words"), SetResource(ResourceState.DRAINING, "", None)
    )
    await tables.apply(SetResource(ResourceState.OFF, "", None))
    assert (await tables.run(DeleteResource, team_id="t1", resource_id=resource_id)).ok
    gone = await tables.run(TurnOnResource, team_id="t1", resource_id=resource_id)
    assert gone.code == "not_found"
    option_id = await tables.option("again")
    await tables.resource("r1", option_id=option_id)
    owners = await tables.store.job_queue_owners()
    assert sorted(deleted for _, deleted in owners.values()) == [False, True]


async def test_hosts_and_dead_jobs_are_forgotten_in_the_end_and_dead_facts_about_money_never(
    tables: Tables,
) -> None:
    await tables.live()
    async with tables.database.transaction() as connection:
        await connection.execute(
            """INSERT INTO scheduler.nodes (node_id, agent_id, devices, reported_at)
               VALUES ('gone', 'a', '[]', now() - interval '8 days'), ('here', 'b', '[]', now())"""
        )
        await connection.execute(
            """INSERT INTO scheduler.dead_letters (queue, reason, message_type, body, received_at)
               VALUES ('q', 'old job', 't', NULL, now() - interval '31 days'),
                      ('q', 'new job', 't', NULL, now() - interval '29 days'),
                      ('q', 'old fact', 't', 'x', now() - interval '300 days')"""
        )
    await tables.store.prune()
    nodes = await tables.database.fetch("SELECT node_id FROM scheduler.nodes")
    letters = await tables.database.fetch("SELECT reason FROM scheduler.dead_letters ORDER BY reason")
    assert "gone" not in [row["node_id"] for row in nodes] and "here" in [row["node_id"] for row in nodes]
    assert [row["reason"] for row in letters] == ["new job", "old fact"]


async def test_old_rows_are_pruned_in_batches_and_new_ones_stay(tables: Tables) -> None:
    await tables.live()
    async with tables.database.transaction() as connection:
        await connection.execute(
            """INSERT INTO scheduler.decisions (resource_id, decided_at, action, words, inputs)
               SELECT 'old', now() - interval '8 days', 'x', 'x', '{}' FROM generate_series(1, 600)"""
        )
        await connection.execute(
            """INSERT INTO scheduler.command_results (command_id, result, created_at)
               VALUES ('old', '{}', now() - interval '8 days')"""
        )
    left = (
        "SELECT count(*) FILTER (WHERE resource_id = 'old') AS old, count(*) AS all FROM scheduler.decisions"
    )
    await tables.store.prune()
    row = await tables.database.fetchrow(left)
    assert row is not None and row["old"] == 100
    await tables.store.prune()
    row = await tables.database.fetchrow(left)
    assert row is not None and row["old"] == 0 and row["all"] > 0
    results = await tables.database.fetch("SELECT command_id FROM scheduler.command_results")
    assert results and all(result["command_id"] != "old" for result in results)


async def test_a_worker_preloads_what_its_resource_was_asked_for_last(
    tables: Tables, module_database: str
) -> None:
    administrator = await asyncpg.connect(module_database)
    try:
        await administrator.execute("""
            INSERT INTO gateway.teams (team_id, slug, name) VALUES ('team_p', 'p', 'P'), ('team_q', 'q', 'Q');
            INSERT INTO gateway.model_types (signature, name, architecture, parameter_count)
                VALUES ('0123456789abcdef', 'tiny', 'L', 1);
            INSERT INTO gateway.models (model_id, team_id, name, signature, created_at)
                SELECT 'mod_' || n, 'team_' || left(n, 1), n, '0123456789abcdef', now() + k * interval '1 s'
                FROM unnest(ARRAY['p1', 'p2', 'p3', 'q1']) WITH ORDINALITY AS names (n, k);
            INSERT INTO gateway.model_revisions (model_id, revision, folder, manifest, context_tokens)
                SELECT model_id, 1, model_id || '/1', '{}', 8 FROM gateway.models;
            UPDATE gateway.model_revisions SET base_model_id = 'mod_q1', base_revision = 1 WHERE model_id = 'mod_p3';
            INSERT INTO billing.requests (job_id, request_id, team_id, key_id, resource_id, billing_mode, work_class,
                operation, model_type, model_id, model_name, revision, outcome, attempt, prompt_tokens,
                completion_tokens, charged_nanousd, accepted_at, finished_at)
                VALUES ('j', 'r', 'team_p', 'k', 'res_p', 'resource', 'live', 'chat', 'tiny', 'mod_p2', 'p/p2', 1,
                        'succeeded', 1, 1, 1, 0, now(), now());
        """)
        refs = await models_to_preload(tables.database, "tiny", "res_p", "team_p")
        assert [(ref.model_id, ref.folder, ref.name) for ref in refs] == [
            ("mod_p2", "mod_p2/1", "p/p2"),
            ("mod_p1", "mod_p1/1", "p/p1"),
            ("mod_p3", "mod_p3/1", "p/p3"),
        ]
        base = WeightsRef(
            model_id="mod_q1", revision=1, name="q/q1", folder="mod_q1/1", signature="0123456789abcdef"
        )
        assert [ref.base for ref in refs] == [None, None, base]
        assert await models_to_preload(tables.database, "other", "res_p", "team_p") == []
    finally:
        await administrator.execute(
            "DELETE FROM billing.requests; DELETE FROM gateway.model_revisions; DELETE FROM gateway.models;"
            "DELETE FROM gateway.model_types; DELETE FROM gateway.teams"
        )
        await administrator.close()
