"""`roundhouse size`, `options` and `bench` as processes of their own, against a real gateway, scheduler and worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from loadtest.stack import Stack, running_stack
from services.cli.client import ApiClient, CliError
from services.cli.resources import set_bounds
from services.cli.settings import Server
from tests.conftest import Servers, Vhost
from tests.gateway_harness import ADMIN_KEY, Gateway, running_gateway
from tests.integration.test_cli import roundhouse
from tests.model_folders import make_folder

PROMPT, COMPLETION = 40, 8


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def stack(servers: Servers) -> Iterator[Stack]:
    with running_stack() as running:
        running.start_worker("worker", step_s=0.005, max_batch=4)
        yield running


async def make_resource(gateway: Gateway, key: str) -> dict[str, Any]:
    make_folder(gateway.import_dir / "tiny")
    model = (await gateway.call("POST", "/api/models", {"name": "tiny", "path": "tiny"}, key=key)).json
    await gateway.make_option(model["model_type"])
    body = {"name": "main", "model_type": model["model_type"], "option": "bf16"}
    made = await gateway.call("POST", "/api/resources", body, key=key)
    assert made.status == 201, made.body
    return dict(made.json)


async def insert_hour(
    gateway: Gateway, resource_id: str, requests: int, busy_ms: int, hours_ago: int = 2
) -> None:
    """Metrics of an hour, as billing keeps them."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=hours_ago)
    await gateway.sql.execute(
        "INSERT INTO billing.hour_counts VALUES ($1, $2, 'model_a', 'live', 'acme/tiny', $3, 0, 0, 1, 1)",
        resource_id,
        hour,
        requests,
    )
    await gateway.sql.execute("INSERT INTO billing.hour_busy VALUES ($1, $2, $3)", resource_id, hour, busy_ms)


async def test_a_size_is_told_and_set(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    volumes = ("--min-rpm", "200", "--peak-rpm", "1500")
    told = (await roundhouse(gateway.base, key, "size", *volumes, "--rpm-per-gpu", "100", "--json")).json
    assert (told["min"], told["max"], told["rpm_at_max"]) == (2, 16, 1600)
    shown = await roundhouse(gateway.base, key, "size", *volumes, "--rpm-per-gpu", "100")
    assert "2 GPUs, 200 requests a minute" in shown.out and "16 GPUs, 1600 requests a minute" in shown.out
    # Given a resource with settings of its own, only its bounds change
    resource = await make_resource(gateway, key)
    path = f"/api/resources/{resource['resource_id']}"
    before = {
        "autoscaling": True,
        "min": 1,
        "max": 1,
        "idle_timeout_s": 77,
        "when_asleep": "refuse",
        "target_wait_s": 30,
    }
    assert (await gateway.call("PUT", f"{path}/scaling", before, key=key)).status == 200
    applied = await roundhouse(
        gateway.base, key, "size", *volumes, "--rpm-per-gpu", "100", "--apply", "main", "--json"
    )
    assert applied.json["applied_to"] == "main"
    scaling = (await gateway.call("GET", path, key=key)).json["scaling"]
    assert {name: scaling[name] for name in before} == before | {"min": 2, "max": 16}


class Overtaken(ApiClient):
    """Somebody else sets the scaling between our reading and our writing it."""

    def get_tagged(self, path: str, **query: str | None) -> tuple[dict[str, Any], str | None]:
        read = super().get_tagged(path, **query)
        super().put(f"{path}/scaling", {"autoscaling": True, "min": 3, "max": 5})
        return read


async def test_a_size_does_not_overwrite_settings_that_were_changed_meanwhile(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    path = f"/api/resources/{(await make_resource(gateway, key))['resource_id']}"
    client = Overtaken(Server(gateway.base, key, None))
    with pytest.raises(CliError, match="precondition_failed"):
        await asyncio.to_thread(set_bounds, client, "main", 2, 16)
    scaling = (await gateway.call("GET", path, key=key)).json["scaling"]
    assert (scaling["min"], scaling["max"]) == (3, 5)


async def test_a_size_by_what_was_measured(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    volumes = ("--min-rpm", "200", "--peak-rpm", "1500")
    resource = await make_resource(gateway, key)
    assert "--rpm-per-gpu" in (await roundhouse(gateway.base, key, "size", *volumes)).refused()
    unused = await roundhouse(gateway.base, key, "size", *volumes, "--resource", "main")
    assert "too little used" in unused.refused()
    await insert_hour(gateway, resource["resource_id"], 2000, 1_200_000)  # a hundred a minute
    await insert_hour(gateway, resource["resource_id"], 500, 1_200_000, hours_ago=3)
    told = (await roundhouse(gateway.base, key, "size", *volumes, "--resource", "main", "--json")).json
    assert (told["min"], told["max"], told["rpm_per_gpu"], told["rpm_per_gpu_measured"]) == (2, 16, 100, True)
    assert (
        "peak"
        in (
            await roundhouse(
                gateway.base, key, "size", "--min-rpm", "9", "--peak-rpm", "8", "--rpm-per-gpu", "1"
            )
        ).refused()
    )


async def test_options_are_listed_with_what_is_known_of_their_gpus(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    resource = await make_resource(gateway, key)
    (row,) = (await roundhouse(gateway.base, key, "options", "--json")).json
    assert (row["hourly_rate_usd"], row["measured_rpm_per_gpu"], row["free_gpus"]) == ("0.60", None, None)
    # When its GPUs were measured, and nodes report, of which one is gone since
    await insert_hour(gateway, resource["resource_id"], 1000, 600_000)
    await insert_hour(
        gateway, resource["resource_id"], 10**6, 599_999, hours_ago=3
    )  # too little to tell from
    devices = '[{"device":"cpu:0","kind":"cpu"},{"device":"cpu:1","kind":"cpu","incarnation":"inc_1"},{"device":"0","kind":"cuda"}]'
    await gateway.sql.execute(
        "INSERT INTO scheduler.nodes VALUES ('node_a', 'agent_a', $1::jsonb, now() + interval '1 minute'),"
        " ('node_b', 'agent_b', $1::jsonb, now() - interval '1 minute')",
        devices,
    )
    (row,) = (await roundhouse(gateway.base, key, "options", "--json")).json
    assert (row["measured_rpm_per_gpu"], row["free_gpus"]) == (100, 1)
    shown = (await roundhouse(gateway.base, key, "options", "--model-type", row["model_type"])).out
    assert "requests/min/GPU" in shown and "100.0" in shown and "0.60" in shown
    # Then another team sees the option and the GPUs, not what they did for the first
    other = await gateway.make_team("other")
    (foreign,) = (await roundhouse(gateway.base, other, "options", "--json")).json
    assert (foreign["measured_rpm_per_gpu"], foreign["free_gpus"]) == (None, 1)
    (for_team,) = (await roundhouse(gateway.base, ADMIN_KEY, "--team", "acme", "options", "--json")).json
    assert for_team == row
    assert (await roundhouse(gateway.base, key, "options", "--model-type", "none", "--json")).json == []


async def set_live(stack: Stack, places: int) -> None:
    """The stack has no scheduler: its resource's places are what is written here."""
    connection = await asyncpg.connect(stack.database_url)
    try:
        await connection.execute("ALTER TABLE scheduler.places DISABLE TRIGGER USER")
        await connection.execute("DELETE FROM scheduler.places")
        for place in range(places):
            await connection.execute(
                "INSERT INTO scheduler.places (resource_id, place, state, incarnation, worker_id, node_id, device, epoch)"
                " VALUES ($1, $2, 'ready', 'inc_' || $2::int, 'wrk_' || $2::int, 'node_a', 'cpu:0', 1)",
                stack.resource_id,
                place,
            )
    finally:
        await connection.close()


@pytest.mark.timeout(180)
async def test_a_benchmark_tells_latency_by_concurrency_and_what_one_gpu_does(stack: Stack) -> None:
    sizes = ("--prompt-tokens", str(PROMPT), "--completion-tokens", str(COMPLETION))
    base, key = stack.base_url, stack.api_key
    await set_live(stack, 0)
    off = await roundhouse(base, key, "bench", "-m", stack.model, *sizes, "--seconds", "1")
    assert "turn it on" in off.refused()
    await set_live(stack, 2)
    told = (
        await roundhouse(
            base, key, "bench", "-m", stack.model, *sizes, "--concurrency", "1,4", "--seconds", "4", "--json"
        )
    ).json
    # a stub worker of four at once, whose steps take five milliseconds: each answer takes eight of them
    one, four = told["levels"]
    assert (one["concurrency"], four["concurrency"]) == (1, 4)
    assert told["resource_id"] == stack.resource_id and told["live_gpus"] == 2 and told["refused"] is None
    for level in (one, four):
        assert COMPLETION * 5 <= level["latency_ms"]["p50"] <= level["latency_ms"]["p95"]
        assert level["requests_per_minute"] <= level["concurrency"] * 60_000 / (COMPLETION * 5)
        assert level["requests_per_minute_per_gpu"] == pytest.approx(
            level["requests_per_minute"] / 2, abs=0.1
        )
    assert four["requests"] > one["requests"] >= 2
    best = max(one["requests_per_minute_per_gpu"], four["requests_per_minute_per_gpu"])
    assert told["requests_per_minute_per_gpu"] == best
    shown = await roundhouse(
        base, key, "bench", "-m", stack.model, *sizes, "--concurrency", "1", "--seconds", "1"
    )
    assert shown.code == 0 and "p95 ms" in shown.out and "requests a minute" in shown.out, shown


@pytest.mark.timeout(120)
async def test_a_benchmark_that_cannot_be_run_says_why(stack: Stack) -> None:
    base, key = stack.base_url, stack.api_key
    await set_live(stack, 1)
    for arguments, words in (
        (("--concurrency", "2,1", "-m", stack.model), "rising"),
        (("-m", stack.model, "--resource", "nothing"), "nothing is called"),
        (("-m", "no/such"), "model_not_found"),
        ((), "--model"),
        (("-m", stack.model, "--prompt-tokens", "100000"), "context"),
        (("-m", "no/such", "--resource", stack.resource_id), "does not run"),
    ):
        assert words in (await roundhouse(base, key, "bench", "--seconds", "1", *arguments)).refused(), (
            arguments
        )


async def test_help_tells_of_the_commands() -> None:
    ran = await asyncio.gather(
        *(roundhouse("http://x", "k", name, "--help") for name in ("size", "options", "bench"))
    )
    assert [each.code for each in ran] == [0, 0, 0]
