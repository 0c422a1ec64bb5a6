"""`/api/resources/{resource_id}/models`: which models a resource's workers hold, what their swaps cost, and which stay."""

from __future__ import annotations

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
    listing,
    not_found,
    page_of,
    path_id,
    timestamp,
)
from services.gateway.management.bodies import PinModel, parse
from services.gateway.management.idempotency import command_envelope, idempotent
from services.gateway.routes import MANAGE, RouteSpec
from services.gateway.store import Row
from shared import messages, topology
from shared.inference.principal import ModelView

_Wish = messages.PinModel | messages.UnpinModel | messages.PreloadModel


class ResourceModels:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = deps.views
        self._routes = deps.routes
        self._commands = deps.commands

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        every = "/api/resources/{resource_id}/models"
        one = f"{every}/{{model_id}}"
        return [
            schemas.route(
                "GET", every, self.list_page, MANAGE,
                "The models that may run there: where each is resident, and what its swaps took",
                answers={200: schemas.page(schemas.RESOURCE_MODEL)}, query=PAGE_QUERY | TEAM_QUERY,
            ),
            schemas.route(
                "PUT", f"{one}/pin", self.pin, MANAGE, "Keep a model resident", PinModel,
                {200: schemas.RESOURCE_MODEL}, query=TEAM_QUERY,
            ),
            schemas.route(
                "DELETE", f"{one}/pin", self.unpin, MANAGE, "Let a model come and go again", answers={204: None},
                query=TEAM_QUERY,
            ),
            schemas.route(
                "POST", f"{one}/preload", once(self.preload), MANAGE, "Load a model as soon as no work waits",
                answers={202: schemas.RESOURCE_MODEL}, query=TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def list_page(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        resource = await self._resource(team, request)
        models = self._routes.models_that_may_run(team.slug, resource["model_type"], pool=resource["pool"])
        found = [model for model in models if model.model_id > page.after][: page.limit + 1]
        shown = await self._shown(resource, found[: page.limit])
        return listing(found, page, lambda model: shown[model.model_id], lambda model: model.model_id)

    async def pin(self, request: web.Request) -> web.Response:
        team, resource, model = await self._find(request)
        body = parse(await read_json(request), PinModel)
        command = messages.PinModel(
            **await command_envelope(request, self._commands),
            team_id=team.team_id,
            resource_id=resource["resource_id"],
            model_id=model.model_id,
            copies=None if body.copies == "all" else body.copies,
        )
        return await self._run(command, resource, model, 200)

    async def unpin(self, request: web.Request) -> web.Response:
        team, resource, model = await self._find(request)
        command = messages.UnpinModel(
            **await command_envelope(request, self._commands),
            team_id=team.team_id,
            resource_id=resource["resource_id"],
            model_id=model.model_id,
        )
        await self._run(command, resource, model, 204)
        return web.Response(status=204)

    async def preload(self, request: web.Request) -> web.Response:
        team, resource, model = await self._find(request)
        command = messages.PreloadModel(
            **await command_envelope(request, self._commands),
            team_id=team.team_id,
            resource_id=resource["resource_id"],
            model_id=model.model_id,
        )
        return await self._run(command, resource, model, 202)

    async def _run(self, command: _Wish, resource: Row, model: ModelView, status: int) -> web.Response:
        result = await self._commands.call(topology.SCHEDULER_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        shown = await self._shown(resource, [model])
        return answer(shown[model.model_id], status)

    async def _resource(self, team: Acting, request: web.Request) -> Row:
        resource = await self._views.resource(team.team_id, path_id(request, "resource_id"))
        if resource is None:
            raise not_found()
        return resource

    async def _find(self, request: web.Request) -> tuple[Acting, Row, ModelView]:
        """Raises the 404 for what the team could not name in a request; whether the type fits the scheduler says."""
        team = await acting_team(request, self._store)
        model_id = path_id(request, "model_id")
        resource = await self._resource(team, request)
        await self._routes.refresh_if_possible()
        model = self._routes.model_by_id(team.slug, model_id, pool=resource["pool"])
        if model is None:
            raise not_found()
        return team, resource, model

    async def _shown(self, resource: Row, models: Sequence[ModelView]) -> dict[str, dict[str, Any]]:
        resource_id = resource["resource_id"]
        places, rows, pins = (
            await self._views.places([resource_id]),
            await self._views.worker_models(resource_id, [model.model_id for model in models]),
            {pin["model_id"]: pin for pin in await self._views.model_pins(resource_id)},
        )
        by_model: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_model[row["model_id"]].append(row)
        return {
            model.model_id: model_json(model, places, by_model[model.model_id], pins.get(model.model_id))
            for model in models
        }


def model_json(
    model: ModelView, places: Sequence[Row], rows: Sequence[Row], pin: Row | None
) -> dict[str, Any]:
    """Return a model with one entry for each worker, and more for other revisions that are still there."""
    by_place: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_place[row["place"]].append(row)
    workers = []
    for place in places:
        own = {row["revision"]: row for row in by_place[place["place"]]}
        workers.append(_worker_json(place, model.revision, own.pop(model.revision, None)))
        workers += [
            _worker_json(place, row["revision"], row) for row in own.values() if row["state"] != "absent"
        ]
    return {
        "model_id": model.model_id,
        "name": model.full_name,
        "revision": model.revision,
        "pin": pin and {"copies": pin["copies"] or "all", "pinned_at": timestamp(pin["pinned_at"])},
        "workers": workers,
    }


def _worker_json(place: Row, revision: int, row: Row | None) -> dict[str, Any]:
    return {
        "place": place["place"],
        "worker_id": place["worker_id"],
        "place_state": place["state"],
        "revision": revision,
        "state": row["state"] if row else "absent",
        "reason": row["reason"] if row else "",
        "pinned": bool(row and row["pinned"]),
        "preload": bool(row and row["preload"]),
        "weight_bytes": row["weight_bytes"] if row else 0,
        "swaps": row["loads"] if row else 0,
        "swap_ms_p50": row["load_ms_p50"] if row and row["loads"] else None,
        "swap_ms_p95": row["load_ms_p95"] if row and row["loads"] else None,
        "hits": row["hits"] if row else 0,
        "misses": row["misses"] if row else 0,
        "changed_at": timestamp(row["changed_at"]) if row else None,
    }
