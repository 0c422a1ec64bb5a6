"""Models over time on a real database: revisions, choices, names, removal, and what happens when they meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.gateway.model_import import ModelImporter
from services.gateway.model_registry import ModelGone, ModelRegistry, NewRevision
from services.gateway.route_table import RouteTable
from services.gateway.views import Views
from shared.inference.errors import ApiError
from shared.inference.principal import Principal
from tests.conftest import Vhost
from tests.gateway_harness import Gateway, Reply, running_gateway
from tests.model_folders import edit_config, make_folder


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as running:
        yield running


async def register(gateway: Gateway, name: str, key: str, folder: str = "tiny") -> dict[str, Any]:
    make_folder(gateway.import_dir / folder)
    reply = await gateway.call("POST", "/api/models", {"name": name, "path": folder}, key=key)
    assert reply.status == 201, reply.body
    model: dict[str, Any] = reply.json
    return model


def path_of(model: dict[str, Any]) -> str:
    return f"/api/models/{model['model_id']}"


async def add_revision(gateway: Gateway, model: dict[str, Any], key: str, folder: str = "tiny") -> Reply:
    return await gateway.call("POST", f"{path_of(model)}/revisions", {"path": folder}, key=key)


async def kept(gateway: Gateway, model: dict[str, Any], key: str) -> list[tuple[int, bool]]:
    reply = await gateway.call("GET", f"{path_of(model)}/revisions", key=key)
    assert reply.status == 200, reply.body
    return [(row["revision"], row["current"]) for row in reply.json["data"]]


def principal(team: str) -> Principal:
    return Principal("key", "team", team, False, False, frozenset())


async def test_another_revision_and_back(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key)
    before = gateway.routes.find_model(principal("acme"), "tiny")
    make_folder(gateway.import_dir / "next", eos_token_id=256)

    reply = await add_revision(gateway, model, key, "next")
    assert (reply.status, reply.json["revision"], reply.json["model_id"]) == (201, 2, model["model_id"])
    # At once here, and what a job was given stays as it was
    now = gateway.routes.find_model(principal("acme"), "tiny")
    assert (before.folder, now.folder) == (f"{model['model_id']}/1", f"{model['model_id']}/2")
    assert (gateway.model_store / before.folder / "manifest.json").exists()
    assert await kept(gateway, model, key) == [(2, True), (1, False)]

    reply = await gateway.call("PATCH", path_of(model), {"revision": 1}, key=key)
    assert (reply.status, reply.json["revision"]) == (200, 1)
    assert gateway.routes.find_model(principal("acme"), "tiny").folder == before.folder
    assert await kept(gateway, model, key) == [(2, False), (1, True)]
    # Numbers are given once
    assert (await add_revision(gateway, model, key)).json["revision"] == 3

    sizes = [
        row["size_bytes"]
        for row in (await gateway.call("GET", f"{path_of(model)}/revisions", key=key)).json["data"]
    ]
    folder = gateway.model_store / model["model_id"] / "3"
    assert sizes[0] == sum(p.stat().st_size for p in folder.iterdir() if p.name != "manifest.json")


async def test_another_gateway_learns_every_kind_of_change(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key)
    other = RouteTable(ModelRegistry(gateway.database), Views(gateway.database))

    async def seen(name: str) -> int | None:
        await other.refresh()
        try:
            return other.find_model(principal("acme"), name).revision
        except ApiError:
            return None

    assert await seen("tiny") == 1
    assert (await add_revision(gateway, model, key)).status == 201
    assert await seen("tiny") == 2
    assert (await gateway.call("PATCH", path_of(model), {"revision": 1}, key=key)).status == 200
    assert await seen("tiny") == 1
    assert (await gateway.call("PATCH", path_of(model), {"name": "small"}, key=key)).status == 200
    assert (await seen("tiny"), await seen("small")) == (None, 1)
    assert (await gateway.call("DELETE", path_of(model), key=key)).status == 204
    assert await seen("small") is None


async def test_a_revision_of_another_type_is_refused_and_leaves_nothing(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key)
    make_folder(gateway.import_dir / "wide", hidden_size=16)
    reply = await add_revision(gateway, model, key, "wide")
    assert (reply.status, reply.code, reply.json["param"]) == (400, "model_type_mismatch", "path")
    make_folder(gateway.import_dir / "broken")
    edit_config(gateway.import_dir / "broken", num_hidden_layers=3)
    assert (await add_revision(gateway, model, key, "broken")).code == "tensor_mismatch"
    assert (await add_revision(gateway, model, key, "../x")).code == "invalid_path"
    assert await kept(gateway, model, key) == [(1, True)]
    assert [p.name for p in (gateway.model_store / model["model_id"]).iterdir()] == ["1"]


async def test_ten_revisions_are_kept_and_the_rest_is_swept_later(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.model_registry.REVISIONS_PER_MODEL", 3)
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key)
    for _ in range(2):
        assert (await add_revision(gateway, model, key)).status == 201
    assert (await gateway.call("PATCH", path_of(model), {"revision": 1}, key=key)).status == 200
    assert (await add_revision(gateway, model, key)).json["revision"] == 4
    assert await kept(gateway, model, key) == [(4, True), (3, False), (1, False)]
    reply = await gateway.call("PATCH", path_of(model), {"revision": 2}, key=key)
    assert (reply.status, reply.code, reply.json["param"]) == (400, "unknown_revision", "revision")

    # Jobs on the way may still name the removed one
    importer = ModelImporter(gateway.import_dir, gateway.model_store, asyncio.Lock())
    assert await importer.sweep(await gateway.models.folders_unused_for(3600)) == []
    assert await importer.sweep(await gateway.models.folders_unused_for(0)) == [f"{model['model_id']}/2"]
    assert sorted(p.name for p in (gateway.model_store / model["model_id"]).iterdir()) == ["1", "3", "4"]


async def test_names_are_taken_and_given_back(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    one, two = [await register(gateway, name, key) for name in ("one", "two")]
    reply = await gateway.call("PATCH", path_of(one), {"name": "two"}, key=key)
    assert (reply.status, reply.code, reply.json["param"]) == (409, "name_taken", "name")
    reply = await gateway.call("PATCH", path_of(one), {"name": "three"}, key=key)
    assert (reply.status, reply.json["name"]) == (200, "acme/three")
    assert (await gateway.call("PATCH", path_of(two), {"name": "one"}, key=key)).status == 200
    # Both in one, or neither
    reply = await gateway.call("PATCH", path_of(two), {"name": "four", "revision": 9}, key=key)
    assert (reply.status, reply.code) == (400, "unknown_revision")
    assert (await gateway.call("GET", path_of(two), key=key)).json["name"] == "acme/one"
    bad: list[tuple[dict[str, Any], str]] = [
        ({"name": "Bad Name"}, "invalid_value"),
        ({"revision": 0}, "invalid_value"),
        ({"revision": 2**40}, "invalid_value"),
        ({"revision": "1"}, "invalid_type"),
        ({"name": None}, "invalid_type"),
        ({"folder": "x"}, "unknown_parameter"),
    ]
    for body, code in bad:
        reply = await gateway.call("PATCH", path_of(two), body, key=key)
        assert (reply.status, reply.code) == (400, code), body
    # A deleted model's name is free, and the deleted one can do nothing more
    assert (await gateway.call("DELETE", path_of(two), key=key)).status == 204
    assert (await gateway.call("PATCH", path_of(one), {"name": "one"}, key=key)).status == 200
    gone: list[tuple[str, str, Any]] = [
        ("PATCH", path_of(two), {"name": "x"}),
        ("DELETE", path_of(two), None),
        ("POST", f"{path_of(two)}/revisions", {"path": "tiny"}),
        ("GET", f"{path_of(two)}/revisions", None),
    ]
    for method, path, body in gone:
        assert (await gateway.call(method, path, body, key=key)).status == 404, (method, path)


async def test_of_two_renames_to_one_name_one_wins(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    models = [await register(gateway, name, key) for name in ("one", "two")]
    replies = await asyncio.gather(
        *(gateway.call("PATCH", path_of(model), {"name": "best"}, key=key) for model in models)
    )
    assert sorted((reply.status, reply.json.get("code")) for reply in replies) == [
        (200, None),
        (409, "name_taken"),
    ]


async def test_a_change_based_on_what_was_is_refused(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key)
    tag = (await gateway.call("GET", path_of(model), key=key)).headers["etag"]
    assert (await add_revision(gateway, model, key)).headers["etag"] != tag
    late = await gateway.call("PATCH", path_of(model), {"name": "x"}, key=key, headers={"If-Match": tag})
    assert (late.status, late.code) == (412, "precondition_failed")
    tag = (await gateway.call("GET", path_of(model), key=key)).headers["etag"]
    replies = await asyncio.gather(
        *(
            gateway.call("PATCH", path_of(model), {"name": name}, key=key, headers={"If-Match": tag})
            for name in ("x", "y", "z")
        )
    )
    assert sorted(reply.status for reply in replies) == [200, 412, 412]
    winner = next(reply for reply in replies if reply.status == 200)
    # What changes nothing is no change
    same = await gateway.call("PATCH", path_of(model), {"revision": 2}, key=key, headers={"If-Match": "*"})
    assert same.headers["etag"] == winner.headers["etag"]


async def test_a_revision_that_comes_while_its_model_is_deleted_is_refused(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key)
    team_id = await gateway.sql.fetchval("SELECT team_id FROM gateway.teams WHERE slug = 'acme'")
    lock = await gateway.database.pool.acquire()
    transaction = lock.transaction()
    await transaction.start()
    # The delete is under way, and holds the row, until the copy was made
    await lock.execute("UPDATE gateway.models SET deleted_at = now(), version = version + 1")
    adding = asyncio.create_task(gateway.models.add_revision(
        team_id, NewRevision(model["model_id"], 2, f"{model['model_id']}/2", {}, 8)
    ))  # fmt: skip
    await asyncio.sleep(0.1)
    assert not adding.done()
    await transaction.commit()
    await gateway.database.pool.release(lock)
    with pytest.raises(ModelGone):
        await adding
    reply = await add_revision(gateway, model, key)
    assert (reply.status, reply.code) == (404, "not_found")
    assert await gateway.sql.fetchval("SELECT count(*) FROM gateway.model_revisions") == 1


async def test_many_revisions_at_once_get_numbers_of_their_own(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key)
    replies = await asyncio.gather(*(add_revision(gateway, model, key) for _ in range(4)))
    assert sorted(reply.status for reply in replies) == [201] * 4
    revisions = await kept(gateway, model, key)
    assert [number for number, _ in revisions] == [5, 4, 3, 2, 1]
    assert sum(current for _, current in revisions) == 1


async def test_a_long_registration_keeps_its_idempotency_key(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.management.idempotency.STALE_S", 1)
    monkeypatch.setattr("services.gateway.management.idempotency.RENEW_S", 0.2)
    key = await gateway.make_team("acme")
    model = await register(gateway, "tiny", key)
    headers = {"Idempotency-Key": "once"}

    async def send() -> Reply:
        path = f"{path_of(model)}/revisions"
        return await gateway.call("POST", path, {"path": "tiny"}, key=key, headers=headers)

    lock = await gateway.database.pool.acquire()
    transaction = lock.transaction()
    await transaction.start()
    await lock.execute("SELECT 1 FROM gateway.models FOR UPDATE")
    first = asyncio.create_task(send())
    await asyncio.sleep(1.6)
    second = await send()
    assert (second.status, second.code) == (409, "idempotency_in_progress")
    await transaction.commit()
    await gateway.database.pool.release(lock)
    assert (await first).status == 201
    assert (await send()).headers["idempotent-replayed"] == "true"
    assert len(await kept(gateway, model, key)) == 2
