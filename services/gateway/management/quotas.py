"""`/api/quota`: how many GPUs a team may have at once. The scheduler counts them; the platform sets them."""

from __future__ import annotations

from aiohttp import web

from services.gateway.commands import refusal
from services.gateway.edge import read_json
from services.gateway.management import schemas
from services.gateway.management.acting import TEAM_QUERY, Acting, ManagementDeps, acting_team, answer
from services.gateway.management.bodies import ChangeQuota, parse
from services.gateway.management.idempotency import command_envelope
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec
from shared import messages, topology


class Quotas:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = deps.views
        self._commands = deps.commands

    def routes(self) -> list[RouteSpec]:
        return [
            schemas.route(
                "GET", "/api/quota", self.get, MANAGE, "How many GPUs the team may have at once",
                answers={200: schemas.QUOTA}, query=TEAM_QUERY,
            ),
            schemas.route(
                "PUT", "/api/quota", self.change, PLATFORM, "Set how many GPUs a team, each, or all may have at once",
                ChangeQuota, {200: schemas.QUOTA}, query=TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def get(self, request: web.Request) -> web.Response:
        return await self._answer(await acting_team(request, self._store))

    async def change(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        body = parse(await read_json(request), ChangeQuota)
        command = messages.SetQuota(
            **await command_envelope(request, self._commands),
            scope=team.team_id if body.of == "team" else body.of,
            places=body.places,
        )
        result = await self._commands.call(topology.SCHEDULER_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        return await self._answer(team)

    async def _answer(self, team: Acting) -> web.Response:
        row = await self._views.quota(team.team_id)
        return answer({"places": row["places"], "taken": row["taken"], "own": row["own"]})
