"""`/api/models` and `/api/model-types`: registration, URLs and snippets."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from services.gateway.edge import read_json
from services.gateway.errors import ApiError, bad_request
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
    query_of,
)
from services.gateway.management.bodies import RegisterModel, parse
from services.gateway.management.idempotency import idempotent
from services.gateway.principal import ModelView
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec, principal_of
from services.gateway.store import MODELS_PER_TEAM, LimitReached, NameTaken, NewModel
from shared.ids import new_id
from shared.model_folder import ModelManifest


class Models:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._routes = deps.routes
        self._importer = deps.importer
        self._public_url = deps.public_url

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        return [
            schemas.route(
                "POST", "/api/models", once(self.register), MANAGE, "Register a model folder", RegisterModel,
                {201: schemas.MODEL}, query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", "/api/models", self.list_page, MANAGE, "List the team's models",
                answers={200: schemas.page(schemas.MODEL)}, query=PAGE_QUERY | TEAM_QUERY,
            ),
            schemas.route(
                "GET", "/api/models/{model_id}", self.get, MANAGE, "One model", answers={200: schemas.MODEL},
                query=TEAM_QUERY,
            ),
            schemas.route(
                "DELETE", "/api/models/{model_id}", self.delete, MANAGE, "Remove a model", answers={204: None},
                query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", "/api/model-types", self.types, MANAGE, "List model types",
                answers={200: schemas.page(schemas.MODEL_TYPE)},
            ),
        ]  # fmt: skip

    async def register(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        body = parse(await read_json(request), RegisterModel)
        if await self._store.has_model_named(team.team_id, body.name):
            raise _name_taken()
        folder = self._importer.find(body.path)
        async with self._importer.one_at_a_time:
            manifest = await self._importer.check(folder)
            model_type = await self._type_for(
                manifest, body.model_type, PLATFORM in principal_of(request).scopes
            )
            model = await self._add(team, body.name, manifest, folder)
        await self._routes.refresh_if_possible()
        return answer(model_json(model, self.base_url(request)) | {"model_type": model_type}, 201)

    async def _type_for(self, manifest: ModelManifest, named: str | None, may_name: bool) -> str:
        """Return the name of the manifest's type, made if it is new. Raises `ApiError`:

        1. The type is known: a given name must be its name.
        2. The type is new: the platform may name it; for everyone else its name is derived.
        3. A name belongs to one type.
        """
        known = await self._store.model_type(manifest.signature)
        if known is not None:  # 1
            if named not in (None, known):
                raise bad_request("model_type_mismatch", f"The model is of the type '{known}'.", "model_type")
            return known
        if named is not None and not may_name:  # 2
            raise ApiError(
                403, "insufficient_scope", "Only the platform names a new model type.", param="model_type"
            )
        name = named or derived_type_name(manifest)
        try:
            return await self._store.ensure_model_type(
                manifest.signature, name, manifest.architecture, manifest.parameter_count
            )
        except NameTaken as error:  # 3
            message = "Another model type has this name."
            raise ApiError(409, "name_taken", message, param="model_type") from error

    async def _add(self, team: Acting, name: str, manifest: ModelManifest, folder: Any) -> ModelView:
        model_id = new_id("mod")
        kept = False
        try:
            stored = await self._importer.take(folder, manifest, model_id, 1)
            await self._store.add_model(
                NewModel(
                    model_id,
                    team.team_id,
                    name,
                    manifest.signature,
                    stored,
                    manifest.to_json(),
                    manifest.context_tokens,
                )
            )
            kept = True
        except NameTaken as error:
            raise _name_taken() from error
        except LimitReached as error:
            message = f"A team may have {MODELS_PER_TEAM} models; delete one first."
            raise ApiError(409, "too_many_models", message) from error
        finally:
            if not kept:
                await self._importer.remove(model_id)
        model = await self._store.model(team.team_id, model_id)
        if model is None:
            raise RuntimeError("a model that was just registered is gone")
        return model

    async def list_page(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        models = await self._store.models_of(team.team_id, page.after, page.limit + 1)
        base = self.base_url(request)
        return listing(models, page, lambda model: model_json(model, base), lambda model: model.model_id)

    async def get(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        model = await self._store.model(team.team_id, path_id(request, "model_id"))
        if model is None:
            raise not_found()
        return answer(model_json(model, self.base_url(request)))

    async def delete(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        if not await self._store.delete_model(team.team_id, path_id(request, "model_id")):
            raise not_found()
        await self._routes.refresh_if_possible()
        return web.Response(status=204)

    async def types(self, request: web.Request) -> web.Response:
        query_of(request)
        rows = await self._store.model_types()
        return answer({"data": [dict(row) for row in rows], "next_cursor": None})

    def base_url(self, request: web.Request) -> str:
        return base_url(request, self._public_url)


def base_url(request: web.Request, public_url: str | None) -> str:
    """Return what the API's URLs begin with: as configured, or as this client reached us."""
    return (public_url or f"{request.scheme}://{request.headers.get('Host', 'localhost')}").rstrip("/")


def derived_type_name(manifest: ModelManifest) -> str:
    """Return e.g. `llama-135m-1a2b3c`: architecture, size, and a bit of the signature so that it is unique."""
    architecture = manifest.architecture.removesuffix("ForCausalLM").lower()
    count = manifest.parameter_count
    if count >= 10**9:
        size = f"{count / 1e9:.1f}b".replace(".0b", "b")
    else:
        size = f"{round(count / 1e6)}m" if count >= 10**6 else f"{max(1, round(count / 1e3))}k"
    return f"{architecture}-{size}-{manifest.signature[:6]}"


def model_json(model: ModelView, base: str) -> dict[str, Any]:
    return {
        "model_id": model.model_id,
        "name": model.full_name,
        "revision": model.revision,
        "model_type": model.model_type,
        "signature": model.signature,
        "context_tokens": model.context_tokens,
        **url_and_snippet(model, base),
    }


def url_and_snippet(model: ModelView, base: str) -> dict[str, str]:
    """Return the model's own URL, and a call of it to paste into a shell."""
    url = f"{base}/models/{model.full_name}/completions"
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 32})
    snippet = (
        f'curl {url} \\\n  -H "Authorization: Bearer $ROUNDHOUSE_API_KEY" \\\n'
        f"  -H 'Content-Type: application/json' \\\n  -d '{body}'"
    )
    return {"url": url, "snippet": snippet}


def _name_taken() -> ApiError:
    return ApiError(409, "name_taken", "The team has a model with this name.", param="name")
