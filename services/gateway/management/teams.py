"""`/api/teams` for the platform, `/api/team` for a team itself."""

from __future__ import annotations

from aiohttp import web
from msgspec import UNSET

from services.gateway.edge import read_json
from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    TEAM_QUERY,
    ManagementDeps,
    acting_team,
    answer,
    listing,
    page_of,
    query_of,
    team_json,
)
from services.gateway.management.bodies import ChangeTeam, CreateTeam, parse
from services.gateway.management.idempotency import idempotent
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec
from services.gateway.store import NameTaken
from shared.ids import new_id
from shared.inference.errors import ApiError


class Teams:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        return [
            schemas.route(
                "POST", "/api/teams", once(self.create), PLATFORM, "Make a team", CreateTeam, {201: schemas.TEAM}
            ),
            schemas.route(
                "GET", "/api/teams", self.list_page, PLATFORM, "List teams", answers={200: schemas.page(schemas.TEAM)},
                query=PAGE_QUERY,
            ),
            schemas.route(
                "GET", "/api/team", self.get, MANAGE, "The team acted for", answers={200: schemas.TEAM}, query=TEAM_QUERY
            ),
            schemas.route(
                "PATCH", "/api/team", self.change, MANAGE, "Change the team", ChangeTeam, {200: schemas.TEAM},
                query=TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def create(self, request: web.Request) -> web.Response:
        query_of(request)
        body = parse(await read_json(request), CreateTeam)
        try:
            row = await self._store.add_team(new_id("team"), body.slug, body.name, body.ppt_fallback)
        except NameTaken as error:
            raise ApiError(409, "name_taken", "There is a team with this slug.", param="slug") from error
        return answer(team_json(row), 201)

    async def list_page(self, request: web.Request) -> web.Response:
        page = page_of(request)
        rows = await self._store.teams(page.after, page.limit + 1)
        return listing(rows, page, team_json, lambda row: row["team_id"])

    async def get(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        row = await self._store.team(team.team_id)
        if row is None:
            raise RuntimeError("the team of a valid key is gone")
        return answer(team_json(row))

    async def change(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        body = parse(await read_json(request), ChangeTeam)
        row = await self._store.change_team(
            team.team_id,
            None if body.name is UNSET else body.name,
            None if body.ppt_fallback is UNSET else body.ppt_fallback,
        )
        return answer(team_json(row))
