"""`/api/keys`: a secret is shown once, when it is made; lists show its first characters."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from services.gateway import keys
from services.gateway.edge import read_json
from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    TEAM_QUERY,
    ManagementDeps,
    acting_team,
    answer,
    listing,
    not_found,
    page_of,
    path_id,
    timestamp,
)
from services.gateway.management.bodies import CreateKey, parse
from services.gateway.management.idempotency import idempotent
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec, principal_of
from services.gateway.store import KEYS_PER_TEAM, LimitReached, Row
from shared.inference.errors import ApiError, bad_request


class Keys:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._cache = deps.keys

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        return [
            schemas.route(
                "POST", "/api/keys", once(self.create), MANAGE, "Make a key; its secret is shown only now", CreateKey,
                {201: schemas.KEY_WITH_SECRET}, query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", "/api/keys", self.list_page, MANAGE, "List valid keys", answers={200: schemas.page(schemas.KEY)},
                query=PAGE_QUERY | TEAM_QUERY,
            ),
            schemas.route(
                "DELETE", "/api/keys/{key_id}", self.revoke, MANAGE, "Revoke a key, within five seconds everywhere",
                answers={204: None}, query=TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def create(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        body = parse(await read_json(request), CreateKey)
        if len(set(body.scopes)) != len(body.scopes):
            raise bad_request("invalid_value", "scopes names one twice.", "scopes")
        if PLATFORM in body.scopes and not (PLATFORM in principal_of(request).scopes and team.is_platform):
            raise ApiError(403, "insufficient_scope", "Only the platform makes keys with the scope platform.")
        secret = keys.make_secret()
        new = keys.new_key(team.team_id, body.name, secret, tuple(body.scopes))
        try:
            row = await self._store.add_key(new)
        except LimitReached as error:
            message = f"A team may have {KEYS_PER_TEAM} valid keys; revoke one first."
            raise ApiError(409, "too_many_keys", message) from error
        self._cache.forget(new.secret_sha256)
        return answer(_key_json(row) | {"secret": secret}, 201)

    async def list_page(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        rows = await self._store.keys(team.team_id, page.after, page.limit + 1)
        return listing(rows, page, _key_json, lambda row: row["key_id"])

    async def revoke(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        digest = await self._store.revoke_key(team.team_id, path_id(request, "key_id"))
        if digest is None:
            raise not_found()
        self._cache.forget(digest)
        return web.Response(status=204)


def _key_json(row: Row) -> dict[str, Any]:
    return {
        "key_id": row["key_id"],
        "name": row["name"],
        "prefix": row["prefix"],
        "scopes": sorted(row["scopes"]),
        "created_at": timestamp(row["created_at"]),
    }
