"""`/api/queue-credentials`: users of the teams' vhost. A secret is shown once; only its salted hash leaves this process."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
import time
from typing import Any

from aiohttp import web

from services.gateway.commands import refusal
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
from services.gateway.management.bodies import CreateQueueCredential, parse
from services.gateway.management.idempotency import idempotent
from services.gateway.routes import MANAGE, RouteSpec, principal_of
from services.gateway.store import Row
from shared import messages, topology
from shared.topology import TeamNames

SECRET_BYTES = 32
SALT_BYTES = 4
READY_WAIT_S = 5.0
READY_LOOK_S = 0.1


class QueueCredentials:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store, self._commands, self._door = deps.store, deps.commands, deps.queue

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        path, one = "/api/queue-credentials", "/api/queue-credentials/{credential_id}"
        shown_once = {201: schemas.QUEUE_CREDENTIAL_WITH_SECRET}
        return [
            schemas.route(
                "POST", path, once(self.create), MANAGE, "Make a user of the queue; its secret is shown only now",
                CreateQueueCredential, shown_once, query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", path, self.list_page, MANAGE, "List users of the queue",
                answers={200: schemas.page(schemas.QUEUE_CREDENTIAL)}, query=PAGE_QUERY | TEAM_QUERY,
            ),
            schemas.route(
                "GET", one, self.get, MANAGE, "One user of the queue", answers={200: schemas.QUEUE_CREDENTIAL},
                query=TEAM_QUERY,
            ),
            schemas.route(
                "POST", one + "/rotate", once(self.rotate), MANAGE,
                "Give it another secret, shown only now; open connections are closed", answers=shown_once, query=TEAM_QUERY,
            ),
            schemas.route(
                "DELETE", one, self.revoke, MANAGE, "Revoke it: connections are closed, its reply queue goes",
                answers={204: None}, query=TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def create(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        body = parse(await read_json(request), CreateQueueCredential)
        secret = secrets.token_urlsafe(SECRET_BYTES)
        # An id of its own each time: the kept answer to an earlier command would go with an earlier secret.
        command = messages.CreateQueueCredential(
            **self._envelope(request),
            team_id=team.team_id,
            key_id=principal_of(request).key_id,
            name=body.name,
            password_hash=broker_hash(secret),
        )
        result = await self._call(command)
        return await self._made(team.team_id, str(result.body["credential_id"]), secret)

    async def rotate(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        credential_id = str((await self._one(request, team.team_id))["credential_id"])
        secret = secrets.token_urlsafe(SECRET_BYTES)
        command = messages.RotateQueueCredential(
            **self._envelope(request),
            team_id=team.team_id,
            credential_id=credential_id,
            password_hash=broker_hash(secret),
        )
        await self._call(command)
        return await self._made(team.team_id, credential_id, secret)

    async def list_page(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        rows = await self._door.views.credentials(team.team_id, page.after, page.limit + 1)
        return listing(rows, page, self._json, lambda row: row["credential_id"])

    async def get(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        return answer(self._json(await self._one(request, team.team_id)))

    async def revoke(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        command = messages.RevokeQueueCredential(
            **self._envelope(request),
            team_id=team.team_id,
            credential_id=str((await self._one(request, team.team_id))["credential_id"]),
        )
        await self._call(command)
        return web.Response(status=204)

    async def _one(self, request: web.Request, team_id: str) -> Row:
        row = await self._door.views.credential(team_id, path_id(request, "credential_id"))
        if row is None:
            raise not_found()
        return row

    def _envelope(self, request: web.Request) -> dict[str, Any]:
        made = self._commands.envelope(principal_of(request).key_id)
        return {
            "command_id": made.command_id,
            "deadline_unix_ms": made.deadline_unix_ms,
            "reply_queue": made.reply_queue,
            "actor": made.actor,
        }

    async def _call(self, command: messages.QueueCredentialCommand) -> messages.CommandResult:
        result = await self._commands.call(topology.BATCH_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        return result

    async def _made(self, team_id: str, credential_id: str, secret: str) -> web.Response:
        """Answer when the broker has it, which takes a moment; or soon, with `ready` false, when that is away."""
        deadline_s = time.monotonic() + READY_WAIT_S
        while True:
            row = await self._door.views.credential(team_id, credential_id)
            if row is None:
                raise not_found()  # revoked meanwhile
            if row["ready"] or time.monotonic() > deadline_s:
                return answer(self._json(row) | {"secret": secret}, 201)
            await asyncio.sleep(READY_LOOK_S)

    def _json(self, row: Row) -> dict[str, Any]:
        names = TeamNames(row["tag"])
        return {
            "credential_id": row["credential_id"],
            "name": row["name"],
            "url": self._door.url,
            "vhost": self._door.vhost,
            "username": row["credential_id"],
            "exchange": names.submit_exchange,
            "reply_queue": names.replies(row["name"]).name,
            "refusals_queue": names.refusals.name,
            "key_id": row["key_id"],
            "created_at": timestamp(row["created_at"]),
            "rotated_at": timestamp(row["rotated_at"]),
            "ready": row["ready"],
        }


def broker_hash(secret: str) -> str:
    """A secret as RabbitMQ keeps it. The secret is random and long: a fast hash with a short salt is enough for it."""
    salt = secrets.token_bytes(SALT_BYTES)
    return base64.b64encode(salt + hashlib.sha256(salt + secret.encode()).digest()).decode()
