from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate

from services.gateway.management import acting
from services.gateway.model_import import ModelImporter
from services.gateway.routes import PUBLIC
from tests.conftest import Vhost
from tests.gateway_harness import ADMIN_KEY, Gateway, running_gateway
from tests.model_folders import make_folder


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as running:
        yield running


async def register(
    gateway: Gateway, name: str, *, key: str, folder: str = "tiny", **more: Any
) -> dict[str, Any]:
    make_folder(gateway.import_dir / folder)
    reply = await gateway.call("POST", "/api/models", {"name": name, "path": folder, **more}, key=key)
    assert reply.status == 201, reply.body
    model: dict[str, Any] = reply.json
    return model


async def make_resource(gateway: Gateway, key: str, model_type: str, name: str = "main") -> dict[str, Any]:
    body = {"name": name, "model_type": model_type, "option": "bf16"}
    reply = await gateway.call("POST", "/api/resources", body, key=key)
    assert reply.status == 201, reply.body
    resource: dict[str, Any] = reply.json
    return resource


async def test_set_up_of_a_team_from_nothing_to_a_resource(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key=key)
    assert model["name"] == "acme/tiny"
    assert model["model_type"].startswith("llama-")
    assert model["url"] == f"{gateway.base}/models/acme/tiny/completions"
    assert "sk-" not in model["snippet"] and model["url"] in model["snippet"]
    stored = gateway.model_store / model["model_id"] / "1"
    manifest = json.loads((stored / "manifest.json").read_text())
    assert sorted(f["name"] for f in manifest["files"]) == sorted(
        p.name for p in stored.iterdir() if p.name != "manifest.json"
    )

    option = await gateway.make_option(model["model_type"])
    assert (option["hourly_rate_usd"], option["hourly_rate_nanousd"]) == ("0.60", 600_000_000)
    resource = await make_resource(gateway, key, model["model_type"])
    assert (resource["state"], resource["indicator"], resource["wanted"]) == ("off", "grey", "off")
    assert resource["option"] == option
    assert [m["url"] for m in resource["models"]] == [model["url"]]

    path = f"/api/resources/{resource['resource_id']}"
    reply = await gateway.call("POST", f"{path}/on", key=key)
    assert (reply.status, reply.json["wanted"], reply.json["state"]) == (202, "on", "starting")
    await gateway.sql.execute("UPDATE scheduler.resources SET state = 'live'")
    reply = await gateway.call("GET", path, key=key)
    assert (reply.json["state"], reply.json["indicator"]) == ("live", "green")
    reply = await gateway.call("DELETE", path, key=key)
    assert (reply.status, reply.code) == (409, "resource_not_off")
    assert (await gateway.call("POST", f"{path}/off", key=key)).status == 202
    assert (await gateway.call("DELETE", path, key=key)).status == 204
    assert (await gateway.call("GET", path, key=key)).status == 404


async def test_a_team_has_a_bounded_number_of_keys_and_models(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await gateway.make_team("many")
    body = {"name": "one more", "scopes": ["inference"]}
    monkeypatch.setattr("services.gateway.store.KEYS_PER_TEAM", 2)
    made = await gateway.call("POST", "/api/keys", body, key=key)
    refused = await gateway.call("POST", "/api/keys", body, key=key)
    assert (made.status, refused.status, refused.code) == (201, 409, "too_many_keys")
    assert (await gateway.call("DELETE", f"/api/keys/{made.json['key_id']}", key=key)).status == 204
    assert (await gateway.call("POST", "/api/keys", body, key=key)).status == 201

    monkeypatch.setattr("services.gateway.model_registry.MODELS_PER_TEAM", 1)
    model = await register(gateway, "tiny", key=key)
    stored = sorted(path.name for path in gateway.model_store.iterdir())
    refused = await gateway.call("POST", "/api/models", {"name": "tiny-2", "path": "tiny"}, key=key)
    assert (refused.status, refused.code) == (409, "too_many_models")
    assert sorted(path.name for path in gateway.model_store.iterdir()) == stored, "a refused model left files"
    assert (await gateway.call("DELETE", f"/api/models/{model['model_id']}", key=key)).status == 204
    assert (
        await gateway.call("POST", "/api/models", {"name": "tiny-2", "path": "tiny"}, key=key)
    ).status == 201


async def test_every_route_refuses_a_request_without_a_key(gateway: Gateway) -> None:
    checked = 0
    for spec in gateway.specs:
        if spec.scope == PUBLIC:
            continue
        path = spec.template.replace("{", "x").replace("}", "x")
        for key in (None, "sk-rh-" + "z" * 43):
            reply = await gateway.call(spec.method, path, key=key)
            assert reply.status == 401, spec.path
            checked += 1
    assert checked > 40


async def test_public_routes_are_exactly_these(gateway: Gateway) -> None:
    public = {spec.path for spec in gateway.specs if spec.scope == PUBLIC}
    assert public == {
        "/", "/livez", "/readyz", "/openapi.json", "/console", "/console/console.css", "/console/console.js",
        "/console/api.js", "/console/icon.svg",
    }  # fmt: skip


async def test_a_key_without_a_scope_is_refused_on_every_route(gateway: Gateway) -> None:
    await gateway.make_team("acme")
    made = await gateway.call("POST", "/api/keys?team=acme", {"name": "weak", "scopes": ["inference"]})
    for spec in gateway.specs:
        if spec.scope in ("manage", "platform"):
            path = spec.template.replace("{", "x").replace("}", "x")
            reply = await gateway.call(spec.method, path, key=made.json["secret"])
            assert (reply.status, reply.code) == (403, "insufficient_scope"), spec.path


OF_NO_TEAM = ("{version_id}", "{month}")
"""The platform's prices and rates; a month of one's own."""


async def test_another_teams_things_are_as_unknown_ones(gateway: Gateway) -> None:
    mine, theirs = await gateway.make_team("acme"), await gateway.make_team("rival")
    model = await register(gateway, "tiny", key=mine)
    await gateway.make_option(model["model_type"])
    resource = await make_resource(gateway, mine, model["model_type"])
    keys = (await gateway.call("GET", "/api/keys", key=mine)).json["data"]
    ids = {
        "model_id": model["model_id"],
        "resource_id": resource["resource_id"],
        "key_id": keys[0]["key_id"],
        "upload_id": (await gateway.call("POST", "/api/models/uploads", key=mine)).json["upload_id"],
        "request_id": "req_" + "0" * 32,
        "budget_id": "bud_" + "0" * 32,
        "credential_id": "qcr_" + "0" * 32,
    }
    await gateway.sql.execute(
        "INSERT INTO batch.queue_teams (team_id, tag) SELECT team_id, $1 FROM gateway.teams WHERE slug = 'acme'",
        "0" * 24,
    )
    await gateway.sql.execute(
        "INSERT INTO batch.queue_credentials (credential_id, team_id, key_id, name, password_hash)"
        " SELECT $1, team_id, 'key_1', 'one', $2 FROM batch.queue_teams",
        ids["credential_id"],
        "A" * 48,
    )
    await gateway.sql.execute(
        "INSERT INTO billing.budgets (budget_id, team_id, scope, scope_id, period, limit_nanousd, alert_percents, actions)"
        " SELECT $1, team_id, 'team', team_id, 'day', 1, '{}', '{refuse_ppt}' FROM gateway.teams WHERE slug = 'acme'",
        ids["budget_id"],
    )
    body = {"gpus": 2}
    checked = 0
    for spec in gateway.specs:
        if "{" not in spec.template:
            continue
        if any(word in spec.template for word in OF_NO_TEAM):
            continue
        name = next(name for name in ids if "{" + name + "}" in spec.template)
        sent = body if spec.request_schema else None
        if spec.template.endswith("/scaling"):
            sent = {"autoscaling": False, "gpus": 2}
        unknown = ids[name][:-32] + "f" * 32
        bodies = set()
        for value in (ids[name], unknown, "garbage", "a%00b", ids[name].upper(), "%F0%9F%98%80"):
            reply = await gateway.call(
                spec.method, spec.template.replace("{" + name + "}", value), sent, key=theirs
            )
            assert reply.status == 404, (spec.path, value, reply.body)
            document = reply.json
            document.pop("request_id")
            bodies.add(json.dumps(document))
        assert len(bodies) == 1, spec.path
        checked += 1
    assert checked >= 8
    assert (await gateway.call("GET", f"/api/models/{model['model_id']}", key=mine)).status == 200
    for path in ("models", "resources", "requests"):
        assert (await gateway.call("GET", f"/api/{path}", key=theirs)).json["data"] == []
    for path in ("/api/team?team=acme", "/api/team?team=nobody"):
        reply = await gateway.call("GET", path, key=theirs)
        assert (reply.status, reply.code) == (403, "insufficient_scope")
    assert [c for c in gateway.commands if getattr(c, "resource_id", None)] == []


BAD_BODIES: list[tuple[str, str, Any, int, str, str | None]] = [
    ("POST", "/api/teams", {"slug": "Bad Slug", "name": "x"}, 400, "invalid_value", "slug"),
    ("POST", "/api/teams", {"slug": "ok"}, 400, "missing_parameter", "name"),
    ("POST", "/api/teams", {"slug": "ok", "name": "x" * 101}, 400, "invalid_value", "name"),
    ("POST", "/api/teams", {"slug": "ok", "name": "a\nb"}, 400, "invalid_value", "name"),
    ("POST", "/api/teams", {"slug": "ok\n", "name": "a"}, 400, "invalid_value", "slug"),
    ("POST", "/api/teams", {"slug": "ok", "name": "a", "is_platform": True}, 400, "unknown_parameter", "is_platform"),
    ("POST", "/api/teams", {"slug": "ok", "name": "a", "__class__": 1}, 400, "unknown_parameter", "__class__"),
    ("POST", "/api/teams", {"slug": 5, "name": "a"}, 400, "invalid_type", "slug"),
    ("POST", "/api/teams", {"slug": None, "name": "a"}, 400, "invalid_type", "slug"),
    ("POST", "/api/teams", {"slug": "platform", "name": "a"}, 409, "name_taken", "slug"),
    ("POST", "/api/teams?x=1", {"slug": "ok", "name": "a"}, 400, "unknown_parameter", None),
    ("PATCH", "/api/team", {"ppt_fallback": 1}, 400, "invalid_type", "ppt_fallback"),
    ("POST", "/api/keys", {"name": "k", "scopes": []}, 400, "invalid_value", "scopes"),
    ("POST", "/api/keys", {"name": "k", "scopes": ["root"]}, 400, "invalid_value", "scopes[0]"),
    ("POST", "/api/keys", {"name": "k", "scopes": ["manage", "manage"]}, 400, "invalid_value", "scopes"),
    ("POST", "/api/keys", {"name": "k", "scopes": [5]}, 400, "invalid_type", "scopes[0]"),
    ("POST", "/api/keys?team=nobody", {"name": "k", "scopes": ["manage"]}, 404, "team_not_found", "team"),
    ("POST", "/api/keys?team=%00", {"name": "k", "scopes": ["manage"]}, 400, "invalid_unicode", "team"),
    ("POST", "/api/models", {"name": "m", "path": "../../etc"}, 400, "invalid_path", "path"),
    ("POST", "/api/models", {"name": "m", "path": "/etc"}, 400, "invalid_path", "path"),
    ("POST", "/api/models", {"name": "m", "path": "."}, 400, "invalid_path", "path"),
    ("POST", "/api/models", {"name": "m", "path": "nothing"}, 400, "invalid_path", "path"),
    ("POST", "/api/models", {"name": "m"}, 400, "missing_parameter", "path"),
    ("POST", "/api/models", {"name": "m", "path": None}, 400, "invalid_type", "path"),
    ("POST", "/api/models", {"name": "m", "path": "a", "upload_id": "upl_" + "0" * 32}, 400, "invalid_value", "upload_id"),
    ("POST", "/api/models", {"name": "m", "upload_id": "upl_" + "0" * 32}, 400, "unknown_upload", "upload_id"),
    ("POST", "/api/models", {"name": "m", "hub": "org/name"}, 400, "hub_disabled", "hub"),
    ("POST", "/api/models", {"name": "m", "hub": "org/../name"}, 400, "invalid_value", "hub"),
    ("POST", "/api/models", {"name": "m", "hub": "org"}, 400, "invalid_value", "hub"),
    ("POST", "/api/models", {"name": "m", "hub": "org/name", "path": "x"}, 400, "invalid_value", "hub"),
    ("POST", "/api/models", {"name": "m", "path": "x", "hub_revision": "main"}, 400, "invalid_value", "hub_revision"),
    ("POST", "/api/models", {"name": "m", "upload_id": "../x"}, 400, "invalid_value", "upload_id"),
    ("POST", "/api/models", {"name": "M/../x", "path": "a"}, 400, "invalid_value", "name"),
    ("POST", "/api/options", {"model_type": "t"}, 400, "missing_parameter", "name"),
    ("POST", "/api/resources", {"name": "r", "model_type": "t", "option": "o"}, 400, "unknown_option", "option"),
    ("POST", "/api/resources", {"name": "r", "model_type": "t", "option": "o", "gpus": 65}, 400, "invalid_value", "gpus"),
    ("POST", "/api/resources", {"name": "r", "model_type": "t", "option": "o", "gpus": 1.0}, 400, "invalid_type", "gpus"),
    ("POST", "/api/resources", {"name": "r", "model_type": "t", "option": "o", "state": "live"}, 400, "unknown_parameter", "state"),
    ("GET", "/api/models?limit=0", None, 400, "invalid_value", "limit"),
    ("GET", "/api/models?limit=101", None, 400, "invalid_value", "limit"),
    ("GET", "/api/models?limit=x", None, 400, "invalid_value", "limit"),
    ("GET", "/api/models?limit=1&limit=2", None, 400, "invalid_value", "limit"),
    ("GET", "/api/models?cursor=!!", None, 400, "invalid_cursor", "cursor"),
    ("GET", "/api/models?cursor=%F0%9F%98%80", None, 400, "invalid_cursor", "cursor"),
    ("GET", "/api/models?sort=amount;drop", None, 400, "unknown_parameter", None),
    ("GET", "/api/requests?cursor=YWJj", None, 400, "invalid_cursor", "cursor"),
    ("GET", "/api/usage?group_by=amount;drop", None, 400, "invalid_value", "group_by"),
    ("GET", "/api/usage?from=yesterday", None, 400, "invalid_value", "from"),
    ("GET", "/api/usage?from=2026-01-02&to=2026-01-01", None, 400, "invalid_value", "from"),
    ("GET", "/api/usage?from=2020-01-02&to=2026-01-01", None, 400, "invalid_value", "from"),
    ("GET", "/api/usage?from=0001-01-01T00:00:00Z", None, 400, "invalid_value", "from"),
]  # fmt: skip


async def test_bad_input_is_refused_by_name_and_changes_nothing(gateway: Gateway) -> None:
    before = await counts(gateway)
    for method, path, body, status, code, param in BAD_BODIES:
        reply = await gateway.call(method, path, body)
        assert (reply.status, reply.code, reply.json.get("param")) == (status, code, param), (
            path,
            body,
            reply.body,
        )
        assert reply.headers["content-type"].startswith("application/problem+json")
        assert reply.json["request_id"] == reply.headers["x-request-id"]
    assert await counts(gateway) == before
    assert gateway.commands == []


async def counts(gateway: Gateway) -> list[int]:
    tables = ("teams", "api_keys", "models", "model_types", "idempotency_keys")
    return [await gateway.sql.fetchval(f"SELECT count(*) FROM gateway.{table}") for table in tables]


async def test_money_is_a_plain_decimal_string(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model_type = (await register(gateway, "tiny", key=key))["model_type"]
    for bad in ("1e3", "-1", ".5", "0.1234567891", "1000001", "9" * 30, "0,5", "", " 1"):
        body = {
            "model_type": model_type,
            "work_class": "live",
            "prompt_usd_per_million": bad,
            "completion_usd_per_million": "1",
        }
        reply = await gateway.call("PUT", "/api/prices", body)
        assert (reply.status, reply.code, reply.json["param"]) == (
            400,
            "invalid_money",
            "prompt_usd_per_million",
        ), bad
    body["prompt_usd_per_million"] = "0.0001"
    assert (await gateway.call("PUT", "/api/prices", body)).code == "invalid_money"
    body |= {"prompt_usd_per_million": 0.02}
    assert (await gateway.call("PUT", "/api/prices", body)).code == "invalid_type"
    body |= {"prompt_usd_per_million": "0.02"}
    first = await gateway.call("PUT", "/api/prices", body)
    assert (first.status, first.json["prompt_nanousd"], first.json["completion_usd_per_million"]) == (
        200,
        20,
        "1.00",
    )
    again = await gateway.call("PUT", "/api/prices", body)
    assert again.json["price_id"] == first.json["price_id"]
    listed = (await gateway.call("GET", f"/api/prices?model_type={model_type}", key=key)).json["data"]
    assert [price["price_id"] for price in listed] == [first.json["price_id"]]
    body |= {"model_type": "nothing"}
    assert (await gateway.call("PUT", "/api/prices", body)).code == "unknown_model_type"


async def test_a_deleted_models_files_are_removed_later_and_only_its_own(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    kept, gone = [await register(gateway, name, key=key, folder=name) for name in ("kept", "gone")]
    assert (await gateway.call("DELETE", f"/api/models/{gone['model_id']}", key=key)).status == 204
    importer = ModelImporter(gateway.import_dir, gateway.model_store, asyncio.Lock())

    # Jobs on the way may still name it
    assert await importer.sweep(await gateway.models.folders_unused_for(3600)) == []
    assert (gateway.model_store / gone["model_id"]).is_dir()

    assert await importer.sweep(await gateway.models.folders_unused_for(0)) == [gone["model_id"]]
    assert [folder.name for folder in gateway.model_store.iterdir()] == [kept["model_id"]]
    assert (gateway.import_dir / "gone" / "config.json").exists()
    assert await importer.sweep(await gateway.models.folders_unused_for(0)) == []


async def test_a_revoked_key_stops_working_and_lists_show_no_secret(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    made = (await gateway.call("POST", "/api/keys", {"name": "second", "scopes": ["manage"]}, key=key)).json
    assert (await gateway.call("GET", "/api/team", key=made["secret"])).status == 200
    listing = await gateway.call("GET", "/api/keys", key=key)
    assert made["secret"].encode() not in listing.body
    assert made["prefix"] == made["secret"][:12]
    dumped = str([dict(row) for row in await gateway.sql.fetch("SELECT * FROM gateway.api_keys")])
    assert made["secret"] not in dumped
    assert (await gateway.call("DELETE", f"/api/keys/{made['key_id']}", key=key)).status == 204
    reply = await gateway.call("GET", "/api/team", key=made["secret"])
    assert (reply.status, reply.code) == (401, "invalid_api_key")
    assert (await gateway.call("DELETE", f"/api/keys/{made['key_id']}", key=key)).status == 404


async def test_a_key_revoked_elsewhere_stops_working_within_five_seconds(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    assert (await gateway.call("GET", "/api/team", key=key)).status == 200
    await gateway.sql.execute("UPDATE gateway.api_keys SET revoked_at = now() WHERE name = 'first'")
    async with asyncio.timeout(5):
        while (await gateway.call("GET", "/api/team", key=key)).status == 200:
            await asyncio.sleep(0.1)


async def test_a_suspended_team_is_refused(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    await gateway.sql.execute("UPDATE gateway.teams SET suspended = true WHERE slug = 'acme'")
    reply = await gateway.call("GET", "/api/team", key=key)
    assert (reply.status, reply.code) == (403, "team_suspended")


async def test_only_the_platform_gives_the_scope_platform_and_names_types(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    body = {"name": "k", "scopes": ["platform"]}
    assert (await gateway.call("POST", "/api/keys", body, key=key)).code == "insufficient_scope"
    assert (await gateway.call("POST", "/api/keys?team=acme", body)).code == "insufficient_scope"
    assert (await gateway.call("POST", "/api/keys", body)).status == 201
    make_folder(gateway.import_dir / "tiny")
    model = {"name": "tiny", "path": "tiny", "model_type": "tiny-type"}
    reply = await gateway.call("POST", "/api/models", model, key=key)
    assert (reply.status, reply.code) == (403, "insufficient_scope")
    reply = await gateway.call("POST", "/api/models?team=acme", model)
    assert (reply.status, reply.json["model_type"], reply.json["name"]) == (201, "tiny-type", "acme/tiny")
    reply = await gateway.call("POST", "/api/models", model | {"name": "two", "model_type": "other"}, key=key)
    assert (reply.status, reply.code) == (400, "model_type_mismatch")
    reply = await gateway.call("POST", "/api/models", {"name": "tiny", "path": "tiny"}, key=key)
    assert (reply.status, reply.code) == (409, "name_taken")
    types = (await gateway.call("GET", "/api/model-types", key=key)).json["data"]
    assert [t["name"] for t in types] == ["tiny-type"]


async def test_an_unsafe_folder_is_refused_and_nothing_is_stored(gateway: Gateway) -> None:
    folder = make_folder(gateway.import_dir / "bad")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    reply = await gateway.call("POST", "/api/models", {"name": "bad", "path": "bad"})
    assert (reply.status, reply.code, reply.json["param"]) == (400, "unsafe_model_file", "path")
    assert str(gateway.import_dir).encode() not in reply.body
    os.symlink("/etc", gateway.import_dir / "link")
    assert (await gateway.call("POST", "/api/models", {"name": "bad", "path": "link"})).code == "invalid_path"
    assert list(gateway.model_store.iterdir()) == []
    assert await gateway.sql.fetchval("SELECT count(*) FROM gateway.models") == 0


async def test_one_idempotency_key_has_one_effect(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    body = {"name": "k", "scopes": ["inference"]}

    async def send(**changes: Any) -> Any:
        headers = {"Idempotency-Key": "once-1"}
        return await gateway.call("POST", "/api/keys", body | changes, key=key, headers=headers)

    replies = await asyncio.gather(*(send() for _ in range(5)))
    assert {reply.status for reply in replies} <= {201, 409}
    assert sum(1 for reply in replies if reply.status == 201 and reply.json["secret"]) == 1
    again = await send()
    assert (again.status, again.headers["idempotent-replayed"], again.json["secret"]) == (201, "true", None)
    made = [k for k in (await gateway.call("GET", "/api/keys", key=key)).json["data"] if k["name"] == "k"]
    assert [k["key_id"] for k in made] == [again.json["key_id"]]
    other = await send(name="other")
    assert (other.status, other.code) == (422, "idempotency_key_reused")
    theirs = await gateway.make_team("rival")
    reply = await gateway.call("POST", "/api/keys", body, key=theirs, headers={"Idempotency-Key": "once-1"})
    assert (reply.status, reply.json["secret"] is not None) == (201, True)
    for bad in ("", "x" * 256, "a b"):
        reply = await gateway.call("POST", "/api/keys", body, key=key, headers={"Idempotency-Key": bad})
        assert (reply.status, reply.code) == (400, "invalid_idempotency_key")
    dumped = str([dict(row) for row in await gateway.sql.fetch("SELECT * FROM gateway.idempotency_keys")])
    assert not any(reply.json.get("secret") and reply.json["secret"] in dumped for reply in replies)


async def test_a_refused_request_does_not_use_up_its_idempotency_key(gateway: Gateway) -> None:
    headers = {"Idempotency-Key": "once-2"}
    assert (
        await gateway.call("POST", "/api/teams", {"slug": "BAD", "name": "x"}, headers=headers)
    ).status == 400
    assert (
        await gateway.call("POST", "/api/teams", {"slug": "good", "name": "x"}, headers=headers)
    ).status == 201


async def test_a_change_based_on_old_settings_is_refused(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key=key)
    await gateway.make_option(model["model_type"])
    resource = await make_resource(gateway, key, model["model_type"])
    path = f"/api/resources/{resource['resource_id']}"
    tag = (await gateway.call("GET", path, key=key)).headers["etag"]
    reply = await gateway.call("PATCH", path, {"gpus": 2}, key=key, headers={"If-Match": tag})
    assert (reply.status, reply.json["gpus"]) == (200, 2)
    assert reply.headers["etag"] != tag
    reply = await gateway.call("PATCH", path, {"gpus": 3}, key=key, headers={"If-Match": tag})
    assert (reply.status, reply.code) == (412, "precondition_failed")
    assert (await gateway.call("GET", path, key=key)).json["gpus"] == 2
    assert (await gateway.call("PATCH", path, {"gpus": 4}, key=key)).json["gpus"] == 4
    duplicate = {"name": "main", "model_type": model["model_type"], "option": "bf16"}
    reply = await gateway.call("POST", "/api/resources", duplicate, key=key)
    assert (reply.status, reply.code) == (409, "name_taken")
    reply = await gateway.call("POST", "/api/resources", duplicate | {"pool": True}, key=key)
    assert (reply.status, reply.code) == (403, "insufficient_scope")


async def test_lists_come_in_pages_that_hold_all_once(gateway: Gateway) -> None:
    for index in range(7):
        assert (
            await gateway.call("POST", "/api/teams", {"slug": f"team-{index}", "name": "t"})
        ).status == 201
    seen: list[str] = []
    cursor = ""
    while True:
        reply = await gateway.call("GET", f"/api/teams?limit=3{cursor}")
        seen += [team["slug"] for team in reply.json["data"]]
        if reply.json["next_cursor"] is None:
            break
        cursor = f"&cursor={reply.json['next_cursor']}"
    assert sorted(seen) == ["platform"] + [f"team-{index}" for index in range(7)]


async def test_usage_and_requests_are_shown_as_billing_knows_them(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    team_id = (await gateway.call("GET", "/api/team", key=key)).json["team_id"]
    for index in range(3):
        await gateway.sql.execute(
            "INSERT INTO billing.requests VALUES ($1, $2, $3, 'key_a', 'res_a', 'ppt', 'live', 'chat', 't', 'mod_a',"
            " 'acme/tiny', 1, 'succeeded', NULL, 1, 10, 5, 500, NULL, 1, 2, 3, 4, now(), now(), now())",
            f"job_{index:032x}", f"req_{index // 2:032x}", team_id,
        )  # fmt: skip
    await gateway.sql.execute(
        "INSERT INTO billing.minute_charges VALUES ('res_a', 0, date_trunc('hour', now(), 'UTC'), 600000000, $1, 21, 210000000, 1)",
        team_id,
    )
    usage = (await gateway.call("GET", "/api/usage?group_by=resource", key=key)).json
    assert usage["data"] == [
        {
            "group": "res_a", "requests": 3, "prompt_tokens": 30, "completion_tokens": 15, "tokens_nanousd": 1500,
            "tokens_usd": "0.0000015", "minutes": 21, "minutes_nanousd": 210_000_000, "minutes_usd": "0.21",
        }
    ]  # fmt: skip
    groups = (await gateway.call("GET", "/api/usage?group_by=model", key=key)).json["data"]
    assert [(g["group"], g["requests"], g["minutes"]) for g in groups] == [("acme/tiny", 3, 0), (None, 0, 21)]
    for group_by in ("day", "key"):
        assert (await gateway.call("GET", f"/api/usage?group_by={group_by}", key=key)).status == 200

    page = (await gateway.call("GET", "/api/requests?limit=2&model=tiny", key=key)).json
    rest = (await gateway.call("GET", f"/api/requests?limit=2&cursor={page['next_cursor']}", key=key)).json
    assert len({r["job_id"] for r in page["data"] + rest["data"]}) == 3
    assert rest["next_cursor"] is None
    one = (await gateway.call("GET", f"/api/requests/req_{0:032x}", key=key)).json
    assert [job["charged_usd"] for job in one["jobs"]] == ["0.0000005", "0.0000005"]


async def test_the_description_is_valid_and_names_every_route(gateway: Gateway) -> None:
    reply = await gateway.call("GET", "/openapi.json", key=None)
    document = reply.json
    validate(document)
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(spec.method, spec.template) for spec in gateway.specs}
    ids = [
        operation["operationId"] for methods in document["paths"].values() for operation in methods.values()
    ]
    assert len(ids) == len(set(ids))


async def test_the_console_runs_no_foreign_script(gateway: Gateway) -> None:
    assert (await gateway.call("GET", "/", key=None)).headers["location"] == "/console"
    page = await gateway.call("GET", "/console", key=None)
    assert page.status == 200
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy
    assert b"<script>" not in page.body and b" onclick=" not in page.body and b" style=" not in page.body
    for name in ("console.css", "console.js", "api.js", "icon.svg"):
        assert (await gateway.call("GET", f"/console/{name}", key=None)).status == 200
    assert (await gateway.call("GET", "/console/../settings.py", key=None)).status == 404


async def test_a_scheduler_that_is_away_is_a_503_and_not_a_hang(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.commands.DEADLINE_S", 0.5)
    monkeypatch.setattr(gateway.broker, "publish", _publish_nowhere)
    model = await register(gateway, "tiny", key=ADMIN_KEY)
    body = {
        "model_type": model["model_type"], "name": "bf16", "device_kind": "cpu", "precision": "bf16", "max_batch": 4,
        "max_context_tokens": 64, "kv_tokens": 256, "hourly_rate_usd": "0.60",
    }  # fmt: skip
    reply = await gateway.call("POST", "/api/options", body)
    assert (reply.status, reply.code) == (503, "service_unavailable")
    assert reply.headers["retry-after"]


async def _publish_nowhere(*_args: Any, **_kwargs: Any) -> None:
    return None


def test_page_limits_are_documented() -> None:
    assert acting.PAGE_QUERY["limit"]["maximum"] == acting.MAX_PAGE


NASTY: list[Any] = [
    b"", b"{", b"[]", b"null", b"\xff", b'{"a":1,"a":2}', {}, {"name": None}, {"name": []}, {"name": {"name": {}}},
    {"slug": "x" * 10_000}, {"name": "\u202egnp.exe", "slug": "rtl"}, {"name": "<script>alert(1)</script>", "slug": "html"},
    {"gpus": 2**63}, {"gpus": -1}, {"gpus": 10**19}, {"name": "x", "path": "a\u0001"}, {"name": "x", "path": "~"},
    {"name": "x", "path": "a" * 512}, {"name": "x", "path": "a/" * 250}, {"starts_at": "9999-99-99"},
    {"model_type": "t", "work_class": "live", "prompt_usd_per_million": "1", "completion_usd_per_million": "1",
     "starts_at": "0001-01-01T00:00:00+23:59"},
    {"name": "x", "scopes": ["manage"] * 4}, {"name": " ", "model_type": "t", "option": "\u00e9"},
]  # fmt: skip


async def test_no_route_fails_on_nasty_bodies_ids_and_queries(gateway: Gateway) -> None:
    checked = 0
    for spec in gateway.specs:
        if spec.scope == PUBLIC:
            continue
        path = spec.template
        for value in ("garbage", "res_" + "0" * 32, "%00", "%ff", "..%2f..", "a" * 2000):
            target = (
                path.replace("{resource_id}", value).replace("{model_id}", value).replace("{key_id}", value)
            )
            target = target.replace("{request_id}", value).replace("{upload_id}", value)
            for query in (
                "",
                "?team=%00",
                "?team=%ff",
                "?limit=1e9",
                "?cursor=" + "A" * 500,
                "?from=%00&to=x",
                "?model=%ed%a0%80",
            ):
                bodies = NASTY if spec.request_schema and not query else [None]
                for body in bodies:
                    reply = await gateway.call(spec.method, target + query, body)
                    assert reply.status < 500, (spec.method, target, query, body, reply.body)
                    checked += 1
            if target == path:
                break
    assert checked > 400
