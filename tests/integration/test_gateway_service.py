"""The gateway as a process of its own, built by its composition root on real servers."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest

from services.gateway.routes import PUBLIC
from tests.conftest import ROOT, Servers, Vhost

pytestmark = pytest.mark.timeout(180)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Service:
    process: subprocess.Popen[bytes]
    base: str
    ops: str
    admin_key: str
    log: Path

    async def wait_until_ready(self, session: aiohttp.ClientSession) -> None:
        async with asyncio.timeout(60):
            while True:
                assert self.process.poll() is None, self.log.read_text()
                try:
                    async with session.get(f"{self.base}/readyz") as reply:
                        if reply.status == 200:
                            return
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.1)


def start(database: str, vhost: Vhost, redis_db: str, folder: Path, **environment: str) -> Service:
    port, ops_port = free_port(), free_port()
    admin_key = environment.get("ROUNDHOUSE_ADMIN_KEY", "sk-rh-" + secrets.token_urlsafe(32))
    (folder / "import").mkdir(exist_ok=True)
    (folder / "store").mkdir(exist_ok=True)
    log = folder / f"gateway-{port}.log"
    settings = {
        "DATABASE_URL": database,
        "AMQP_URL": vhost.amqp_url,
        "REDIS_URL": redis_db,
        "HTTP_PORT": str(port),
        "OPS_PORT": str(ops_port),
        "ROUNDHOUSE_ADMIN_KEY": admin_key,
        "ROUNDHOUSE_MODEL_STORE": str(folder / "store"),
        "ROUNDHOUSE_FILE_STORE": str(folder / "files"),
        "ROUNDHOUSE_MODEL_IMPORT_DIR": str(folder / "import"),
        "DRAIN_TIMEOUT_S": "2",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.gateway"],
            cwd=ROOT,
            env=os.environ | settings | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Service(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ops_port}", admin_key, log)


@pytest.fixture
def service(
    database: str, vhost: Vhost, redis_db: str, tmp_path: Path, servers: Servers
) -> Iterator[Service]:
    running = start(database, vhost, redis_db, tmp_path)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(10)


async def test_the_service_starts_serves_and_stops(service: Service, database: str) -> None:
    async with aiohttp.ClientSession() as session:
        await service.wait_until_ready(session)
        headers = {"Authorization": f"Bearer {service.admin_key}"}
        async with session.get(f"{service.base}/v1/models", headers=headers) as reply:
            assert (reply.status, await reply.json()) == (200, {"object": "list", "data": []})
        async with session.get(f"{service.base}/api/team", headers=headers) as reply:
            assert (await reply.json())["slug"] == "platform"
        body = {"model": "nothing", "messages": [{"role": "user", "content": "hi"}]}
        async with session.post(f"{service.base}/v1/chat/completions", json=body, headers=headers) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (404, "model_not_found")
        document = await every_route_needs_a_key(service, session)
        assert {"/v1/chat/completions", "/models/{team}/{model}/completions", "/api/resources"} <= document[
            "paths"
        ].keys()
        async with session.get(f"{service.ops}/metrics") as reply:
            metrics = await reply.text()
        assert "http_server_request_duration" in metrics
        assert 'http_route="/v1/chat/completions"' in metrics
        async with session.get(f"{service.base}/metrics") as reply:
            assert reply.status == 404
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 0, service.log.read_text()
    log = service.log.read_text()
    assert service.admin_key not in log
    assert "Traceback" not in log
    connection = await asyncpg.connect(database)
    assert await connection.fetchval("SELECT count(*) FROM gateway.teams WHERE is_platform") == 1
    await connection.close()


async def every_route_needs_a_key(service: Service, session: aiohttp.ClientSession) -> dict[str, Any]:
    async with session.get(f"{service.base}/openapi.json") as reply:
        document: dict[str, Any] = await reply.json()
    checked = 0
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if operation.get("security") == []:
                continue
            target = service.base + path.replace("{", "x").replace("}", "x")
            async with session.request(method.upper(), target) as reply:
                assert reply.status == 401, (method, path)
                checked += 1
    assert checked >= 25
    assert PUBLIC not in str(document["components"]["securitySchemes"])
    return document


async def test_a_new_admin_key_replaces_the_old_one(
    service: Service, database: str, vhost: Vhost, redis_db: str, tmp_path: Path
) -> None:
    async with aiohttp.ClientSession() as session:
        await service.wait_until_ready(session)
        other = start(database, vhost, redis_db, tmp_path)
        try:
            await other.wait_until_ready(session)
            for key, status in ((service.admin_key, 401), (other.admin_key, 200)):
                async with session.get(
                    f"{other.base}/api/team", headers={"Authorization": f"Bearer {key}"}
                ) as reply:
                    assert reply.status == status
        finally:
            other.process.kill()
            other.process.wait(10)


def test_bad_settings_are_listed_and_stop_the_start() -> None:
    environment = {"PATH": os.environ["PATH"], "OPS_PORT": "x", "AMQP_URL": "amqp://localhost"}
    done = subprocess.run(
        [sys.executable, "-m", "services.gateway", "--check-settings"], cwd=ROOT, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 78
    for name in ("OPS_PORT", "DATABASE_URL", "REDIS_URL", "ROUNDHOUSE_ADMIN_KEY", "ROUNDHOUSE_MODEL_STORE"):
        assert name in done.stderr
