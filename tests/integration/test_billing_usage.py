"""What was used and what it cost, from facts and intervals to `/api/billing`: real billing, a real gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.billing.request_cost_round import FIRST_AFTER, RequestCostRound
from services.billing.rounds import MinutesRound
from shared.messages import Timings
from tests.conftest import Vhost
from tests.gateway_harness import ADMIN_KEY, Gateway, running_gateway
from tests.integration.billing_stand import Stand, insert_interval, open_stand
from tests.unit.billing.builders import make_usage, make_void

RATE = 60_000_000_000
MINUTE = 10**9
RESOURCE = "res_" + "a" * 32


@pytest.fixture
async def stand(database: str) -> AsyncIterator[Stand]:
    async with open_stand(database) as opened:
        yield opened


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as running:
        yield running


async def hours_ago(stand: Stand, hours: int) -> datetime:
    hour: datetime = await stand.admin.fetchval("SELECT date_trunc('hour', now(), 'UTC')")
    return hour - timedelta(hours=hours)


def ran(job: str, hour: datetime, at_s: int, gpu_s: int, **fields: Any) -> Any:
    """The fact of a request that had the GPU of the team's resource from `at_s` of the hour on."""
    started = hour + timedelta(seconds=at_s)
    ended_ms = int((started + timedelta(seconds=gpu_s)).timestamp() * 1000)
    return make_usage(
        job_id=job,
        request_id=f"req_{job}",
        billing="resource",
        resource_id=RESOURCE,
        accepted_unix_ms=int(started.timestamp() * 1000) - 500,
        first_token_unix_ms=None,
        finished_unix_ms=ended_ms,
        timings=Timings(queue_ms=500.0, swap_ms=0.0, prefill_ms=gpu_s * 100.0, decode_ms=gpu_s * 900.0),
        **fields,
    )


async def run_rounds(stand: Stand, retention_days: int = 30) -> None:
    await MinutesRound(stand.database, stand.instruments, 48).once()
    await RequestCostRound(stand.database, retention_days).once()


async def shares(stand: Stand) -> dict[str, tuple[int, int]]:
    rows = await stand.admin.fetch(
        "SELECT job_id, sum(cost_nanousd)::bigint AS cost, sum(gpu_us)::bigint AS us"
        " FROM billing_api.request_costs_v1 GROUP BY 1"
    )
    return {row["job_id"]: (row["cost"], row["us"]) for row in rows}


async def idle(stand: Stand) -> list[int]:
    rows = await stand.admin.fetch("SELECT idle_nanousd FROM billing_api.hour_costs_v1 ORDER BY hour")
    return [row["idle_nanousd"] for row in rows]


async def test_an_hour_s_cost_falls_to_what_ran_and_to_idle_time(stand: Stand) -> None:
    # Given two hours of one GPU at a dollar a minute: ten minutes live in each, at the border
    hour = await hours_ago(stand, 4)
    border = hour + timedelta(hours=1)
    await insert_interval(
        stand.admin,
        "inc_1",
        border - timedelta(minutes=10),
        border + timedelta(minutes=10),
        resource_id=RESOURCE,
    )
    # and a request in the first, one that crosses the border, two side by side, and one on the shared GPUs
    await stand.record(
        ran("job_1", hour, 3000, 15),
        ran("job_2", hour, 3570, 60),
        ran("job_3", hour, 3900, 30),
        ran("job_4", hour, 3900, 30),
        make_usage(job_id="job_5"),
    )
    # When billing looks, twice
    await run_rounds(stand)
    await run_rounds(stand)
    # Then a second costs a sixtieth of a dollar, and each hour's parts are what was posted for it
    assert await shares(stand) == {
        "job_1": (250_000_000, 15_000_000),
        "job_2": (MINUTE, 60_000_000),
        "job_3": (250_000_000, 30_000_000),
        "job_4": (250_000_000, 30_000_000),
    }
    assert await idle(stand) == [9_250_000_000, 9_000_000_000]
    # When a late heartbeat adds minutes, the hour is shared out again
    await stand.admin.execute(
        "UPDATE scheduler.state_intervals SET proved_until = proved_until + interval '5 minutes'"
    )
    await run_rounds(stand)
    assert await idle(stand) == [9_250_000_000, 14_000_000_000]
    # When requests are forgotten, so is what they cost; the ledger stays
    await RequestCostRound(stand.database, 0).once()
    assert await shares(stand) == {} and await idle(stand) == []
    assert await stand.admin.fetchval("SELECT sum(posted_nanousd) FROM billing.minute_charges") == 25 * MINUTE


async def test_an_hour_is_shared_out_after_its_end_and_once_more_when_late_facts_came(stand: Stand) -> None:
    hour = await hours_ago(stand, 2)
    now = await stand.admin.fetchval("SELECT now()")
    await insert_interval(stand.admin, "inc_1", hour, hour + timedelta(minutes=1), resource_id=RESOURCE)
    running = await hours_ago(stand, 0)
    await insert_interval(stand.admin, "inc_2", running, now, resource_id=RESOURCE)
    await run_rounds(stand)
    assert await idle(stand) == [MINUTE]  # not the hour that still runs
    assert now - hour > timedelta(hours=1) + FIRST_AFTER
    # Given a fact that comes now, and an hour that was shared out two hours earlier than it was
    await stand.record(ran("job_1", hour, 0, 30))
    await run_rounds(stand)
    assert await idle(stand) == [MINUTE]
    await stand.admin.execute(
        "UPDATE billing.hour_costs SET hour = hour - interval '2 hours', shared_at = shared_at - interval '2 hours'"
    )
    await stand.admin.execute(
        "UPDATE billing.minute_charges SET hour = hour - interval '2 hours' WHERE hour < $1", running
    )
    await RequestCostRound(stand.database, 30).once()
    assert await stand.admin.fetchval("SELECT shared_at >= $1 FROM billing.hour_costs", now)


async def test_a_cancelled_request_bears_what_its_worker_did_for_it(stand: Stand) -> None:
    hour = await hours_ago(stand, 3)
    await insert_interval(stand.admin, "inc_1", hour, hour + timedelta(minutes=1), resource_id=RESOURCE)
    told = ran("job_1", hour, 0, 15, outcome="cancelled")
    gone = make_void(
        job_id="job_1", request_id="req_job_1", billing="resource", resource_id=RESOURCE,
        accepted_unix_ms=told.accepted_unix_ms, voided_unix_ms=told.finished_unix_ms + 5000,
    )  # fmt: skip
    never_ran = make_void(
        job_id="job_2", request_id="req_job_2", billing="resource", resource_id=RESOURCE,
        accepted_unix_ms=told.accepted_unix_ms, voided_unix_ms=told.finished_unix_ms,
    )  # fmt: skip
    await stand.record(told, gone, never_ran)
    await run_rounds(stand)
    assert await shares(stand) == {"job_1": (250_000_000, 15_000_000)}


# ---- the API


async def used(gateway: Gateway, stand: Stand) -> tuple[str, datetime]:
    """A team with a key, whose requests ran on its GPU and on shared ones."""
    key = await gateway.make_team("acme")
    team_id = await gateway.sql.fetchval("SELECT team_id FROM gateway.teams WHERE slug = 'acme'")
    hour = await hours_ago(stand, 5)
    await insert_interval(stand.admin, "inc_1", hour, hour + timedelta(minutes=2), resource_id=RESOURCE)
    await stand.record(
        ran("job_1", hour, 10, 15, key_id="key_a"),
        ran("job_2", hour, 30, 30, key_id="key_b", model_name="acme/other"),
        make_usage(job_id="job_3", key_id="key_b", accepted_unix_ms=int(hour.timestamp() * 1000) + 3_600_000),
    )
    await run_rounds(stand)
    # The stand's team is called team_a everywhere; here it becomes the gateway's own
    for table in ("requests", "minute_charges", "hour_costs", "request_costs"):
        await gateway.sql.execute(
            f"UPDATE billing.{table} SET team_id = $1 WHERE team_id = 'team_a'", team_id
        )
    return key, hour


async def test_usage_by_group_and_bucket_sums_to_what_was_charged(gateway: Gateway, stand: Stand) -> None:
    key, hour = await used(gateway, stand)

    async def rows(query: str, as_key: str = key) -> list[dict[str, Any]]:
        reply = await gateway.call("GET", f"/api/billing/usage?{query}", key=as_key)
        assert reply.status == 200, reply.body
        data: list[dict[str, Any]] = reply.json["data"]
        return data

    by_key = await rows("group_by=key&bucket=hour")
    assert [
        (row["group"], row["requests"], row["gpu_minutes"], row["gpu_ms"], row["cost_nanousd"])
        for row in by_key
    ] == [
        ("key_a", 1, 0, 15_000, 250_000_000),
        ("key_b", 1, 0, 30_000, 500_000_000),
        (None, 0, 2, 0, 1_250_000_000),  # idle
        ("key_b", 1, 0, 0, 10 * 20 + 20 * 60),
    ]
    assert by_key[0]["start"] == f"{hour:%Y-%m-%dT%H}:00:00.000Z"
    by_resource = await rows("group_by=resource&bucket=day")
    assert {row["group"]: (row["cost_nanousd"], row["name"]) for row in by_resource} == {
        RESOURCE: (2 * MINUTE, RESOURCE), "res_pool": (1400, None)
    }  # fmt: skip
    for query in ("group_by=model", "group_by=team&bucket=hour", "group_by=key&bucket=day", ""):
        assert sum(row["cost_nanousd"] for row in await rows(query)) == 2 * MINUTE + 1400, query
    # Each team sees its own; the platform sees all of them, by name
    other = await gateway.make_team("other")
    for query in ("group_by=team", "group_by=key", "group_by=resource", "group_by=model"):
        assert await rows(query, other) == []
    assert [row["name"] for row in await rows("group_by=team", ADMIN_KEY)] == ["acme"]
    assert await rows("group_by=key", ADMIN_KEY) == []
    assert await rows("group_by=team&team=other", ADMIN_KEY) == []
    # A window ends before its end
    ends = f"{hour:%Y-%m-%dT%H}:00:00Z"
    assert await rows(f"group_by=resource&to={ends}") == []


async def test_pages_of_usage_are_the_whole_in_order(gateway: Gateway, stand: Stand) -> None:
    key, _ = await used(gateway, stand)
    for query in ("group_by=key&bucket=hour", "group_by=resource&bucket=day", "group_by=model&bucket=hour"):
        whole = (await gateway.call("GET", f"/api/billing/usage?{query}", key=key)).json["data"]
        paged: list[dict[str, Any]] = []
        cursor: str | None = ""
        while cursor is not None:
            page = (await gateway.call("GET", f"/api/billing/usage?{query}&limit=1{cursor}", key=key)).json
            paged += page["data"]
            cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"
        assert paged == whole and len(whole) > 1


async def test_an_hour_opens_to_its_requests(gateway: Gateway, stand: Stand) -> None:
    key, hour = await used(gateway, stand)
    path = f"/api/billing/resources/{RESOURCE}/hours/{hour:%Y-%m-%dT%H}:00:00Z"
    whole = (await gateway.call("GET", path, key=key)).json
    assert (whole["cost_nanousd"], whole["idle_nanousd"], whole["idle_usd"]) == (
        2 * MINUTE,
        1_250_000_000,
        "1.25",
    )
    assert [(row["job_id"], row["request_id"], row["cost_usd"]) for row in whole["data"]] == [
        ("job_1", "req_job_1", "0.25"), ("job_2", "req_job_2", "0.50")
    ]  # fmt: skip
    first = (await gateway.call("GET", f"{path}?limit=1", key=key)).json
    second = (await gateway.call("GET", f"{path}?limit=1&cursor={first['next_cursor']}", key=key)).json
    assert first["data"] + second["data"] == whole["data"] and second["next_cursor"] is None
    other = await gateway.make_team("other")
    assert (await gateway.call("GET", path, key=other)).status == 404


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("usage?group_by=moon", 400, "invalid_value"),
        ("usage?bucket=minute", 400, "invalid_value"),
        ("usage?from=2020-01-01", 400, "invalid_value"),
        ("usage?from=2026-01-02&to=2026-01-01", 400, "invalid_value"),
        ("usage?to=soon", 400, "invalid_value"),
        ("usage?limit=0", 400, "invalid_value"),
        ("usage?cursor=zz", 400, "invalid_cursor"),
        ("usage?cursor=" + "MTo" * 200, 400, "invalid_cursor"),
        ("usage?x=1", 400, "unknown_parameter"),
        ("resources/nothing/hours/2026-01-01", 404, "not_found"),
        (f"resources/{RESOURCE}/hours/noon", 400, "invalid_value"),
        (f"resources/{RESOURCE}/hours/2026-01-01T00:00:00Z", 404, "not_found"),
    ],
)
async def test_bad_questions_are_refused_by_name(gateway: Gateway, path: str, status: int, code: str) -> None:
    reply = await gateway.call("GET", f"/api/billing/{path}")
    assert (reply.status, reply.code) == (status, code)
