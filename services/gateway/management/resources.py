"""`/api/resources`: the team's GPUs. The scheduler owns them: this reads its views and sends it commands."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from services.gateway.commands import refusal
from services.gateway.edge import read_json
from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    TEAM_QUERY,
    Acting,
    ManagementDeps,
    acting_team,
    answer,
    invalid_cursor,
    is_bound_to,
    listing,
    not_found,
    page_of,
    path_id,
    timestamp,
)
from services.gateway.management.bodies import CreateResource, ScaleResource, SetScaling, parse
from services.gateway.management.credit import require_credit
from services.gateway.management.idempotency import command_envelope, idempotent
from services.gateway.management.models import base_url, url_and_snippet
from services.gateway.management.options import option_json
from services.gateway.management.scaling import bounds_of, command_windows, costs_more, scaling_json
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec, principal_of
from services.gateway.store import Row
from shared import messages, topology
from shared.inference.errors import ApiError, bad_request
from shared.inference.principal import ModelView

NEWEST = 2**62
MOST_ALARMS = 100
_Switch = (
    messages.TurnOnResource
    | messages.TurnOffResource
    | messages.DeleteResource
    | messages.ScaleResource
    | messages.SetScaling
)


class Resources:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = deps.views
        self._routes = deps.routes
        self._commands = deps.commands
        self._public_url = deps.public_url

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        one = "/api/resources/{resource_id}"
        return [
            schemas.route(
                "POST", "/api/resources", once(self.create), MANAGE, "Add a resource", CreateResource,
                {201: schemas.RESOURCE}, query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", "/api/resources", self.list_page, MANAGE, "List the team's resources",
                answers={200: schemas.page(schemas.RESOURCE)}, query=PAGE_QUERY | TEAM_QUERY,
            ),
            schemas.route(
                "GET", one, self.get, MANAGE, "One resource: state, places, models",
                answers={200: schemas.RESOURCE}, query=TEAM_QUERY,
            ),
            schemas.route(
                "PATCH", one, self.scale, MANAGE, "Set the number of GPUs", ScaleResource, {200: schemas.RESOURCE},
                query=TEAM_QUERY,
            ),
            schemas.route(
                "PUT", f"{one}/scaling", self.set_scaling, MANAGE, "Set autoscaling, bounds and windows", SetScaling,
                {200: schemas.RESOURCE}, query=TEAM_QUERY,
            ),
            schemas.route(
                "DELETE", one, self.delete, MANAGE, "Remove a resource that is off", answers={204: None},
                query=TEAM_QUERY,
            ),
            schemas.route(
                "POST", f"{one}/on", once(self.turn_on), MANAGE, "Turn on", answers={202: schemas.RESOURCE},
                query=TEAM_QUERY,
            ),
            schemas.route(
                "POST", f"{one}/off", once(self.turn_off), MANAGE, "Turn off: what runs is finished",
                answers={202: schemas.RESOURCE}, query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", f"{one}/decisions", self.decisions, MANAGE, "What the scheduler decided, newest first",
                answers={200: schemas.page(schemas.DECISION)}, query=PAGE_QUERY | TEAM_QUERY,
            ),
            schemas.route(
                "GET", f"{one}/alarms", self.alarms, MANAGE, "Models that were found damaged, newest first",
                answers={200: schemas.page(schemas.MODEL_ALARM)}, query=TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def create(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        body = parse(await read_json(request), CreateResource)
        if body.pool and not (PLATFORM in principal_of(request).scopes and team.is_platform):
            raise ApiError(403, "insufficient_scope", "Only the platform adds shared pools.", param="pool")
        option = await self._views.option(body.model_type, body.option)
        if option is None:
            raise bad_request("unknown_option", "The model type has no such performance option.", "option")
        command = messages.CreateResource(
            **await command_envelope(request, self._commands),
            team_id=team.team_id,
            name=body.name,
            model_type=body.model_type,
            option_id=option["option_id"],
            fixed_count=body.gpus,
            pool=body.pool,
        )
        result = await self._commands.call(topology.SCHEDULER_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        return await self._answer(request, team, str(result.body["resource_id"]), 201)

    async def list_page(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        rows = await self._views.resources(team.team_id, page.after, page.limit + 1)
        places = await self._places(rows)
        return listing(
            rows,
            page,
            lambda row: self._json(request, team, row, places[row["resource_id"]]),
            lambda row: row["resource_id"],
        )

    async def get(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        return await self._answer(request, team, path_id(request, "resource_id"), 200)

    async def scale(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        resource_id = path_id(request, "resource_id")
        body = parse(await read_json(request), ScaleResource)
        row = await self._row(team, resource_id)
        is_bound_to(request, settings_tag(row))
        if body.gpus > row["max_count"]:
            await require_credit(self._views, team.team_id)
        command = messages.ScaleResource(
            **await command_envelope(request, self._commands),
            team_id=team.team_id,
            resource_id=resource_id,
            fixed_count=body.gpus,
        )
        await self._change(command)
        return await self._answer(request, team, resource_id, 200)

    async def set_scaling(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        resource_id = path_id(request, "resource_id")
        body = parse(await read_json(request), SetScaling)
        least, most = bounds_of(body)
        windows = command_windows(body)
        row = await self._row(team, resource_id)
        is_bound = is_bound_to(request, settings_tag(row))
        if costs_more(row, least, most, windows):
            await require_credit(self._views, team.team_id)
        command = messages.SetScaling(
            **await command_envelope(request, self._commands),
            team_id=team.team_id,
            resource_id=resource_id,
            autoscaling=body.autoscaling,
            min_count=least,
            max_count=most,
            idle_timeout_s=body.idle_timeout_s,
            when_asleep=body.when_asleep,
            target_wait_s=body.target_wait_s,
            windows=windows,
            if_version=int(row["scaling_version"]) if is_bound else None,
        )
        await self._change(command)
        return await self._answer(request, team, resource_id, 200)

    async def turn_on(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        resource_id = path_id(request, "resource_id")
        await self._row(team, resource_id)
        await require_credit(self._views, team.team_id)
        envelope = await command_envelope(request, self._commands)
        await self._change(messages.TurnOnResource(**envelope, team_id=team.team_id, resource_id=resource_id))
        return await self._answer(request, team, resource_id, 202)

    async def turn_off(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        resource_id = path_id(request, "resource_id")
        await self._row(team, resource_id)
        envelope = await command_envelope(request, self._commands)
        await self._change(
            messages.TurnOffResource(**envelope, team_id=team.team_id, resource_id=resource_id)
        )
        return await self._answer(request, team, resource_id, 202)

    async def delete(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        resource_id = path_id(request, "resource_id")
        await self._row(team, resource_id)
        envelope = await command_envelope(request, self._commands)
        await self._change(messages.DeleteResource(**envelope, team_id=team.team_id, resource_id=resource_id))
        return web.Response(status=204)

    async def decisions(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        resource_id = path_id(request, "resource_id")
        page = page_of(request)
        if page.after and not (page.after.isdecimal() and len(page.after) <= 18):
            raise invalid_cursor()
        await self._row(team, resource_id)
        rows = await self._views.decisions(resource_id, int(page.after or NEWEST), page.limit + 1)
        return listing(
            rows,
            page,
            lambda row: {
                "decision_id": row["decision_id"],
                "decided_at": timestamp(row["decided_at"]),
                "action": row["action"],
                "words": row["words"],
            },
            lambda row: str(row["decision_id"]),
        )

    async def alarms(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        resource_id = path_id(request, "resource_id")
        await self._row(team, resource_id)
        rows = await self._views.model_alarms(resource_id, MOST_ALARMS)
        data = [
            {
                "model_id": row["model_id"],
                "revision": row["revision"],
                "worker_id": row["worker_id"],
                "reason": row["reason"],
                "found_at": timestamp(row["found_at"]),
            }
            for row in rows
        ]
        return answer({"data": data, "next_cursor": None})

    async def _change(self, command: _Switch) -> None:
        result = await self._commands.call(topology.SCHEDULER_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        await self._routes.refresh_if_possible()

    async def _row(self, team: Acting, resource_id: str) -> Row:
        row = await self._views.resource(team.team_id, resource_id)
        if row is None:
            raise not_found()
        return row

    async def _places(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        by_resource: dict[str, list[Row]] = defaultdict(list)
        for place in await self._views.places([row["resource_id"] for row in rows]):
            by_resource[place["resource_id"]].append(place)
        return by_resource

    async def _answer(
        self, request: web.Request, team: Acting, resource_id: str, status: int
    ) -> web.Response:
        row, _ = await asyncio.gather(self._row(team, resource_id), self._routes.refresh_if_possible())
        places = await self._places([row])
        return answer(
            self._json(request, team, row, places[resource_id]), status, {"ETag": settings_tag(row)}
        )

    def _json(self, request: web.Request, team: Acting, row: Row, places: list[Row]) -> dict[str, Any]:
        models = self._routes.models_of_type(team.slug, row["model_type"])
        base = base_url(request, self._public_url)
        return resource_json(row, places, models, base)


def settings_tag(row: Row) -> str:
    """Return the ETag of what people set. The state moves by itself and is no part of it."""
    text = f"{row['resource_id']}\n{row['scaling_version']}\n{row['fixed_count']}\n{row['wanted']}"
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:16]}"'


def resource_json(row: Row, places: list[Row], models: list[ModelView], base: str) -> dict[str, Any]:
    """Return a resource as `/api` shows it."""
    return {
        "resource_id": row["resource_id"],
        "name": row["name"],
        "model_type": row["model_type"],
        "option": option_json(row),
        "pool": row["pool"],
        "gpus": row["fixed_count"],
        "wanted": row["wanted"],
        "state": row["state"],
        "indicator": "green" if row["state"] == "live" else "grey",
        "reason": row["reason"],
        "expected_live_at": timestamp(row["expected_live_at"]),
        "live_gpus": row["live_count"],
        "places": [
            {
                "place": place["place"],
                "state": place["state"],
                "phase": place["phase"],
                "device": place["device"],
                "node_id": place["node_id"],
                "worker_id": place["worker_id"],
                "granted_at": timestamp(place["granted_at"]),
                "ready_at": timestamp(place["ready_at"]),
            }
            for place in places
        ],
        "models": [
            {
                "model_id": model.model_id,
                "name": model.full_name,
                "revision": model.revision,
                **url_and_snippet(model, base),
            }
            for model in models
        ],
        "scaling": scaling_json(row),
        "created_at": timestamp(row["created_at"]),
        "changed_at": timestamp(row["changed_at"]),
    }
