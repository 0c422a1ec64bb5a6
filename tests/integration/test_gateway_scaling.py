"""`PUT /api/resources/{id}/scaling` through a real gateway, broker and database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Vhost
from tests.gateway_harness import Gateway, running_gateway
from tests.integration.test_gateway_management import make_resource, register


@pytest.fixture
async def gateway(module_database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(module_database, vhost.amqp_url, tmp_path) as running:
        yield running


OFFICE = {"name": "office", "start": "* * * * *", "duration_minutes": 600, "min": 2, "max": 8}


async def test_scaling_settings_are_set_shown_and_bound_to_what_was_read(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key=key)
    await gateway.make_option(model["model_type"])
    resource = await make_resource(gateway, key, model["model_type"])
    assert resource["scaling"] == {
        "autoscaling": False, "min": 1, "max": 1, "idle_timeout_s": 600, "when_asleep": "wake",
        "target_wait_s": 10, "windows": [],
        "in_force": {"min": 1, "max": 1, "window": None, "until": None}, "wanted_gpus": None, "why": "",
    }  # fmt: skip
    path = f"/api/resources/{resource['resource_id']}"

    read = await gateway.call("GET", path, key=key)
    body: dict[str, Any] = {"autoscaling": True, "min": 0, "max": 3, "target_wait_s": 25, "windows": [OFFICE]}
    changed = await gateway.call(
        "PUT", f"{path}/scaling", body, key=key, headers={"If-Match": read.headers["etag"]}
    )
    assert changed.status == 200, changed.body
    scaling = changed.json["scaling"]
    assert (scaling["autoscaling"], scaling["min"], scaling["max"]) == (True, 0, 3)
    assert scaling["target_wait_s"] == 25
    assert scaling["windows"] == [OFFICE | {"time_zone": "UTC"}]
    assert (scaling["in_force"]["min"], scaling["in_force"]["max"], scaling["in_force"]["window"]) == (
        2, 8, "office",
    )  # fmt: skip
    assert changed.headers["etag"] != read.headers["etag"]
    stale = await gateway.call(
        "PUT", f"{path}/scaling", body, key=key, headers={"If-Match": read.headers["etag"]}
    )
    assert (stale.status, stale.code) == (412, "precondition_failed")

    fixed = await gateway.call("PUT", f"{path}/scaling", {"autoscaling": False, "gpus": 2}, key=key)
    assert (fixed.status, fixed.json["gpus"], fixed.json["scaling"]["windows"]) == (200, 2, [])

    before = (await gateway.call("GET", path, key=key)).json
    for wrong, code, param in [
        ({"autoscaling": True, "min": 1}, "missing_parameter", "max"),
        ({"autoscaling": True, "min": 2, "max": 1}, "invalid_value", "min"),
        ({"autoscaling": True, "min": 0, "max": 2, "gpus": 1}, "invalid_value", "gpus"),
        ({"autoscaling": False, "min": 1, "max": 1}, "invalid_value", "min"),
        ({"autoscaling": False}, "missing_parameter", "gpus"),
        ({"autoscaling": True, "min": 0, "max": 65}, "invalid_value", "max"),
        ({"autoscaling": False, "gpus": 1, "when_asleep": "maybe"}, "invalid_value", "when_asleep"),
        ({"autoscaling": True, "min": 0, "max": 1, "target_wait_s": 0}, "invalid_value", "target_wait_s"),
        ({"autoscaling": False, "gpus": 1, "windows": [{**OFFICE, "min": -1}]}, "invalid_value", "windows[0].min"),
        # What only the scheduler can judge
        ({"autoscaling": False, "gpus": 1, "windows": [{**OFFICE, "start": "0 25 * * *"}]}, "invalid_value", None),
        ({"autoscaling": False, "gpus": 1, "windows": [{**OFFICE, "time_zone": "Mars"}]}, "invalid_value", None),
    ]:  # fmt: skip
        reply = await gateway.call("PUT", f"{path}/scaling", wrong, key=key)
        assert (reply.status, reply.code, reply.json.get("param")) == (400, code, param), wrong
    assert (await gateway.call("GET", path, key=key)).json == before

    rival = await gateway.make_team("rival")
    reply = await gateway.call("PUT", f"{path}/scaling", {"autoscaling": False, "gpus": 9}, key=rival)
    assert reply.status == 404


async def test_a_quota_is_shown_to_its_team_and_set_by_the_platform_alone(gateway: Gateway) -> None:
    key = await gateway.make_team("quotas")
    assert (await gateway.call("GET", "/api/quota", key=key)).json == {"places": 64, "taken": 0, "own": False}
    own = {"of": "team", "places": 4}
    refused = await gateway.call("PUT", "/api/quota", own, key=key)
    assert (refused.status, refused.code) == (403, "insufficient_scope")
    changed = await gateway.call("PUT", "/api/quota?team=quotas", own)
    assert (changed.status, changed.json) == (200, {"places": 4, "taken": 0, "own": True})
    assert (await gateway.call("GET", "/api/quota", key=key)).json["places"] == 4
    back = await gateway.call("PUT", "/api/quota?team=quotas", {"of": "team", "places": None})
    assert back.json == {"places": 64, "taken": 0, "own": False}
    for wrong, code in [
        ({"of": "platform", "places": None}, "invalid_value"),
        ({"of": "all", "places": 1}, "invalid_value"),
        ({"of": "team", "places": -1}, "invalid_value"),
        ({"of": "team"}, "missing_parameter"),
    ]:
        reply = await gateway.call("PUT", "/api/quota?team=quotas", wrong)
        assert (reply.status, reply.code) == (400, code), wrong
