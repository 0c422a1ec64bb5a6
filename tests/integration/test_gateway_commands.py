"""The gateway's management API with the real scheduler and billing behind it: both halves of each command."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Vhost
from tests.gateway_harness import Gateway, running_gateway
from tests.model_folders import make_folder

pytestmark = pytest.mark.timeout(120)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def services(database: str, vhost: Vhost, tmp_path: Path) -> Iterator[None]:
    """Scheduler and billing as processes; no node agent, so that a resource that is on goes on starting."""
    started = []
    for name in ("scheduler", "billing"):
        environment = {"DATABASE_URL": database, "AMQP_URL": vhost.amqp_url, "OPS_PORT": str(free_port())}
        with (tmp_path / f"{name}.log").open("wb") as output:
            command = [sys.executable, "-m", f"services.{name}"]
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
                )
            )
    yield
    for process in started:
        process.terminate()
    for process in started:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
async def gateway(services: None, database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path, stand_ins=()) as running:
        yield running


async def until(gateway: Gateway, path: str, key: str, **wanted: Any) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            found: dict[str, Any] = (await gateway.call("GET", path, key=key)).json
            if all(found[name] == value for name, value in wanted.items()):
                return found
            await asyncio.sleep(0.1)


async def test_options_prices_and_a_resources_life(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    make_folder(gateway.import_dir / "tiny")
    model = {"name": "tiny", "path": "tiny", "model_type": "tiny"}
    assert (await gateway.call("POST", "/api/models?team=acme", model)).status == 201

    option = await gateway.make_option("tiny")
    again = await gateway.call(
        "POST",
        "/api/options",
        {k: v for k, v in option.items() if k not in ("option_id", "hourly_rate_nanousd")},
    )
    assert (again.status, again.code) == (409, "name_taken")

    price = {
        "model_type": "tiny",
        "work_class": "live",
        "prompt_usd_per_million": "0.02",
        "completion_usd_per_million": "0.06",
    }
    first = await gateway.call("PUT", "/api/prices", price)
    assert first.status == 200, first.body
    assert (await gateway.call("PUT", "/api/prices", price)).json["price_id"] == first.json["price_id"]
    dearer = await gateway.call("PUT", "/api/prices", price | {"prompt_usd_per_million": "0.03"})
    assert (dearer.status, dearer.json["prompt_nanousd"]) == (200, 30), dearer.body
    past = await gateway.call("PUT", "/api/prices", price | {"starts_at": "2020-01-01T00:00:00Z"})
    assert (past.status, past.code) == (400, "price_starts_in_past")

    body = {"name": "main", "model_type": "tiny", "option": "bf16"}
    made = await gateway.call("POST", "/api/resources", body, key=key)
    assert (made.status, made.json["state"]) == (201, "off"), made.body
    taken = await gateway.call("POST", "/api/resources", body, key=key)
    assert (taken.status, taken.code) == (409, "name_taken")

    path = f"/api/resources/{made.json['resource_id']}"
    for _ in range(2):
        assert (await gateway.call("POST", f"{path}/on", key=key)).status == 202
    starting = await until(gateway, path, key, wanted="on", state="starting")
    assert starting["indicator"] == "grey"
    refused = await gateway.call("DELETE", path, key=key)
    assert (refused.status, refused.code) == (409, "resource_not_off")
    assert (await gateway.call("PATCH", path, {"gpus": 2}, key=key)).json["gpus"] == 2
    assert (await gateway.call("POST", f"{path}/off", key=key)).status == 202
    await until(gateway, path, key, wanted="off", state="off")
    decisions = (await gateway.call("GET", f"{path}/decisions?limit=100", key=key)).json["data"]
    assert decisions and all(decision["words"] for decision in decisions)
    assert (await gateway.call("DELETE", path, key=key)).status == 204
    assert (await gateway.call("GET", path, key=key)).status == 404


async def test_the_platforms_pool(gateway: Gateway) -> None:
    make_folder(gateway.import_dir / "tiny")
    model = {"name": "tiny", "path": "tiny", "model_type": "tiny"}
    assert (await gateway.call("POST", "/api/models", model)).status == 201
    await gateway.make_option("tiny")
    pool = {"name": "tiny pool", "model_type": "tiny", "option": "bf16", "pool": True}
    made = await gateway.call("POST", "/api/resources", pool)
    assert (made.status, made.json["pool"]) == (201, True), made.body
    second = await gateway.call("POST", "/api/resources", pool | {"name": "another"})
    assert (second.status, second.code) == (409, "pool_exists")
