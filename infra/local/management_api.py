"""A small client of the public management API, for set-up: one method per verb, lists read to their end."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PAGE_SIZE = 100


class ApiError(Exception):
    """The API refused, or could not be reached (`status` 0). The text is fit for the user."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"{detail} ({status} {code})" if status else detail)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class ManagementApi:
    """base_url: the gateway's. A team given to a call is acted for, which only the platform's key may."""

    base_url: str
    key: str = field(repr=False)
    timeout_s: float = 30.0

    def get(self, path: str, **query: str) -> dict[str, Any]:
        return self._call("GET", path, query, None)

    def post(self, path: str, body: Mapping[str, Any] | None = None, **query: str) -> dict[str, Any]:
        return self._call("POST", path, query, body or {})

    def put(self, path: str, body: Mapping[str, Any], **query: str) -> dict[str, Any]:
        return self._call("PUT", path, query, body)

    def patch(self, path: str, body: Mapping[str, Any], **query: str) -> dict[str, Any]:
        return self._call("PATCH", path, query, body)

    def delete(self, path: str, **query: str) -> dict[str, Any]:
        return self._call("DELETE", path, query, None)

    def list(self, path: str, **query: str) -> Iterator[dict[str, Any]]:
        """Every item, page after page."""
        cursor: str | None = None
        while True:
            page = self.get(path, limit=str(PAGE_SIZE), **query, **({"cursor": cursor} if cursor else {}))
            yield from page["data"]
            cursor = page.get("next_cursor")
            if not cursor:
                return

    def _call(
        self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        target = path + ("?" + urllib.parse.urlencode(query) if query else "")
        headers = {"Authorization": f"Bearer {self.key}", "Accept": "application/json"}
        payload = None
        if body is not None:
            payload = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        address = urllib.parse.urlsplit(self.base_url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=self.timeout_s)
        try:
            connection.request(method, target, payload, headers)
            answer = connection.getresponse()
            raw = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(
                0, "unreachable", f"{method} {path}: the gateway does not answer: {error}"
            ) from error
        finally:
            connection.close()
        try:
            decoded = json.loads(raw) if raw else {}
        except ValueError as error:
            raise ApiError(answer.status, "not_json", f"{method} {path}: the answer is not JSON") from error
        if answer.status >= 300:
            raise _refusal(answer.status, f"{method} {path}", decoded)
        if not isinstance(decoded, dict):
            raise ApiError(
                answer.status, "not_an_object", f"{method} {path}: the answer is not a JSON object"
            )
        return decoded


def _refusal(status: int, what: str, decoded: Any) -> ApiError:
    """From a problem document of `/api`, or an error object of `/v1`."""
    problem = decoded if isinstance(decoded, dict) else {}
    error = problem.get("error")
    if isinstance(error, dict):
        return ApiError(status, str(error.get("code")), f"{what}: {error.get('message')}")
    return ApiError(
        status,
        str(problem.get("code")),
        f"{what}: {problem.get('detail') or problem.get('title') or 'refused'}",
    )
