"""The broker's management HTTP API, as far as users of the teams' vhost need it. The same on RabbitMQ 3.10 and 4.x."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import aiohttp
from yarl import URL

from shared.outcomes import Unavailable
from shared.topology import Rights

TIMEOUT_S = 10.0
HASHING = "rabbit_password_hashing_sha256"


class ManagementApi:
    """Every call raises `Unavailable` when the API does not answer, or not as it should."""

    def __init__(self, base_url: str, session: aiohttp.ClientSession) -> None:
        self._base_url, self._session = base_url, session

    @classmethod
    async def open(cls, url: str, stack: AsyncExitStack) -> ManagementApi:
        """url: with an administrator's user and password."""
        parts = urlsplit(url)
        user = aiohttp.BasicAuth(unquote(parts.username or ""), unquote(parts.password or ""), "utf-8")
        base_url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/") + "/api"
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), auth=user)
        return cls(base_url, await stack.enter_async_context(session))

    async def make_vhost(self, vhost: str) -> bool:
        """Return whether it is new. Idempotent."""
        return await self._call("PUT", ("vhosts", vhost), {}) == 201

    async def limit_vhost(self, vhost: str, limit: str, value: int) -> None:
        await self._call("PUT", ("vhost-limits", vhost, limit), {"value": value})

    async def users(self) -> dict[str, str]:
        """Return the password hash of each user of the broker."""
        return {
            str(each["name"]): str(each.get("password_hash", "")) for each in await self._list(("users",))
        }

    async def rights(self, vhost: str) -> dict[str, Rights]:
        """Return what each user may do in the vhost; those without any rights there are left out."""
        rows = await self._list(("vhosts", vhost, "permissions"))
        return {
            str(row["user"]): Rights(str(row["configure"]), str(row["write"]), str(row["read"]))
            for row in rows
        }

    async def put_user(self, name: str, password_hash: str) -> None:
        """A user without tags: no management API, no monitoring."""
        body = {"password_hash": password_hash, "hashing_algorithm": HASHING, "tags": ""}
        await self._call("PUT", ("users", name), body)

    async def limit_user(self, name: str, limit: str, value: int) -> None:
        await self._call("PUT", ("user-limits", name, limit), {"value": value})

    async def put_rights(self, vhost: str, name: str, rights: Rights) -> None:
        body = {"configure": rights.configure, "write": rights.write, "read": rights.read}
        await self._call("PUT", ("permissions", vhost, name), body)

    async def delete_user(self, name: str) -> None:
        """The broker closes the user's connections. Idempotent."""
        await self._call("DELETE", ("users", name), None)

    async def _list(self, path: tuple[str, ...]) -> list[dict[str, Any]]:
        status, document = await self._ask("GET", path, None)
        if status != 200 or not isinstance(document, list):
            raise Unavailable(f"the broker's management API answers {status} to {'/'.join(path)}")
        return document

    async def _call(self, method: str, path: tuple[str, ...], body: Mapping[str, Any] | None) -> int:
        status, _ = await self._ask(method, path, body)
        if not (200 <= status < 300 or (method == "DELETE" and status == 404)):
            raise Unavailable(f"the broker's management API answers {status} to {'/'.join(path[:2])}")
        return status

    async def _ask(
        self, method: str, path: tuple[str, ...], body: Mapping[str, Any] | None
    ) -> tuple[int, Any]:
        # Encoded by hand: a vhost named with a slash has to reach the broker as %2F.
        url = URL("/".join((self._base_url, *(quote(part, safe="") for part in path))), encoded=True)
        try:
            async with self._session.request(method, url, json=body, allow_redirects=False) as reply:
                return reply.status, (await reply.json() if reply.status == 200 else None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise Unavailable(f"the broker's management API: {type(error).__name__}") from error
