"""`/api/models/{model_id}/revisions`: other weights under the same name. New requests get the current one, jobs keep theirs."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from msgspec import UNSET

from services.gateway.edge import read_json
from services.gateway.management import schemas
from services.gateway.management.acting import (
    TEAM_QUERY,
    Acting,
    ManagementDeps,
    acting_team,
    answer,
    not_found,
    path_id,
    timestamp,
)
from services.gateway.management.bodies import AddRevision, parse
from services.gateway.management.idempotency import idempotent
from services.gateway.management.models import (
    base_gone,
    base_json,
    base_url,
    find_base,
    find_model,
    model_answer,
    pinned,
)
from services.gateway.management.sources import Sources
from services.gateway.model_import import SourceFolder
from services.gateway.model_registry import BaseGone, ModelGone, NewRevision
from services.gateway.revision_rules import REVISIONS_PER_MODEL
from services.gateway.routes import MANAGE, RouteSpec
from services.gateway.store import LimitReached, Row
from shared.inference.errors import ApiError, bad_request
from shared.inference.principal import ModelView
from shared.model_folder import ModelManifest


class Revisions:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._registry = deps.models
        self._routes = deps.routes
        self._importer = deps.importer
        self._sources = Sources(deps)
        self._public_url = deps.public_url

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        path = "/api/models/{model_id}/revisions"
        return [
            schemas.route(
                "POST", path, once(self.add), MANAGE, "Register other weights under the same name", AddRevision,
                {201: schemas.MODEL}, query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", path, self.list_all, MANAGE, "The revisions that may be chosen, newest first",
                answers={200: schemas.page(schemas.REVISION)}, query=TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def add(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        model = await find_model(self._registry, team, request)
        body = parse(await read_json(request), AddRevision)
        base = await self._base(team, model, body)
        async with self._sources.opened(team, body) as source, self._importer.one_at_a_time:
            manifest = await self._importer.check(source, base.folder if base else None)
            _require_same_type(model, manifest, source)
            await self._add(team, model.model_id, manifest, source, base)
        await self._routes.refresh_if_possible()
        changed = await find_model(self._registry, team, request)
        return model_answer(changed, base_url(request, self._public_url), 201)

    async def _base(self, team: Acting, model: ModelView, body: AddRevision) -> ModelView | None:
        """Of an adapter: the base as it is now, whether it is named or stays. Raises `ApiError` 400."""
        if model.base is not None:
            wanted = model.base.model_id if body.base is UNSET else body.base
            return await find_base(self._registry, team, wanted)
        if body.base is not UNSET:
            message = "The model has weights of its own; an adapter is registered under another name."
            raise bad_request("not_an_adapter", message, "base")
        return None

    async def _add(
        self,
        team: Acting,
        model_id: str,
        manifest: ModelManifest,
        source: SourceFolder,
        base: ModelView | None,
    ) -> None:
        stored = ""
        kept = False
        try:
            number = await self._registry.next_revision(team.team_id, model_id)
            stored = f"{model_id}/{number}"
            await self._importer.take(source, manifest, stored)
            await self._registry.add_revision(
                team.team_id,
                NewRevision(
                    model_id, number, stored, manifest.to_json(), manifest.context_tokens, pinned(base)
                ),
            )
            kept = True
        except ModelGone as error:
            raise not_found() from error
        except BaseGone as error:
            raise base_gone() from error
        except LimitReached as error:
            message = f"A model keeps {REVISIONS_PER_MODEL} revisions, and adapters stand on all old ones."
            raise ApiError(409, "too_many_revisions", message) from error
        finally:
            if stored and not kept:
                await self._importer.remove(stored)

    async def list_all(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        rows = await self._registry.revisions(team.team_id, path_id(request, "model_id"))
        if not rows:
            raise not_found()
        return answer({"data": [_revision_json(row) for row in rows], "next_cursor": None})


def _require_same_type(model: ModelView, manifest: ModelManifest, source: SourceFolder) -> None:
    # Resources, prices and URLs of the name are those of its type.
    if manifest.signature != model.signature:
        message = f"The model is of the type '{model.model_type}'; this folder holds another type."
        raise bad_request("model_type_mismatch", message, source.param)


def _revision_json(row: Row) -> dict[str, Any]:
    return {
        "revision": row["revision"],
        "current": row["is_current"],
        "context_tokens": row["context_tokens"],
        "size_bytes": row["size_bytes"],
        "base": base_json(row["base_model_id"], row["base_name"], row["base_revision"]),
        "created_at": timestamp(row["created_at"]),
    }
