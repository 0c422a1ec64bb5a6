"""`/api/resources/{resource_id}/models`: which models a resource's workers hold, and what their swaps cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    TEAM_QUERY,
    ManagementDeps,
    acting_team,
    listing,
    not_found,
    page_of,
    path_id,
    timestamp,
)
from services.gateway.principal import ModelView
from services.gateway.routes import MANAGE, RouteSpec
from services.gateway.store import Row


class ResourceModels:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = deps.views
        self._routes = deps.routes

    def routes(self) -> list[RouteSpec]:
        return [
            schemas.route(
                "GET", "/api/resources/{resource_id}/models", self.list_page, MANAGE,
                "The models that may run there: where each is resident, and what its swaps took",
                answers={200: schemas.page(schemas.RESOURCE_MODEL)}, query=PAGE_QUERY | TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def list_page(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        resource = await self._views.resource(team.team_id, path_id(request, "resource_id"))
        if resource is None:
            raise not_found()
        models = self._routes.models_that_may_run(team.slug, resource["model_type"], pool=resource["pool"])
        shown = [model for model in models if model.model_id > page.after][: page.limit + 1]
        places = await self._views.places([resource["resource_id"]])
        rows = await self._views.worker_models(
            resource["resource_id"], [model.model_id for model in shown[: page.limit]]
        )
        by_model: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_model[row["model_id"]].append(row)
        return listing(
            shown,
            page,
            lambda model: model_json(model, places, by_model[model.model_id]),
            lambda model: model.model_id,
        )


def model_json(model: ModelView, places: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
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
        "weight_bytes": row["weight_bytes"] if row else 0,
        "swaps": row["loads"] if row else 0,
        "swap_ms_p50": row["load_ms_p50"] if row and row["loads"] else None,
        "swap_ms_p95": row["load_ms_p95"] if row and row["loads"] else None,
        "hits": row["hits"] if row else 0,
        "misses": row["misses"] if row else 0,
        "changed_at": timestamp(row["changed_at"]) if row else None,
    }
