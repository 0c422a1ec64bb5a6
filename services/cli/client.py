"""The HTTP client of all commands: JSON in and out, pages read to their end, streams read event by event."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from services.cli.settings import Server

PAGE_ITEMS = 100
TIMEOUT_S = 600.0
"""Longer than the gateway's deadline of an answer (300 s): it is the gateway that says that a request took too long."""
MAX_LINE_BYTES = 1 << 20
PIECE_BYTES = 256 * 1024


class CliError(Exception):
    """What the user is told, in one line; the command then ends with exit code 1."""


class ApiClient:
    """Calls of one server, acting for `team` (a slug; only a platform key may name another than its own)."""

    def __init__(self, server: Server, team: str | None = None) -> None:
        parts = urllib.parse.urlsplit(server.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_good_port(parts):
            raise CliError(f"ROUNDHOUSE_URL is not an address: {server.url}")
        if not re.fullmatch(r"[\x21-\x7e]+", server.api_key):
            raise CliError("ROUNDHOUSE_API_KEY has characters that no key has")
        self._parts = parts
        self._key = server.api_key
        self._team = team
        self.url = server.url
        self.default_model = server.model

    def get(self, path: str, **query: str | None) -> dict[str, Any]:
        return self._json("GET", path, query)

    def post(self, path: str, body: Mapping[str, Any] | None = None, **query: str | None) -> dict[str, Any]:
        return self._json("POST", path, query, body or {})

    def post_once(self, path: str, body: Mapping[str, Any], once_key: str) -> dict[str, Any]:
        """Likewise, and the same key again changes nothing more: it is answered as the first time."""
        return self._json("POST", path, {}, body, {"Idempotency-Key": once_key})

    def patch(self, path: str, body: Mapping[str, Any], **query: str | None) -> dict[str, Any]:
        return self._json("PATCH", path, query, body)

    def put(
        self, path: str, body: Mapping[str, Any], if_match: str | None = None, **query: str | None
    ) -> dict[str, Any]:
        """if_match: a tag of `get_tagged`; what was changed since then is not overwritten, but a `CliError`."""
        return self._json("PUT", path, query, body, None if if_match is None else {"If-Match": if_match})

    def get_tagged(self, path: str, **query: str | None) -> tuple[dict[str, Any], str | None]:
        """The document, and the tag that says which version of it this is."""
        with self._open("GET", path, query, None) as answer:
            return _decode(answer.read(), self.url), answer.getheader("ETag")

    def delete(self, path: str) -> None:
        self._json("DELETE", path, {})

    def list(self, path: str, **query: str | None) -> Iterator[dict[str, Any]]:
        """Every item of a list, page after page."""
        cursor: str | None = None
        while True:
            page = self.get(path, limit=str(PAGE_ITEMS), cursor=cursor, **query)
            yield from page["data"]
            cursor = page.get("next_cursor")
            if not cursor:
                return

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of a streamed answer. An error within the stream, or a stream that breaks off, is a `CliError`."""
        with self._open("POST", path, {}, body) as answer:
            while True:
                line = answer.readline(MAX_LINE_BYTES)
                if not line:
                    raise CliError("the stream broke off")
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = _decode(data, self.url)
                if "error" in event:
                    raise CliError(_words_of(event))
                yield event

    def upload(self, path: str, file: Path, fields: Mapping[str, str]) -> dict[str, Any]:
        """Send a file in a form, piece by piece: it may be larger than what fits in memory."""
        boundary = secrets.token_hex(16)
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ]
        name = re.sub(r'[^\x20-\x7e]|["\\]', "_", file.name)
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        head, tail = "".join(parts).encode(), f"\r\n--{boundary}--\r\n".encode()
        try:
            with file.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                headers = {
                    "Content-Type": f"multipart/form-data; boundary={boundary}",
                    "Content-Length": str(len(head) + size + len(tail)),
                }
                with self._send("POST", path, {}, _pieces(head, opened, tail), headers) as answer:
                    raw = answer.read()
        except FileNotFoundError as error:
            raise CliError(f"there is no file {file}") from error
        except IsADirectoryError as error:
            raise CliError(f"{file} is a folder") from error
        return _decode(raw, self.url)

    def download(self, path: str, **query: str | None) -> Iterator[bytes]:
        """The bytes of a file, or of an answer that is no JSON object, in pieces."""
        with self._open("GET", path, query, None) as answer:
            while piece := answer.read(PIECE_BYTES):
                yield piece

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | None],
        body: Mapping[str, Any] | None = None,
        more_headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        with self._open(method, path, query, body, more_headers) as answer:
            raw = answer.read()
        return _decode(raw, self.url) if raw else {}

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | None],
        body: Mapping[str, Any] | None,
        more_headers: Mapping[str, str] | None = None,
    ) -> AbstractContextManager[http.client.HTTPResponse]:
        if body is None:
            return self._send(method, path, query, None, more_headers or {})
        headers = {"Content-Type": "application/json", **(more_headers or {})}
        return self._send(method, path, query, json.dumps(body).encode(), headers)

    @contextmanager
    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | None],
        payload: bytes | Iterator[bytes] | None,
        more_headers: Mapping[str, str],
    ) -> Iterator[http.client.HTTPResponse]:
        asked = {name: value for name, value in query.items() if value is not None}
        if self._team is not None and path.startswith("/api/"):
            asked["team"] = self._team
        target = self._parts.path + path + ("?" + urllib.parse.urlencode(asked) if asked else "")
        headers = {"Authorization": f"Bearer {self._key}", "Accept": "application/json", **more_headers}
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=TIMEOUT_S)
        try:
            connection.request(method, target, payload, headers)
            answer = connection.getresponse()
            if answer.status >= 300:
                raise CliError(_refusal(answer.status, answer.read()))
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise CliError(f"{self.url} cannot be reached: {error}") from error
        finally:
            connection.close()


def _pieces(head: bytes, file: BinaryIO, tail: bytes) -> Iterator[bytes]:
    yield head
    while piece := file.read(PIECE_BYTES):
        yield piece
    yield tail


def _has_good_port(parts: urllib.parse.SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False


def _decode(raw: bytes, url: str) -> dict[str, Any]:
    try:
        decoded = json.loads(raw)
    except ValueError as error:
        raise CliError(f"{url} does not answer as Roundhouse does") from error
    if not isinstance(decoded, dict):
        raise CliError(f"{url} does not answer as Roundhouse does")
    return decoded


def _refusal(status: int, raw: bytes) -> str:
    try:
        document = json.loads(raw)
    except ValueError:
        return f"the server answers with status {status}"
    return _words_of(document) if isinstance(document, dict) else f"the server answers with status {status}"


def _words_of(document: Mapping[str, Any]) -> str:
    """The API's own message, with its code: of a problem (`/api`) or of an error in OpenAI's shape (`/v1`)."""
    inner = document.get("error")
    error = inner if isinstance(inner, dict) else document
    message = error.get("message") or error.get("detail") or error.get("title") or "refused without a reason"
    code = error.get("code")
    return f"{message} ({code})" if code else str(message)
