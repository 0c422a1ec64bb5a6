"""Uploads of models over HTTP: whole or not there, bounded, resumable by file, swept when they are forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.gateway.model_uploads import UploadLimits
from tests.conftest import Vhost
from tests.gateway_harness import Gateway, Reply, running_gateway
from tests.model_folders import make_folder

MIB = 1024 * 1024
FILE = b"0123456789" * 1000


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as running:
        yield running


def limit(gateway: Gateway, **changes: Any) -> None:
    limits = dataclasses.replace(gateway.uploads.limits, **changes)
    object.__setattr__(gateway.uploads, "limits", limits)


async def open_upload(gateway: Gateway, key: str) -> str:
    reply = await gateway.call("POST", "/api/models/uploads", key=key)
    assert reply.status == 201, reply.body
    return f"/api/models/uploads/{reply.json['upload_id']}"


async def put(gateway: Gateway, path: str, name: str, body: bytes, key: str) -> Reply:
    return await gateway.call("PUT", f"{path}/files/{name}", body, key=key)


async def put_folder(gateway: Gateway, path: str, folder: Path, key: str) -> None:
    for file in folder.iterdir():
        reply = await put(gateway, path, file.name, file.read_bytes(), key)
        assert (reply.status, reply.json["sha256"]) == (200, hashlib.sha256(file.read_bytes()).hexdigest())


def on_disk(gateway: Gateway) -> list[str]:
    root = gateway.model_store / ".uploads"
    return sorted(
        str(p.relative_to(root).as_posix()).split("/", 1)[1] for p in root.rglob("*") if p.is_file()
    )


async def rows(gateway: Gateway) -> int:
    count: int = await gateway.sql.fetchval("SELECT count(*) FROM gateway.upload_files")
    return count


async def begin_put(
    gateway: Gateway, path: str, name: str, key: str, length: int, first: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send the head of a PUT and the first bytes of its body; wait until they are on the disk."""
    host, port = gateway.base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"PUT {path}/files/{name} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {length}\r\n\r\n"
    )
    writer.write(head.encode() + first)
    await writer.drain()
    async with asyncio.timeout(20):
        while not list((gateway.model_store / ".uploads").rglob("parts/*")):
            await asyncio.sleep(0.01)
    return reader, writer


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_a_model_comes_by_http_and_is_registered(gateway: Gateway, tmp_path: Path) -> None:
    key = await gateway.make_team("acme")
    folder = make_folder(tmp_path / "mine")
    path = await open_upload(gateway, key)
    await put_folder(gateway, path, folder, key)
    shown = (await gateway.call("GET", path, key=key)).json
    assert [(f["name"], f["size_bytes"]) for f in shown["files"]] == [
        (p.name, p.stat().st_size) for p in sorted(folder.iterdir())
    ]
    body = {"name": "tiny", "upload_id": shown["upload_id"]}
    reply = await gateway.call("POST", "/api/models", body, key=key)
    assert reply.status == 201, reply.body
    stored = gateway.model_store / reply.json["model_id"] / "1"
    for file in folder.iterdir():
        assert (stored / file.name).read_bytes() == file.read_bytes()
    # The upload ended with it
    assert (await gateway.call("GET", path, key=key)).status == 404
    assert (await rows(gateway), list((gateway.model_store / ".uploads").iterdir())) == (0, [])
    again = await gateway.call("POST", "/api/models", body | {"name": "other"}, key=key)
    assert (again.status, again.code, again.json["param"]) == (400, "unknown_upload", "upload_id")
    # And another revision in the same way
    path = await open_upload(gateway, key)
    await put_folder(gateway, path, folder, key)
    revisions = f"/api/models/{reply.json['model_id']}/revisions"
    reply = await gateway.call("POST", revisions, {"upload_id": path.rsplit("/", 1)[1]}, key=key)
    assert (reply.status, reply.json["revision"]) == (201, 2)


async def test_a_refused_upload_stays_to_be_mended(gateway: Gateway, tmp_path: Path) -> None:
    key = await gateway.make_team("acme")
    folder = make_folder(tmp_path / "mine")
    path = await open_upload(gateway, key)
    body = {"name": "tiny", "upload_id": path.rsplit("/", 1)[1]}
    reply = await gateway.call("POST", "/api/models", body, key=key)
    assert (reply.status, reply.code, reply.json["param"]) == (400, "missing_file", "upload_id")
    await put_folder(gateway, path, folder, key)
    assert (await put(gateway, path, "config.json", b"{}", key)).status == 200
    reply = await gateway.call("POST", "/api/models", body, key=key)
    assert (reply.status, reply.code, reply.json["param"]) == (400, "invalid_config", "upload_id")
    # One file again, the rest is there
    assert (await put(gateway, path, "config.json", (folder / "config.json").read_bytes(), key)).status == 200
    assert (await gateway.call("DELETE", f"{path}/files/generation_config.json", key=key)).status == 204
    assert (await gateway.call("DELETE", f"{path}/files/generation_config.json", key=key)).status == 404
    reply = await gateway.call("POST", "/api/models", body, key=key)
    assert reply.status == 201, reply.body
    assert not (gateway.model_store / reply.json["model_id"] / "1" / "generation_config.json").exists()


async def test_a_file_that_is_cut_leaves_nothing_and_what_was_there(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    path = await open_upload(gateway, key)
    _, writer = await begin_put(gateway, path, "model.safetensors", key, 10 * MIB, b"x" * 2 * MIB)
    assert await rows(gateway) == 1
    writer.transport.abort()

    async def gone() -> bool:
        return await rows(gateway) == 0 and on_disk(gateway) == []

    await eventually(gone)
    assert (await put(gateway, path, "model.safetensors", FILE, key)).status == 200
    _, writer = await begin_put(gateway, path, "model.safetensors", key, 10 * MIB, b"x" * 2 * MIB)
    writer.transport.abort()

    async def as_before() -> bool:
        return await rows(gateway) == 1 and on_disk(gateway) == ["files/model.safetensors"]

    await eventually(as_before)
    (file,) = (await gateway.call("GET", path, key=key)).json["files"]
    assert (file["size_bytes"], file["sha256"]) == (len(FILE), hashlib.sha256(FILE).hexdigest())
    assert gateway.uploads._coming.total() == 0


async def test_a_file_that_stops_coming_is_given_up(gateway: Gateway) -> None:
    limit(gateway, idle_s=1.0)
    key = await gateway.make_team("acme")
    path = await open_upload(gateway, key)
    reader, writer = await begin_put(gateway, path, "model.safetensors", key, 10 * MIB, b"x" * 100)
    async with asyncio.timeout(20):
        answer = await reader.readuntil(b"request_timeout")
    writer.close()
    assert answer.startswith(b"HTTP/1.1 408")
    assert (await rows(gateway), on_disk(gateway)) == (0, [])


async def test_of_two_that_send_one_file_the_last_to_begin_has_it(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    path = await open_upload(gateway, key)
    reader, writer = await begin_put(gateway, path, "model.safetensors", key, len(FILE), FILE[:-1])
    assert (await put(gateway, path, "model.safetensors", b"the later", key)).status == 200
    writer.write(FILE[-1:])
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 409")
    writer.close()
    (file,) = (await gateway.call("GET", path, key=key)).json["files"]
    assert file["size_bytes"] == len(b"the later")
    assert on_disk(gateway) == ["files/model.safetensors"]


@pytest.mark.parametrize(
    ("name", "length", "status", "code"),
    [
        ("weights.bin", 1, 400, "unsafe_model_file"),
        ("model.py", 1, 400, "unsafe_model_file"),
        ("..%2f..%2fconfig.json", 1, 400, "unsafe_model_file"),
        (".hidden.safetensors", 1, 400, "unsafe_model_file"),
        ("a%00.safetensors", 1, 400, "unsafe_model_file"),
        ("a" * 200 + ".safetensors", 1, 400, "unsafe_model_file"),
        ("%F0%9F%98%80.safetensors", 1, 400, "unsafe_model_file"),
        ("config.json", MIB + 1, 413, "model_too_large"),
        ("tokenizer.json", 64 * MIB + 1, 413, "model_too_large"),
    ],
)
async def test_names_and_sizes_are_those_of_a_model_folder(
    gateway: Gateway, name: str, length: int, status: int, code: str
) -> None:
    key = await gateway.make_team("acme")
    path = await open_upload(gateway, key)
    reply = await put(gateway, path, name, b"x" * length, key)
    assert (reply.status, reply.code, reply.json["param"]) == (status, code, "name")
    assert (await rows(gateway), on_disk(gateway)) == (0, [])


async def test_a_body_without_a_length_is_refused(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    path = await open_upload(gateway, key)

    async def body() -> AsyncIterator[bytes]:
        yield b"{}"

    headers = {"Authorization": f"Bearer {key}"}
    url = f"{gateway.base}{path}/files/config.json"
    async with gateway.session.put(url, data=body(), headers=headers) as reply:
        assert (reply.status, (await reply.json())["code"]) == (411, "length_required")


async def test_only_this_route_takes_large_bodies(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    path = await open_upload(gateway, key)
    assert (await put(gateway, path, "model.safetensors", b"x" * 2 * MIB, key)).status == 200
    reply = await gateway.call("POST", "/api/models", b" " * 2 * MIB, key=key)
    assert (reply.status, reply.code) == (413, "request_too_large")


async def test_a_team_has_a_bounded_number_of_uploads_and_bytes(gateway: Gateway) -> None:
    limit(gateway, team_uploads=2, team_bytes=3000)
    key, other = await gateway.make_team("acme"), await gateway.make_team("rival")
    one, two = await open_upload(gateway, key), await open_upload(gateway, key)
    refused = await gateway.call("POST", "/api/models/uploads", key=key)
    assert (refused.status, refused.code) == (409, "too_many_uploads")
    assert (await put(gateway, one, "model.safetensors", b"x" * 2000, key)).status == 200
    refused = await put(gateway, two, "model.safetensors", b"x" * 1001, key)
    assert (refused.status, refused.code) == (409, "upload_quota_exceeded")
    # At once, each alone would fit
    limit(gateway, team_uploads=10, team_files_at_once=10)
    more = [await open_upload(gateway, key) for _ in range(8)]
    replies = await asyncio.gather(
        *(put(gateway, path, "model.safetensors", b"x" * 600, key) for path in more)
    )
    assert sorted(reply.status for reply in replies) == [200, *[409] * 7]
    # Others have their own
    theirs = await open_upload(gateway, other)
    assert (await put(gateway, theirs, "model.safetensors", b"x" * 3000, other)).status == 200
    assert (await gateway.call("DELETE", one, key=key)).status == 204
    assert (await put(gateway, two, "model.safetensors", b"x" * 2000, key)).status == 200


async def test_files_at_once_are_bounded(gateway: Gateway) -> None:
    limit(gateway, team_files_at_once=1)
    key, other = await gateway.make_team("acme"), await gateway.make_team("rival")
    path, theirs = await open_upload(gateway, key), await open_upload(gateway, other)
    _, writer = await begin_put(gateway, path, "model.safetensors", key, MIB, b"x")
    refused = await put(gateway, path, "config.json", b"{}", key)
    assert (refused.status, refused.code, "retry-after" in refused.headers) == (429, "too_many_uploads", True)
    assert (await put(gateway, theirs, "config.json", b"{}", other)).status == 200
    limit(gateway, files_at_once=1)
    assert (await put(gateway, theirs, "config.json", b"{}", other)).code == "too_many_uploads"
    writer.transport.abort()

    async def free() -> bool:
        return (await put(gateway, path, "config.json", b"{}", key)).status == 200

    await eventually(free)


async def test_another_teams_upload_is_as_an_unknown_one(gateway: Gateway) -> None:
    mine, theirs = await gateway.make_team("acme"), await gateway.make_team("rival")
    path = await open_upload(gateway, mine)
    assert (await put(gateway, path, "config.json", b"{}", theirs)).status == 404
    assert (await gateway.call("GET", "/api/models/uploads", key=theirs)).json["data"] == []
    body = {"name": "tiny", "upload_id": path.rsplit("/", 1)[1]}
    assert (await gateway.call("POST", "/api/models", body, key=theirs)).code == "unknown_upload"
    assert (await gateway.call("DELETE", path, key=theirs)).status == 404
    assert (await put(gateway, path, "config.json", b"{}", mine)).status == 200


async def test_an_upload_that_is_deleted_while_a_file_comes_leaves_nothing(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    path = await open_upload(gateway, key)
    reader, writer = await begin_put(gateway, path, "model.safetensors", key, len(FILE), FILE[:-1])
    assert (await gateway.call("DELETE", path, key=key)).status == 204
    writer.write(FILE[-1:])
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404")
    writer.close()
    assert (await rows(gateway), on_disk(gateway)) == (0, [])


async def test_what_nobody_registers_is_swept_and_only_that(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    old, kept = await open_upload(gateway, key), await open_upload(gateway, key)
    for path in (old, kept):
        assert (await put(gateway, path, "config.json", b"{}", key)).status == 200
    assert await gateway.uploads.sweep() == []
    old_id = old.rsplit("/", 1)[1]
    await gateway.sql.execute(
        "UPDATE gateway.model_uploads SET expires_at = now() WHERE upload_id = $1", old_id
    )
    # It counts no more although it was not swept yet
    assert (await gateway.call("GET", old, key=key)).status == 404
    assert (await put(gateway, old, "config.json", b"{}", key)).status == 404
    assert await gateway.uploads.sweep() == [old_id]
    assert on_disk(gateway) == ["files/config.json"]
    assert (await gateway.call("GET", kept, key=key)).status == 200
    # Files keep an upload for longer
    before = (await gateway.call("GET", kept, key=key)).json["expires_at"]
    await asyncio.sleep(0.05)
    assert (await put(gateway, kept, "config.json", b"{ }", key)).status == 200
    assert (await gateway.call("GET", kept, key=key)).json["expires_at"] > before


async def test_a_large_file_is_never_in_memory(gateway: Gateway) -> None:
    key = await gateway.make_team("acme")
    path = await open_upload(gateway, key)
    total = 160 * MIB
    piece = b"\0" * (256 * 1024)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(total // len(piece)):
            yield piece

    peak, start = 0, resident_bytes()

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, resident_bytes())
            await asyncio.sleep(0.005)

    headers = {"Authorization": f"Bearer {key}", "Content-Length": str(total)}
    with watching(asyncio.create_task(watch())):
        url = f"{gateway.base}{path}/files/model.safetensors"
        async with gateway.session.put(url, data=body(), headers=headers) as reply:
            assert reply.status == 200
    assert 0 < peak - start < 48 * MIB, f"grew by {(peak - start) / MIB:.0f} MiB"


@contextlib.contextmanager
def watching(task: asyncio.Task[None]) -> Iterator[None]:
    yield
    task.cancel()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_default_limits_hold_the_largest_model() -> None:
    assert UploadLimits().team_bytes >= UploadLimits().folder.total_bytes
