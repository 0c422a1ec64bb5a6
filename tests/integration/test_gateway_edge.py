from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.gateway.edge import EdgeLimits, build_app
from services.gateway.routes import RouteSpec
from tests.edge_server import KEY, MANAGE_KEY, EdgeServer, MemoryKeyring, read_answer, running_edge


@pytest.fixture
async def edge() -> AsyncIterator[EdgeServer]:
    async with running_edge() as server:
        yield server


AUTH = f"Authorization: Bearer {KEY}\r\n".encode()
JSON = b"Content-Type: application/json\r\n"


def post(*lines: bytes, body: bytes = b"{}", version: bytes = b"1.1") -> bytes:
    return (
        b"POST /v1/echo HTTP/"
        + version
        + b"\r\n"
        + b"".join(line + b"\r\n" for line in lines)
        + b"\r\n"
        + body
    )


BROKEN_HTTP = {
    "length and chunked": post(b"Host: a", b"Content-Length: 2", b"Transfer-Encoding: chunked"),
    "two lengths": post(b"Host: a", b"Content-Length: 2", b"Content-Length: 2"),
    "two hosts": post(b"Host: a", b"Host: b", b"Content-Length: 2"),
    "no host": post(b"Content-Length: 2"),
    "negative length": post(b"Host: a", b"Content-Length: -1"),
    "folded header": post(b"Host: a", b"X: a", b" b", b"Content-Length: 2"),
    "space before colon": post(b"Host: a", b"X : a", b"Content-Length: 2"),
    "NUL in header": post(b"Host: a", b"X: a\x00b", b"Content-Length: 2"),
    "unknown coding": post(b"Host: a", b"Transfer-Encoding: xchunked"),
    "line feeds only": b"POST /v1/echo HTTP/1.1\nHost: a\n\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "long URL": b"GET /" + b"a" * 65536 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "long header": post(b"Host: a", b"X: " + b"a" * 16384),
    "many headers": post(b"Host: a", *[b"X-%d: 1" % i for i in range(5000)]),
}


@pytest.mark.parametrize("request_bytes", BROKEN_HTTP.values(), ids=BROKEN_HTTP.keys())
async def test_broken_http_is_refused_in_json_without_repeating_it(
    edge: EdgeServer, request_bytes: bytes
) -> None:
    answer = await edge.raw(request_bytes)
    assert answer.status == 400
    assert answer.code in ("bad_http", "header_too_large")
    assert answer.headers["x-request-id"].startswith("req_")
    assert "server" not in answer.headers
    assert b"aaaa" not in answer.body and b"xchunked" not in answer.body
    assert edge.handled == []


async def test_bad_chunks_are_refused(edge: EdgeServer) -> None:
    request = post(
        b"Host: a", AUTH.strip(), JSON.strip(), b"Transfer-Encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"
    )
    answer = await edge.raw(request)
    assert (answer.status, answer.code) == (400, "bad_http")


@pytest.mark.parametrize(
    "host", [b"", b'a"b', b"a;id", b"a/b", b"u@a", b"a:x", b"a:700000", b"[::1", b"[x]", b"a b", b"\xc3\xa9"]
)
async def test_a_host_that_is_none_is_refused(edge: EdgeServer, host: bytes) -> None:
    answer = await edge.raw(post(b"Host: " + host, AUTH.strip(), JSON.strip(), b"Content-Length: 2"))
    assert (answer.status, answer.code) == (400, "bad_http")


@pytest.mark.parametrize("host", [b"a", b"a-b.example:8080", b"my_service", b"127.0.0.1:80", b"[::1]:8080"])
async def test_every_way_to_write_a_host_is_served(edge: EdgeServer, host: bytes) -> None:
    answer = await edge.raw(post(b"Host: " + host, AUTH.strip(), JSON.strip(), b"Content-Length: 2"))
    assert answer.status == 200


async def test_http_1_0_has_no_transfer_encoding(edge: EdgeServer) -> None:
    request = post(
        b"Host: a",
        AUTH.strip(),
        JSON.strip(),
        b"Transfer-Encoding: chunked",
        body=b"2\r\n{}\r\n0\r\n\r\n",
        version=b"1.0",
    )
    answer = await edge.raw(request)
    assert (answer.status, answer.code) == (400, "bad_http")


KEYS = [
    ({}, 401, "missing_api_key"),
    ({"Authorization": "Basic YTpi"}, 401, "invalid_api_key"),
    ({"Authorization": "Bearer"}, 401, "invalid_api_key"),
    ({"Authorization": "Bearer "}, 401, "invalid_api_key"),
    ({"Authorization": f"Bearer {KEY} {KEY}"}, 401, "invalid_api_key"),
    ({"Authorization": f"Bearer\t{KEY}"}, 401, "invalid_api_key"),
    ({"Authorization": "Bearer sk-rh-" + "x" * 43}, 401, "invalid_api_key"),
    ({"Authorization": "Bearer schl\xfcssel"}, 401, "invalid_api_key"),
    ({"Authorization": f"Bearer {MANAGE_KEY}"}, 403, "insufficient_scope"),
]


@pytest.mark.parametrize(("headers", "status", "code"), KEYS)
async def test_a_request_without_a_right_key_is_refused(
    edge: EdgeServer, headers: dict[str, str], status: int, code: str
) -> None:
    answer = await edge.call("POST", "/v1/echo", b"{}", headers=headers, key=None)
    assert (answer.status, answer.code) == (status, code)
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert edge.handled == []


async def test_two_authorization_headers_are_refused(edge: EdgeServer) -> None:
    answer = await edge.raw(b"GET /api/plain HTTP/1.1\r\nHost: a\r\n" + AUTH + AUTH + b"\r\n")
    assert (answer.status, answer.code) == (400, "duplicate_header")


async def test_a_key_in_the_query_is_no_key(edge: EdgeServer) -> None:
    answer = await edge.call("GET", f"/api/plain?api_key={KEY}", key=None)
    assert (answer.status, answer.code) == (401, "missing_api_key")


BODIES: list[tuple[dict[str, str], bytes, int, str]] = [
    ({"Content-Type": "text/plain"}, b"{}", 415, "unsupported_media_type"),
    ({"Content-Type": "multipart/form-data"}, b"{}", 415, "unsupported_media_type"),
    ({"Content-Type": ""}, b"{}", 415, "unsupported_media_type"),
    ({"Content-Type": "application/json; charset=utf-16"}, b"{}", 415, "unsupported_media_type"),
    ({"Content-Encoding": "gzip"}, gzip.compress(b"{}"), 415, "unsupported_encoding"),
    ({"Content-Encoding": "gzip"}, gzip.compress(b" " * 10_000_000), 415, "unsupported_encoding"),
    ({"Content-Length": str(1024 * 1024 + 1)}, b"{}", 413, "request_too_large"),
    ({}, b'{"a":' * 100_000, 400, "json_too_deep"),
    ({}, b'{"a": NaN}', 400, "invalid_json"),
    ({}, b'{"a": "\\ud800"}', 400, "invalid_unicode"),
    ({}, b"\xff", 400, "invalid_encoding"),
    ({"Expect": "foo"}, b"{}", 417, "expectation_failed"),
]


@pytest.mark.parametrize(("headers", "body", "status", "code"), BODIES)
async def test_a_bad_body_is_refused(
    edge: EdgeServer, headers: dict[str, str], body: bytes, status: int, code: str
) -> None:
    answer = await edge.call("POST", "/v1/echo", body, headers=headers)
    assert (answer.status, answer.code) == (status, code)


@pytest.mark.parametrize(
    "content_type",
    ["application/json", 'Application/JSON; charset="UTF-8"', "application/json;charset=utf-8"],
)
async def test_json_in_utf_8_is_read(edge: EdgeServer, content_type: str) -> None:
    answer = await edge.call(
        "POST", "/v1/echo", '{"a": "ü"}'.encode(), headers={"Content-Type": content_type}
    )
    assert (answer.status, answer.json) == (200, {"got": {"a": "ü"}, "team": "acme"})


async def test_the_largest_body_is_read_and_one_byte_more_is_not(edge: EdgeServer) -> None:
    body = b'{"a": "' + b"x" * (1024 * 1024 - 9) + b'"}'
    assert (await edge.call("POST", "/v1/echo", body)).status == 200
    chunked = b"%x\r\n" % (len(body) + 1) + body + b" \r\n0\r\n\r\n"
    answer = await edge.raw(
        post(b"Host: a", AUTH.strip(), JSON.strip(), b"Transfer-Encoding: chunked", body=chunked)
    )
    assert (answer.status, answer.code) == (413, "request_too_large")


async def test_a_body_that_does_not_come_is_given_up() -> None:
    async with running_edge(EdgeLimits(body_deadline_s=0.2)) as edge:
        answer = await edge.raw(
            post(b"Host: a", AUTH.strip(), JSON.strip(), b"Content-Length: 10", body=b'{"a"')
        )
        assert (answer.status, answer.code) == (408, "request_timeout")


PATHS = [
    ("GET", "/nothing", 404, "not_found", "problem"),
    ("GET", "/v1/nothing", 404, "not_found", "error"),
    ("GET", "/models/a/b/completions", 404, "not_found", "error"),
    ("GET", "/api/plain/", 404, "not_found", "problem"),
    ("GET", "//api/plain", 404, "not_found", "problem"),
    ("GET", "/v1/../api/plain", 404, "not_found", "error"),
    ("GET", "/v1/%2e%2e/api/plain", 404, "not_found", "error"),
    ("GET", "/api/plain%00", 404, "not_found", "problem"),
    ("GET", "/v1/echo", 405, "method_not_allowed", "error"),
    ("TRACE", "/api/plain", 405, "method_not_allowed", "problem"),
    ("OPTIONS", "/api/plain", 405, "method_not_allowed", "problem"),
]


@pytest.mark.parametrize(("method", "path", "status", "code", "shape"), PATHS)
async def test_unknown_paths_and_methods_are_refused_in_the_paths_shape(
    edge: EdgeServer, method: str, path: str, status: int, code: str, shape: str
) -> None:
    answer = await edge.call(method, path)
    assert (answer.status, answer.code) == (status, code)
    assert ("error" in answer.json) == (shape == "error")
    assert answer.headers["content-type"].startswith(
        "application/json" if shape == "error" else "application/problem+json"
    )
    assert ("allow" in answer.headers) == (status == 405)
    assert edge.handled == []


async def test_a_method_override_is_ignored(edge: EdgeServer) -> None:
    answer = await edge.call("GET", "/v1/echo", headers={"X-HTTP-Method-Override": "POST"})
    assert answer.status == 405


@pytest.mark.parametrize("path", ["/v1/bug", "/api/bug"])
async def test_a_bug_is_a_500_that_tells_nothing(edge: EdgeServer, path: str) -> None:
    answer = await edge.call("GET", path)
    assert (answer.status, answer.code) == (500, "internal_error")
    assert b"secret" not in answer.body and b"KeyError" not in answer.body


async def test_a_refusal_carries_its_headers(edge: EdgeServer) -> None:
    answer = await edge.call("GET", "/v1/refuse")
    assert answer.status == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json == {
        "error": {"message": "Full.", "type": "rate_limit_error", "param": "model", "code": "queue_full"}
    }


async def test_a_bug_in_mid_answer_breaks_the_connection(edge: EdgeServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(b"GET /v1/break HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n")
    received = b""
    try:
        async with asyncio.timeout(5):
            received = await reader.read()
    except ConnectionResetError:
        pass
    finally:
        writer.close()
    assert received.count(b"HTTP/1.1") <= 1
    assert not received.endswith(b"0\r\n\r\n")


async def test_every_answer_has_our_id_and_safe_headers(edge: EdgeServer) -> None:
    for path in ("/livez", "/api/plain", "/nothing", "/v1/bug", "/v1/refuse"):
        answer = await edge.call("GET", path, headers={"X-Request-Id": "theirs-1"})
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["x-client-request-id"] == "theirs-1"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("theirs", ["a b", "http://x/", "x" * 65, "ä"])
async def test_an_odd_request_id_is_not_repeated(edge: EdgeServer, theirs: str) -> None:
    answer = await edge.call("GET", "/livez", headers={"X-Request-Id": theirs})
    assert "x-client-request-id" not in answer.headers


@pytest.mark.parametrize("trace", ["garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "00-" + "a" * 5000])
async def test_a_malformed_traceparent_changes_nothing(edge: EdgeServer, trace: str) -> None:
    assert (await edge.call("GET", "/livez", headers={"traceparent": trace})).status == 200


async def test_a_client_that_goes_cancels_its_handler(edge: EdgeServer) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(b"GET /v1/wait HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n")
    while "waiting" not in edge.handled:
        await asyncio.sleep(0.01)
    writer.close()
    async with asyncio.timeout(3):
        await edge.cancelled.wait()


async def test_a_stop_lets_running_requests_finish_within_its_time() -> None:
    async with running_edge(drain_timeout_s=2.0) as edge:
        running = asyncio.ensure_future(edge.call("GET", "/v1/short"))
        while "short" not in edge.handled:
            await asyncio.sleep(0.01)
        await edge.runner.cleanup()
        assert (await running).status == 200
        with pytest.raises(ConnectionRefusedError):
            await edge.call("GET", "/livez")


async def test_a_stop_cancels_what_runs_longer_than_its_time() -> None:
    async with running_edge(drain_timeout_s=0.2) as edge:
        running = asyncio.ensure_future(edge.call("GET", "/v1/wait"))
        while "waiting" not in edge.handled:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(3):
            await edge.runner.cleanup()
        assert edge.cancelled.is_set()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await running


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX-1: 1\r\n"])
async def test_headers_that_do_not_come_close_the_connection(sent: bytes) -> None:
    async with running_edge(header_deadline_s=0.3) as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(sent)
        assert await read_to_end(reader) == b""
        writer.close()


async def test_the_header_deadline_holds_for_later_requests_on_a_connection() -> None:
    async with running_edge(header_deadline_s=0.3) as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await read_answer(reader)).status == 200
        await asyncio.sleep(0.5)  # idle between requests is fine
        writer.write(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await read_answer(reader)).status == 200
        writer.write(b"GET /livez HTTP/1.1\r\nHo")
        assert await read_to_end(reader) == b""
        writer.close()


async def test_a_slow_body_is_no_slow_header() -> None:
    async with running_edge(header_deadline_s=0.2) as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(post(b"Host: a", AUTH.strip(), JSON.strip(), b"Content-Length: 4", body=b"{"))
        for part in (b" ", b" ", b"}"):
            await asyncio.sleep(0.15)
            writer.write(part)
        assert (await read_answer(reader)).status == 200
        writer.close()


async def test_connections_of_one_address_are_bounded() -> None:
    async with running_edge(max_per_peer=2) as edge:
        held = [await asyncio.open_connection("127.0.0.1", edge.port) for _ in range(2)]
        await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        assert await read_to_end(reader) == b""
        writer.close()
        held[0][1].close()
        await asyncio.sleep(0.1)
        assert (await edge.call("GET", "/livez")).status == 200
        held[1][1].close()


async def test_only_our_hosts_are_served_when_they_are_named() -> None:
    async with running_edge(EdgeLimits(allowed_hosts=frozenset({"api.example"}))) as edge:
        assert (await edge.call("GET", "/livez", headers={"Host": "api.example:8080"})).status == 200
        assert (await edge.call("GET", "/livez", headers={"Host": "evil.example"})).code == "bad_host"
        absolute = b"GET http://evil.example/livez HTTP/1.1\r\nHost: api.example\r\n\r\n"
        assert (await edge.raw(absolute)).code == "bad_host"


async def test_a_route_without_a_scope_stops_the_start() -> None:
    async def handler(_request: Any) -> Any: ...

    spec = RouteSpec(method="GET", path="/x", handler=handler, scope=None, summary="x", error_shape="problem")
    with pytest.raises(ValueError, match="no scope"):
        build_app([spec], MemoryKeyring(), EdgeLimits())
