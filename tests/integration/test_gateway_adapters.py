"""Adapters on a real database: registered on a base, whose files stay as long as they are stood on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.gateway.model_registry import BaseGone, NewRevision
from shared.ids import new_id
from shared.inference.principal import BaseView, Principal
from tests.conftest import Vhost
from tests.gateway_harness import ADMIN_KEY, Gateway, Reply, running_gateway
from tests.model_folders import make_adapter_folder, make_folder


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as running:
        make_folder(running.import_dir / "tiny")
        make_adapter_folder(running.import_dir / "adapter")
        yield running


async def post(gateway: Gateway, body: dict[str, Any], key: str) -> Reply:
    return await gateway.call("POST", "/api/models", body, key=key)


async def made(gateway: Gateway, key: str, name: str, path: str = "tiny", **more: Any) -> dict[str, Any]:
    reply = await post(gateway, {"name": name, "path": path, **more}, key)
    assert reply.status == 201, reply.body
    model: dict[str, Any] = reply.json
    return model


def path_of(model: dict[str, Any]) -> str:
    return f"/api/models/{model['model_id']}"


async def test_an_adapter_is_a_model_of_its_bases_type(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    base = await made(gateway, key, "big")
    for name, named in (("one", "big"), ("two", "acme/big"), ("three", base["model_id"])):
        adapter = await made(gateway, key, name, "adapter", base=named)
        assert adapter["base"] == {"model_id": base["model_id"], "name": "acme/big", "revision": 1}
        assert {k: adapter[k] for k in ("model_type", "signature", "context_tokens")} == {
            k: base[k] for k in ("model_type", "signature", "context_tokens")
        }
    stored = gateway.model_store / adapter["model_id"] / "1"
    assert sorted(p.name for p in stored.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    assert json.loads((stored / "manifest.json").read_text())["adapter_rank"] == 2
    # What jobs are made of
    view = gateway.routes.find_model(Principal("k", "t", "acme", False, False, frozenset()), "three")
    assert view.base == BaseView(base["model_id"], "acme/big", 1, f"{base['model_id']}/1")
    assert (view.tokenizer_folder, view.eos_token_ids) == (f"{base['model_id']}/1", (257, 256))


async def test_an_adapter_stays_on_the_revision_that_it_was_checked_against(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    base = await made(gateway, key, "big")
    adapter = await made(gateway, key, "fine", "adapter", base="big")
    reply = await gateway.call("POST", f"{path_of(base)}/revisions", {"path": "tiny"}, key=key)
    assert reply.json["revision"] == 2
    assert (await gateway.call("GET", path_of(adapter), key=key)).json["base"]["revision"] == 1
    # Another revision of the adapter is checked against the base as it is now
    reply = await gateway.call("POST", f"{path_of(adapter)}/revisions", {"path": "adapter"}, key=key)
    assert (reply.status, reply.json["revision"], reply.json["base"]["revision"]) == (201, 2, 2)
    revisions = (await gateway.call("GET", f"{path_of(adapter)}/revisions", key=key)).json["data"]
    assert [(row["revision"], row["base"]["revision"]) for row in revisions] == [(2, 2), (1, 1)]
    reply = await gateway.call("PATCH", path_of(adapter), {"revision": 1}, key=key)
    assert reply.json["base"]["revision"] == 1


async def test_a_base_that_is_stood_on_stays(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.model_registry.REVISIONS_PER_MODEL", 2)
    key = await gateway.make_team("acme")
    base = await made(gateway, ADMIN_KEY, "big")
    adapter = await made(gateway, key, "fine", "adapter", base="platform/big")
    reply = await gateway.call("DELETE", path_of(base))
    assert (reply.status, reply.code) == (409, "model_has_adapters")
    revisions = f"{path_of(base)}/revisions"
    assert (await gateway.call("POST", revisions, {"path": "tiny"})).status == 201
    # Revision 1 carries the adapter, 2 is current: none can give way
    reply = await gateway.call("POST", revisions, {"path": "tiny"})
    assert (reply.status, reply.code) == (409, "too_many_revisions")
    assert (await gateway.call("DELETE", path_of(adapter), key=key)).status == 204
    assert (await gateway.call("POST", revisions, {"path": "tiny"})).status == 201
    assert (await gateway.call("DELETE", path_of(base))).status == 204


async def test_what_fits_no_base_is_refused_and_leaves_nothing(gateway: Gateway) -> None:
    key, other = await gateway.make_team("acme"), await gateway.make_team("rival")
    base = await made(gateway, key, "big")
    await made(gateway, other, "theirs")
    adapter = await made(gateway, key, "fine", "adapter", base="big")
    make_folder(gateway.import_dir / "wide", hidden_size=16)
    await made(gateway, key, "wide", "wide")
    make_adapter_folder(gateway.import_dir / "dora", use_dora=True)
    make_adapter_folder(gateway.import_dir / "ranks", r=300)
    make_adapter_folder(gateway.import_dir / "code", auto_map={"x": "y"})
    (make_adapter_folder(gateway.import_dir / "pickled") / "training_args.bin").write_bytes(b"x")
    before = sorted(p.name for p in gateway.model_store.iterdir())
    refused: list[tuple[dict[str, Any], str, str]] = [
        ({"path": "adapter"}, "adapter_needs_base", "path"),
        ({"path": "adapter", "base": "nothing"}, "unknown_base", "base"),
        ({"path": "adapter", "base": "rival/theirs"}, "unknown_base", "base"),
        ({"path": "adapter", "base": "theirs"}, "unknown_base", "base"),
        ({"path": "adapter", "base": "../x"}, "invalid_value", "base"),
        ({"path": "adapter", "base": "fine"}, "base_is_adapter", "base"),
        ({"path": "adapter", "base": "wide"}, "tensor_mismatch", "path"),
        ({"path": "tiny", "base": "big"}, "unsafe_model_file", "path"),
        ({"path": "dora", "base": "big"}, "invalid_adapter", "path"),
        ({"path": "ranks", "base": "big"}, "invalid_adapter", "path"),
        ({"path": "code", "base": "big"}, "remote_code", "path"),
        ({"path": "pickled", "base": "big"}, "unsafe_model_file", "path"),
    ]
    for body, code, param in refused:
        reply = await post(gateway, {"name": "new", **body}, key)
        assert (reply.status, reply.code, reply.json["param"]) == (400, code, param), (body, reply.body)
    # A name keeps its kind, and its type
    for model, body, code in (
        (base, {"path": "adapter", "base": "big"}, "not_an_adapter"),
        (base, {"path": "adapter"}, "adapter_needs_base"),
        (adapter, {"path": "tiny"}, "unsafe_model_file"),
        (adapter, {"path": "adapter", "base": "wide"}, "tensor_mismatch"),
    ):
        reply = await gateway.call("POST", f"{path_of(model)}/revisions", body, key=key)
        assert (reply.status, reply.code) == (400, code), (body, reply.body)
    assert sorted(p.name for p in gateway.model_store.iterdir()) == before


async def test_an_adapter_that_comes_while_its_base_goes_is_refused(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    base = await made(gateway, key, "big")
    team_id = await gateway.sql.fetchval("SELECT team_id FROM gateway.teams WHERE slug = 'acme'")
    model_id = new_id("mod")
    new = NewRevision(model_id, 1, f"{model_id}/1", {}, 8, (base["model_id"], 1))
    for change in (
        "UPDATE gateway.models SET deleted_at = now(), version = version + 1",
        "SELECT 1 FROM gateway.models FOR UPDATE",
    ):
        removed = "UPDATE gateway.model_revisions SET removed_at = now()"
        async with gateway.database.pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(change)
            adding = asyncio.create_task(gateway.models.add_model(team_id, "fine", base["signature"], new))
            await asyncio.sleep(0.1)
            assert not adding.done()
            if "FOR UPDATE" in change:
                await connection.execute(removed)
            await transaction.commit()
            with pytest.raises(BaseGone):
                await adding
        await gateway.sql.execute("UPDATE gateway.models SET deleted_at = NULL")
    assert await gateway.sql.fetchval("SELECT count(*) FROM gateway.models") == 1


async def test_an_adapter_comes_by_http_too(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    await made(gateway, key, "big")
    upload_id = (await gateway.call("POST", "/api/models/uploads", key=key)).json["upload_id"]
    for file in (gateway.import_dir / "adapter").iterdir():
        path = f"/api/models/uploads/{upload_id}/files/{file.name}"
        assert (await gateway.call("PUT", path, file.read_bytes(), key=key)).status == 200
    reply = await post(gateway, {"name": "fine", "upload_id": upload_id, "base": "big"}, key)
    assert (reply.status, reply.json["base"]["name"]) == (201, "acme/big")
