"""Models from a hub: the hub's own library against a local server that speaks as much of the protocol as it asks for."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.conftest import Vhost
from tests.gateway_harness import Gateway, Reply, running_gateway
from tests.model_folders import make_adapter_folder, make_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@dataclass
class LocalHub:
    """Repositories are folders. lies: sizes that are listed instead of the true ones."""

    root: Path
    port: int = 0
    asked: list[str] = field(default_factory=list)
    lies: dict[str, int] = field(default_factory=dict)
    status: int = 0
    """What it answers instead of files; 0: files."""
    is_slow: bool = False

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/models/{org}/{name}", self.info)
        app.router.add_get("/api/models/{org}/{name}/revision/{revision}", self.info)
        app.router.add_get("/{org}/{name}/resolve/{revision}/{file:.+}", self.file)
        return app

    async def info(self, request: web.Request) -> web.Response:
        self.asked.append(f"{request.method} {request.path}")
        org, name = request.match_info["org"], request.match_info["name"]
        folder = self.root / org / name
        if not folder.is_dir():
            return web.Response(status=404, headers={"X-Error-Code": "RepoNotFound"})
        if request.match_info.get("revision", "main") not in ("main", COMMIT):
            return web.Response(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        siblings = [
            {
                "rfilename": p.relative_to(folder).as_posix(),
                "size": self.lies.get(p.name, p.stat().st_size),
                "blobId": "b",
            }
            for p in files
        ]
        return web.json_response(
            {"id": f"{org}/{name}", "sha": COMMIT, "private": False, "siblings": siblings}
        )

    async def file(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path}")
        if self.status:
            return web.Response(status=self.status)
        if self.is_slow and request.method == "GET":
            await asyncio.sleep(60)
        where = request.match_info
        path = self.root / where["org"] / where["name"] / where["file"]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{path.stat().st_size:040x}"'}
        return web.Response(body=path.read_bytes(), headers=headers)


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[LocalHub]:
    hub = LocalHub(tmp_path / "hub")
    folder = hub.root / "org" / "tiny"
    folder.mkdir(parents=True)
    make_folder(folder)
    runner = web.AppRunner(hub.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    hub.port = runner.addresses[0][1]
    yield hub
    await runner.cleanup()


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path, hub: LocalHub) -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        url = f"http://127.0.0.1:{hub.port}"
        yield await stack.enter_async_context(
            running_gateway(database, vhost.amqp_url, tmp_path, hub_url=url)
        )


async def fetch(gateway: Gateway, key: str, name: str = "new", **body: Any) -> Reply:
    return await gateway.call("POST", "/api/models", {"name": name, **body}, key=key)


async def left(gateway: Gateway) -> tuple[int, list[str]]:
    uploads = gateway.model_store / ".uploads"
    rows: int = await gateway.sql.fetchval("SELECT count(*) FROM gateway.model_uploads")
    return rows, [p.name for p in uploads.iterdir()] if uploads.is_dir() else []


async def test_a_repository_becomes_a_model(gateway: Gateway, hub: LocalHub) -> None:
    key = await gateway.make_team("acme")
    folder = hub.root / "org" / "tiny"
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "evil.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    reply = await fetch(gateway, key, hub="org/tiny")
    assert reply.status == 201, reply.body
    stored = gateway.model_store / reply.json["model_id"] / "1"
    assert {p.name for p in stored.iterdir()} == TINY | {"manifest.json"}
    for name in TINY:
        assert (stored / name).read_bytes() == (folder / name).read_bytes()
    # One commit for all files, whatever moves meanwhile; nothing else was asked for
    assert {line for line in hub.asked if "/resolve/" in line} == {
        f"{method} /org/tiny/resolve/{COMMIT}/{name}" for name in TINY for method in ("HEAD", "GET")
    }
    assert await left(gateway) == (0, [])

    reply = await gateway.call(
        "POST",
        f"/api/models/{reply.json['model_id']}/revisions",
        {"hub": "org/tiny", "hub_revision": COMMIT},
        key=key,
    )
    assert (reply.status, reply.json["revision"]) == (201, 2)


async def test_an_adapter_from_a_hub(gateway: Gateway, hub: LocalHub) -> None:
    key = await gateway.make_team("acme")
    assert (await fetch(gateway, key, "big", hub="org/tiny")).status == 201
    folder = hub.root / "org" / "lora"
    folder.mkdir()
    make_adapter_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    reply = await fetch(gateway, key, "fine", hub="org/lora", base="big")
    assert (reply.status, reply.json["base"]["name"]) == (201, "acme/big")


async def test_what_a_hub_refuses_is_said(gateway: Gateway, hub: LocalHub) -> None:
    key = await gateway.make_team("acme")
    (hub.root / "org" / "pickled").mkdir()
    (hub.root / "org" / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"hub": "org/nothing"}, 400, "hub_model_not_found"),
        ({"hub": "org/tiny", "hub_revision": "nothing"}, 400, "hub_model_not_found"),
        ({"hub": "org/pickled"}, 400, "missing_file"),
    ]
    for body, status, code in cases:
        reply = await fetch(gateway, key, **body)
        assert (reply.status, reply.code, reply.json["param"]) == (status, code, "hub"), reply.body
    hub.status = 500
    assert (await fetch(gateway, key, hub="org/tiny")).code == "hub_error"
    hub.status = 0
    # It sends more than it listed, or less
    hub.lies = {"tokenizer.json": 10}
    assert (await fetch(gateway, key, hub="org/tiny")).code == "hub_error"
    hub.lies = {"config.json": 2 * 1024**2}
    assert (await fetch(gateway, key, hub="org/tiny")).code == "model_too_large"
    hub.lies = {}
    # What came is checked as any folder
    (hub.root / "org" / "tiny" / "config.json").write_text("{}")
    reply = await fetch(gateway, key, hub="org/tiny")
    assert (reply.status, reply.code, reply.json["param"]) == (400, "invalid_config", "hub")
    assert await left(gateway) == (0, [])
    assert await gateway.sql.fetchval("SELECT count(*) FROM gateway.models") == 0


async def test_the_quota_is_asked_before_a_byte_comes(gateway: Gateway, hub: LocalHub) -> None:
    limits = dataclasses.replace(gateway.uploads.limits, team_bytes=1000)
    object.__setattr__(gateway.uploads, "limits", limits)
    key = await gateway.make_team("acme")
    reply = await fetch(gateway, key, hub="org/tiny")
    assert (reply.status, reply.code) == (409, "upload_quota_exceeded")
    assert [line for line in hub.asked if "/resolve/" in line] == []
    assert await left(gateway) == (0, [])


async def test_a_client_that_goes_ends_the_fetch(gateway: Gateway, hub: LocalHub) -> None:
    key = await gateway.make_team("acme")
    hub.is_slow = True
    running = asyncio.create_task(fetch(gateway, key, hub="org/tiny"))
    async with asyncio.timeout(20):
        while not any(line.startswith("GET") and "/resolve/" in line for line in hub.asked):
            await asyncio.sleep(0.05)
    running.cancel()
    async with asyncio.timeout(10):
        while await left(gateway) != (0, []):
            await asyncio.sleep(0.05)


async def test_a_hub_that_is_away_is_said_so(database: str, vhost: Vhost, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with running_gateway(database, vhost.amqp_url, tmp_path, hub_url=url) as gateway:
            key = await gateway.make_team("acme")
            reply = await fetch(gateway, key, hub="org/tiny")
            assert (reply.status, reply.code, reply.json["param"]) == (503, "hub_unreachable", "hub")
            assert "retry-after" in reply.headers
            assert await left(gateway) == (0, [])
