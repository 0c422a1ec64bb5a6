"""`/api/models` and `/api/model-types`: registration, names, URLs and snippets. Other revisions: `revisions.py`."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from aiohttp import web
from msgspec import UNSET

from services.gateway.edge import read_json
from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    TEAM_QUERY,
    Acting,
    ManagementDeps,
    acting_team,
    answer,
    changed_since,
    is_bound_to,
    listing,
    not_found,
    page_of,
    path_id,
    query_of,
)
from services.gateway.management.bodies import ChangeModel, RegisterModel, parse
from services.gateway.management.idempotency import idempotent
from services.gateway.management.sources import Sources
from services.gateway.model_import import SourceFolder
from services.gateway.model_registry import (
    MODELS_PER_TEAM,
    BaseGone,
    HasAdapters,
    ModelGone,
    ModelRegistry,
    NewRevision,
    StaleVersion,
    UnknownRevision,
)
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec, principal_of
from services.gateway.store import LimitReached, NameTaken
from shared.ids import new_id
from shared.inference.errors import ApiError, bad_request
from shared.inference.principal import ModelView
from shared.model_folder import ModelManifest


class Models:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._registry = deps.models
        self._routes = deps.routes
        self._importer = deps.importer
        self._sources = Sources(deps)
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
                "PATCH", "/api/models/{model_id}", self.change, MANAGE, "Rename a model, or choose another revision",
                ChangeModel, {200: schemas.MODEL}, query=TEAM_QUERY,
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
        if await self._registry.has_model_named(team.team_id, body.name):
            raise _name_taken()
        base = None if body.base is UNSET else await find_base(self._registry, team, body.base)
        async with self._sources.opened(team, body) as source, self._importer.one_at_a_time:
            manifest = await self._importer.check(source, base.folder if base else None)
            await self._ensure_type(manifest, body.model_type, PLATFORM in principal_of(request).scopes)
            model = await self._add(team, body.name, manifest, source, base)
        await self._routes.refresh_if_possible()
        return model_answer(model, base_url(request, self._public_url), 201)

    async def _ensure_type(self, manifest: ModelManifest, named: str | None, may_name: bool) -> None:
        """Make the manifest's type, if it is new. Raises `ApiError`:

        1. The type is known: a given name must be its name.
        2. The type is new: the platform may name it; for everyone else its name is derived.
        3. A name belongs to one type.
        """
        known = await self._registry.model_type(manifest.signature)
        if known is not None:  # 1
            if named not in (None, known):
                raise bad_request("model_type_mismatch", f"The model is of the type '{known}'.", "model_type")
            return
        if named is not None and not may_name:  # 2
            raise ApiError(
                403, "insufficient_scope", "Only the platform names a new model type.", param="model_type"
            )
        name = named or derived_type_name(manifest)
        try:
            await self._registry.ensure_model_type(
                manifest.signature, name, manifest.architecture, manifest.parameter_count
            )
        except NameTaken as error:  # 3
            message = "Another model type has this name."
            raise ApiError(409, "name_taken", message, param="model_type") from error

    async def _add(
        self, team: Acting, name: str, manifest: ModelManifest, source: SourceFolder, base: ModelView | None
    ) -> ModelView:
        model_id = new_id("mod")
        kept = False
        try:
            stored = f"{model_id}/1"
            await self._importer.take(source, manifest, stored)
            first = NewRevision(
                model_id, 1, stored, manifest.to_json(), manifest.context_tokens, pinned(base)
            )
            await self._registry.add_model(team.team_id, name, manifest.signature, first)
            kept = True
        except NameTaken as error:
            raise _name_taken() from error
        except BaseGone as error:
            raise base_gone() from error
        except LimitReached as error:
            message = f"A team may have {MODELS_PER_TEAM} models; delete one first."
            raise ApiError(409, "too_many_models", message) from error
        finally:
            if not kept:
                await self._importer.remove(model_id)
        model = await self._registry.model(team.team_id, model_id)
        if model is None:
            raise RuntimeError("a model that was just registered is gone")
        return model

    async def list_page(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        models = await self._registry.models_of(team.team_id, page.after, page.limit + 1)
        base = base_url(request, self._public_url)
        return listing(models, page, lambda model: model_json(model, base), lambda model: model.model_id)

    async def get(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        model = await find_model(self._registry, team, request)
        return model_answer(model, base_url(request, self._public_url))

    async def change(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        model = await find_model(self._registry, team, request)
        body = parse(await read_json(request), ChangeModel)
        seen_version = model.version if is_bound_to(request, model_tag(model)) else None
        try:
            await self._registry.change_model(
                team.team_id,
                model.model_id,
                None if body.name is UNSET else body.name,
                None if body.revision is UNSET else body.revision,
                seen_version,
            )
        except ModelGone as error:
            raise not_found() from error
        except StaleVersion as error:
            raise changed_since() from error
        except UnknownRevision as error:
            message = "The model keeps no such revision."
            raise bad_request("unknown_revision", message, "revision") from error
        except NameTaken as error:
            raise _name_taken() from error
        await self._routes.refresh_if_possible()
        changed = await find_model(self._registry, team, request)
        return model_answer(changed, base_url(request, self._public_url))

    async def delete(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        try:
            await self._registry.delete_model(team.team_id, path_id(request, "model_id"))
        except ModelGone as error:
            raise not_found() from error
        except HasAdapters as error:
            message = "Adapters stand on this model; delete them first."
            raise ApiError(409, "model_has_adapters", message) from error
        await self._routes.refresh_if_possible()
        return web.Response(status=204)

    async def types(self, request: web.Request) -> web.Response:
        query_of(request)
        rows = await self._registry.model_types()
        return answer({"data": [dict(row) for row in rows], "next_cursor": None})


async def find_model(registry: ModelRegistry, team: Acting, request: web.Request) -> ModelView:
    """Return the model that the path names. Raises `ApiError` 404."""
    model = await registry.model(team.team_id, path_id(request, "model_id"))
    if model is None:
        raise not_found()
    return model


async def find_base(registry: ModelRegistry, team: Acting, id_or_name: str) -> ModelView:
    """Return the model that an adapter stands on: its current revision. Raises `ApiError` 400."""
    base = await registry.model_by_name(team.team_id, id_or_name)
    if base is None:
        message = "Neither the team nor the platform has this model."
        raise bad_request("unknown_base", message, "base")
    if base.base is not None:
        raise bad_request("base_is_adapter", "An adapter stands on a model with weights of its own.", "base")
    return base


def pinned(base: ModelView | None) -> tuple[str, int] | None:
    return None if base is None else (base.model_id, base.revision)


def base_gone() -> ApiError:
    message = "The base was deleted, or its revision removed, while the adapter was registered."
    return ApiError(409, "base_gone", message, param="base")


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


def model_tag(model: ModelView) -> str:
    """Return the ETag: another after every change."""
    return f'"{hashlib.sha256(f"{model.model_id} {model.version}".encode()).hexdigest()[:16]}"'


def model_answer(model: ModelView, base: str, status: int = 200) -> web.Response:
    return answer(model_json(model, base), status, {"ETag": model_tag(model)})


def model_json(model: ModelView, base: str) -> dict[str, Any]:
    of = model.base
    return {
        "model_id": model.model_id,
        "name": model.full_name,
        "revision": model.revision,
        "model_type": model.model_type,
        "signature": model.signature,
        "context_tokens": model.context_tokens,
        "base": base_json(of.model_id, of.full_name, of.revision) if of else None,
        **url_and_snippet(model, base),
    }


def base_json(model_id: str | None, name: str, revision: int) -> dict[str, Any] | None:
    """What an adapter stands on; None for a model with weights of its own."""
    return None if model_id is None else {"model_id": model_id, "name": name, "revision": revision}


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
