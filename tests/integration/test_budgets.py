"""Budgets over the API with billing's real half: made, changed, refused; alerts and what a spent one turns off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from services.billing.budget_round import BudgetRound
from services.billing.budget_spend import SpendKey
from services.billing.budget_store import add_spend
from services.billing.rounds import MinutesRound
from services.billing.settings import BillingSettings
from shared import topology
from shared.broker import Broker, Delivery
from shared.ids import new_id
from shared.messages import BudgetAlerted, SchedulerCommand, TurnOffResource, TurnOnResource
from tests.conftest import Vhost
from tests.gateway_harness import Gateway, running_gateway
from tests.integration.billing_stand import Stand, insert_interval, open_stand, running_commands, until
from tests.integration.test_scheduler_store import Tables, tables

__all__ = ["tables"]  # the fixture

USD = 1_000_000_000


@asynccontextmanager
async def running(vhost: Vhost, database: str, folder: Path) -> AsyncIterator[tuple[Gateway, Stand]]:
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(open_stand(database, priced=False))
        await stack.enter_async_context(running_commands(vhost, stand))
        gateway = await stack.enter_async_context(
            running_gateway(database, vhost.amqp_url, folder, stand_ins=())
        )
        yield gateway, stand


async def spend(stand: Stand, team_id: str, scope: str, scope_id: str, amount: int) -> None:
    key = SpendKey(team_id, scope, scope_id, datetime.now(UTC).date())
    async with stand.database.transaction() as connection:
        await add_spend(connection, {key: amount})


async def team_id_of(gateway: Gateway, slug: str) -> str:
    return str(await gateway.sql.fetchval("SELECT team_id FROM gateway.teams WHERE slug = $1", slug))


async def test_a_budget_is_made_read_changed_and_removed(vhost: Vhost, database: str, tmp_path: Path) -> None:
    async with running(vhost, database, tmp_path) as (gateway, stand):
        key = await gateway.make_team("acme")
        foreign = await gateway.make_team("rival")
        team_id = await team_id_of(gateway, "acme")
        body: dict[str, Any] = {
            "scope": "team", "period": "month", "limit_usd": "10.00", "alert_percents": [80, 50],
            "actions": ["refuse_ppt"],
        }  # fmt: skip
        made = await gateway.call("POST", "/api/budgets", body, key=key)
        assert made.status == 201, made.body
        budget = made.json
        now = datetime.now(UTC)
        assert budget["period_start"] == f"{now:%Y-%m}-01"
        assert (budget["scope_id"], budget["alert_percents"]) == (team_id, [50, 80])
        assert (budget["spent_usd"], budget["reserved_usd"], budget["is_spent"]) == ("0.00", "0.00", False)
        again = await gateway.call("POST", "/api/budgets", body, key=key)
        assert (again.status, again.code) == (409, "budget_exists")

        path = f"/api/budgets/{budget['budget_id']}"
        for method, sent in (("GET", None), ("PATCH", {"limit_usd": "1"}), ("DELETE", None)):
            reply = await gateway.call(method, path, sent, key=foreign)
            assert (reply.status, reply.code) == (404, "not_found")
        assert (await gateway.call("GET", "/api/budgets", key=foreign)).json["data"] == []

        await spend(stand, team_id, "team", team_id, 4 * USD)
        assert (await gateway.call("GET", path, key=key)).json["spent_usd"] == "4.00"
        low = await gateway.call("PATCH", path, {"limit_usd": "3.999999999"}, key=key)
        assert (low.status, low.code) == (409, "cap_below_spent")
        unchanged = (await gateway.call("GET", path, key=key)).json
        assert unchanged["limit_usd"] == "10.00" and unchanged["changed_at"] == budget["changed_at"]
        changed = await gateway.call("PATCH", path, {"limit_usd": "4", "actions": ["turn_off"]}, key=key)
        assert (changed.status, changed.json["is_spent"], changed.json["actions"]) == (
            200,
            True,
            ["turn_off"],
        )

        assert (await gateway.call("DELETE", path, key=key)).status == 204
        assert (await gateway.call("GET", path, key=key)).status == 404
        below = await gateway.call("POST", "/api/budgets", body | {"limit_usd": "3"}, key=key)
        assert (below.status, below.code) == (409, "cap_below_spent")
        told = await gateway.call("POST", "/api/budgets", body | {"limit_usd": "3", "actions": []}, key=key)
        assert told.status == 201, "without an action it is no cap"


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"limit_usd": "-1"}, 400, "invalid_money"),
        ({"limit_usd": "0.0000000001"}, 400, "invalid_money"),
        ({"limit_usd": 5}, 400, "invalid_type"),
        ({"period": "year"}, 400, "invalid_value"),
        ({"scope": "planet"}, 400, "invalid_value"),
        ({"actions": ["explode"]}, 400, "invalid_value"),
        ({"actions": ["refuse_ppt", "refuse_ppt"]}, 400, "invalid_value"),
        ({"alert_percents": [0]}, 400, "invalid_value"),
        ({"alert_percents": [50, 50]}, 400, "invalid_value"),
        ({"alert_percents": [], "actions": []}, 400, "invalid_value"),
        ({"scope": "key"}, 400, "missing_parameter"),
        ({"scope": "key", "scope_id": "key_x"}, 400, "unknown_key"),
        ({"scope": "model", "scope_id": "mod_x"}, 400, "unknown_model"),
        ({"scope": "resource", "scope_id": "res_x"}, 400, "unknown_resource"),
        ({"scope_id": "team_x"}, 400, "invalid_value"),
        ({"extra": 1}, 400, "unknown_parameter"),
    ],
)
async def test_bad_budgets_are_refused_and_nothing_is_kept(
    module_vhost: Vhost,
    module_database: str,
    tmp_path: Path,
    change: dict[str, Any],
    status: int,
    code: str,
) -> None:
    body = {"scope": "team", "period": "day", "limit_usd": "10.00", "alert_percents": [50], **change}
    async with running(module_vhost, module_database, tmp_path) as (gateway, stand):
        reply = await gateway.call("POST", "/api/budgets", body)
        assert (reply.status, reply.code) == (status, code), reply.body
        assert await stand.admin.fetchval("SELECT count(*) FROM billing.budgets") == 0


async def test_a_foreign_key_and_resource_are_unknown_and_own_ones_are_not(
    vhost: Vhost, database: str, tmp_path: Path
) -> None:
    async with running(vhost, database, tmp_path) as (gateway, stand):
        key = await gateway.make_team("acme")
        other = await gateway.make_team("rival")
        own_key = (await gateway.call("GET", "/api/keys", key=key)).json["data"][0]["key_id"]
        now = datetime.now(UTC)
        await insert_interval(stand.admin, "inc_1", now, now)  # a resource of another team
        await insert_interval(stand.admin, "inc_2", now, now, resource_id="res_pool", pool=True)
        body = {"period": "day", "limit_usd": "1", "actions": ["refuse_ppt"]}
        for sender, scope, scope_id, status in (
            (key, "key", own_key, 201),
            (other, "key", own_key, 400),
            (key, "resource", "res_a", 400),
            (key, "resource", "res_pool", 201),
            (other, "resource", "res_pool", 201),
        ):
            reply = await gateway.call(
                "POST", "/api/budgets", body | {"scope": scope, "scope_id": scope_id}, key=sender
            )
            assert reply.status == status, (scope, scope_id, reply.body)
        first = await gateway.call("GET", "/api/budgets?limit=1", key=key)
        second = await gateway.call(
            "GET", f"/api/budgets?limit=1&cursor={first.json['next_cursor']}", key=key
        )
        assert [b["scope"] for b in first.json["data"] + second.json["data"]] == ["key", "resource"]
        assert second.json["next_cursor"] is None


async def test_alerts_are_kept_once_told_once_and_listed_newest_first(
    vhost: Vhost, database: str, tmp_path: Path
) -> None:
    async with running(vhost, database, tmp_path) as (gateway, stand), AsyncExitStack() as stack:
        key = await gateway.make_team("acme")
        foreign = await gateway.make_team("rival")
        team_id = await team_id_of(gateway, "acme")
        broker = await Broker.open(vhost.amqp_url, "test", stack)
        told: asyncio.Queue[Delivery] = asyncio.Queue()
        listening = topology.Queue("events.v1.test", {"x-expires": 20_000}, ("budget.alerted.v1",))
        await broker.subscribe(listening, BudgetAlerted, told.put_nowait, prefetch=10, no_ack=True)
        budgets = BudgetRound(broker, stand.database)
        body = {
            "scope": "team",
            "period": "day",
            "limit_usd": "10",
            "alert_percents": [50, 90],
            "actions": ["stop_batches"],
        }
        budget_id = (await gateway.call("POST", "/api/budgets", body, key=key)).json["budget_id"]
        await budgets.once()
        assert (await gateway.call("GET", "/api/alerts", key=key)).json["data"] == []
        await spend(stand, team_id, "team", team_id, 5 * USD)
        await asyncio.gather(budgets.once(), BudgetRound(broker, stand.database).once())
        await budgets.once()
        await spend(stand, team_id, "team", team_id, 5 * USD)
        await budgets.once()
        listed = (await gateway.call("GET", "/api/alerts", key=key)).json["data"]
        assert [(a["percent"], a["spent_usd"]) for a in listed][2] == (50, "5.00")
        assert sorted((a["percent"], a["spent_usd"]) for a in listed[:2]) == [(90, "10.00"), (100, "10.00")]
        page = await gateway.call("GET", f"/api/alerts?limit=2&budget_id={budget_id}", key=key)
        rest = await gateway.call("GET", f"/api/alerts?limit=2&cursor={page.json['next_cursor']}", key=key)
        assert page.json["data"] + rest.json["data"] == listed
        assert (await gateway.call("GET", "/api/alerts", key=foreign)).json["data"] == []
        events = [(await told.get()).message for _ in range(3)]
        assert {(e.alert_id, e.percent, e.team_id, e.budget_id) for e in events} == {
            (a["alert_id"], a["percent"], team_id, budget_id) for a in listed
        }
        await asyncio.sleep(0.2)
        assert told.empty()
        # Who raises the limit is told again
        await gateway.call("PATCH", f"/api/budgets/{budget_id}", {"limit_usd": "20"}, key=key)
        await budgets.once()
        newest = (await gateway.call("GET", "/api/alerts?limit=1", key=key)).json["data"][0]
        assert (newest["percent"], newest["limit_usd"]) == (50, "20.00")


async def test_a_spent_budget_turns_resources_off_and_says_what_it_stops(vhost: Vhost, database: str) -> None:
    async with open_stand(database, priced=False) as stand, AsyncExitStack() as stack:
        broker = await Broker.open(vhost.amqp_url, "test", stack)
        asked: asyncio.Queue[Delivery] = asyncio.Queue()
        await broker.subscribe(
            topology.SCHEDULER_COMMANDS, SchedulerCommand, asked.put_nowait, prefetch=10, no_ack=True
        )
        now = datetime.now(UTC)
        for resource_id in ("res_a", "res_b"):
            await insert_interval(stand.admin, f"inc_{resource_id}", now, now, resource_id=resource_id)
        await stand.admin.execute("UPDATE scheduler.resources SET wanted = 'on' WHERE resource_id = 'res_a'")
        for scope, scope_id, actions in (
            ("resource", "res_a", ["turn_off"]),
            ("resource", "res_b", ["stop_scale_up", "turn_off"]),
            ("team", "team_a", ["stop_scale_up", "stop_batches"]),
        ):
            await stand.admin.execute(
                "INSERT INTO billing.budgets (budget_id, team_id, scope, scope_id, period, limit_nanousd,"
                " alert_percents, actions) VALUES ($1, 'team_a', $2, $3, 'day', 1000, '{}', $4)",
                new_id("bud"),
                scope,
                scope_id,
                actions,
            )
        budgets = BudgetRound(broker, stand.database)
        await spend(stand, "team_a", "resource", "res_a", 999)
        await budgets.once()
        assert asked.empty() and await capped(stand) == []
        for resource_id in ("res_a", "res_b"):
            await spend(stand, "team_a", "resource", resource_id, 1_000)
        await budgets.once()
        await until(lambda: has_some(asked))
        command = asked.get_nowait().message
        assert isinstance(command, TurnOffResource)
        assert (command.team_id, command.resource_id) == ("team_a", "res_a")
        assert asked.empty(), "res_b is off already"
        assert await capped(stand) == [("res_a", ["turn_off"]), ("res_b", ["stop_scale_up", "turn_off"])]
        await spend(stand, "team_a", "team", "team_a", 1_000)
        assert (None, ["stop_scale_up", "stop_batches"]) in await capped(stand)
        batches = await stand.admin.fetch(
            "SELECT team_id, scope, scope_id FROM billing_api.capped_batches_v1"
        )
        assert [tuple(row) for row in batches] == [("team_a", "team", "team_a")]


async def test_minutes_pass_a_cap_by_no_more_than_was_begun_between_two_rounds(
    vhost: Vhost, database: str
) -> None:
    async with open_stand(database, priced=False) as stand, AsyncExitStack() as stack:
        broker = await Broker.open(vhost.amqp_url, "test", stack)
        asked: asyncio.Queue[Delivery] = asyncio.Queue()
        await broker.subscribe(
            topology.SCHEDULER_COMMANDS, SchedulerCommand, asked.put_nowait, prefetch=10, no_ack=True
        )
        # Given two GPUs at 60 USD an hour, and 7 USD for both
        minute_nanousd, limit_nanousd, places = USD, 7 * USD, 2
        # All of it in one hour, whatever the time: minutes are begun anew in each
        started = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        for place in range(places):
            await insert_interval(stand.admin, f"inc_{place}", started, started, place=place)
        await stand.admin.execute("UPDATE scheduler.resources SET wanted = 'on'")
        await stand.admin.execute(
            "INSERT INTO billing.budgets (budget_id, team_id, scope, scope_id, period, limit_nanousd, alert_percents,"
            " actions) VALUES ($1, 'team_a', 'resource', 'res_a', 'month', $2, '{}', '{turn_off}')",
            new_id("bud"),
            limit_nanousd,
        )
        minutes, budgets = (
            MinutesRound(stand.database, stand.instruments, 48),
            BudgetRound(broker, stand.database),
        )

        async def spent() -> int:
            return int(await stand.admin.fetchval("SELECT posted_nanousd FROM billing_api.budgets_v1"))

        # When they are live, and minutes are posted as often as is the rule
        interval_s: float = BillingSettings.__dataclass_fields__["minutes_interval_s"].default  # type: ignore[assignment]
        live_s, before = 0.0, 0
        while asked.empty():
            before = await spent()
            assert before < limit_nanousd, "the round that saw it spent turned nothing off"
            live_s += interval_s
            await stand.admin.execute(
                "UPDATE scheduler.state_intervals SET proved_until = $1", started + timedelta(seconds=live_s)
            )
            await minutes.once()
            await budgets.once()
            if await spent() >= limit_nanousd:
                await until(lambda: has_some(asked))

        # Then it is turned off by the first round that sees it spent: each GPU has begun one minute since, at most
        command = asked.get_nowait().message
        assert isinstance(command, TurnOffResource) and command.resource_id == "res_a"
        assert limit_nanousd <= await spent() <= before + places * minute_nanousd
        # And what it takes to finish what runs is paid, as any minute is
        await stand.admin.execute(
            "UPDATE scheduler.state_intervals SET proved_until = $1, ended_at = $1",
            started + timedelta(seconds=live_s + 90),
        )
        await minutes.once()
        assert await spent() == places * -(-int(live_s + 90) // 60) * minute_nanousd


async def test_a_spent_budget_is_seen_by_the_scheduler_for_whom_it_is(
    tables: Tables, module_database: str
) -> None:
    own, other = await tables.live(), await tables.resource("r2")
    await tables.run(TurnOnResource, team_id="t1", resource_id=other)
    administrator = await asyncpg.connect(module_database)
    try:

        async def capped_ids() -> set[str]:
            stored = await tables.store.load()
            return {resource.resource_id for resource in stored.resources if resource.is_capped}

        async def budget(scope: str, scope_id: str, action: str, spent_nanousd: int) -> None:
            await administrator.execute("DELETE FROM billing.budgets")
            await administrator.execute("DELETE FROM billing.spend_days")
            await administrator.execute(
                "INSERT INTO billing.budgets (budget_id, team_id, scope, scope_id, period, limit_nanousd,"
                " alert_percents, actions) VALUES ('bud_1', 't1', $1, $2, 'day', 1000, '{}', $3)",
                scope,
                scope_id,
                [action],
            )
            await administrator.execute(
                "INSERT INTO billing.spend_days (team_id, scope, scope_id, day, posted_nanousd)"
                " VALUES ('t1', $1, $2, (now() AT TIME ZONE 'UTC')::date, $3)",
                scope,
                scope_id,
                spent_nanousd,
            )

        await budget("resource", own, "stop_scale_up", 999)
        assert await capped_ids() == set()
        await budget("resource", own, "stop_scale_up", 1_000)
        assert await capped_ids() == {own}
        await budget("team", "t1", "stop_scale_up", 1_000)
        assert await capped_ids() == {own, other}
        await budget("team", "t1", "refuse_ppt", 1_000)
        assert await capped_ids() == set(), "it stops something else"
    finally:
        await administrator.execute("DELETE FROM billing.budgets")
        await administrator.execute("DELETE FROM billing.spend_days")
        await administrator.close()


async def has_some(queue: asyncio.Queue[Delivery]) -> bool:
    return not queue.empty()


async def capped(stand: Stand) -> list[tuple[str | None, list[str]]]:
    rows = await stand.admin.fetch(
        "SELECT resource_id, actions FROM billing_api.capped_resources_v1 ORDER BY resource_id"
    )
    return [(row["resource_id"], row["actions"]) for row in rows]
