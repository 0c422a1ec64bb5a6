"""What the gateway knows of models and resources: a snapshot that one task renews, and that outlives the database.

Requests read it without waiting. While the database is away they are routed by what was last known.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import structlog

from services.gateway.model_registry import ModelRegistry
from services.gateway.paying import Purse, payment_refusal
from services.gateway.routing import choose_route
from services.gateway.views import Views
from shared.inference.errors import ApiError
from shared.inference.principal import ModelView, Principal, ResourceView, Route
from shared.outcomes import Unavailable

log = structlog.get_logger()

REFRESH_S = 0.5
MAX_MODEL_NAME_CHARS = 150
PLATFORM_SLUG = "platform"

WhenOff = Callable[[str, str, str], Awaitable[int]]
"""`owner.fail_queued(resource_id, code, message)`: ends the jobs that wait for a resource that was turned off."""

ModelsChanged = Callable[[Sequence[ModelView]], None]
"""Told all models, the newest last, whenever one of them came, went or was changed."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    models: dict[tuple[str, str], ModelView] = field(default_factory=dict)
    """By team slug and name."""
    resources: tuple[ResourceView, ...] = ()
    purse: Purse = field(default_factory=Purse)


class RouteTable:
    """Answers which model a name means, and where it runs."""

    def __init__(
        self, registry: ModelRegistry, views: Views, models_changed: ModelsChanged = lambda _models: None
    ) -> None:
        self._registry = registry
        self._views = views
        self._models_changed = models_changed
        self._snapshot = Snapshot()
        self._model_stamp: tuple[Any, ...] | None = None
        self._turned_off: list[ResourceView] = []
        self._lock = asyncio.Lock()
        self._away = False
        self.loaded = False
        """Whether the snapshot was ever filled."""

    def find_model(self, principal: Principal, name: str) -> ModelView:
        """Return the model; raises one and the same 404 for foreign, unknown and impossible names."""
        team_slug, slash, own_name = name.rpartition("/")
        if len(name) > MAX_MODEL_NAME_CHARS:
            _not_found()
        model = self._snapshot.models.get((team_slug if slash else principal.team_slug, own_name))
        if model is None or model.team_slug not in (principal.team_slug, PLATFORM_SLUG):
            _not_found()
        return model

    def resolve(self, principal: Principal, name: str) -> tuple[ModelView, Route]:
        """Return the model and where it runs. Raises `ApiError` 402, 404, 409 or 503."""
        model = self.find_model(principal, name)
        route = choose_route(principal, model, self._snapshot.resources, time.time())
        if isinstance(route, ApiError):
            raise route
        unpaid = payment_refusal(principal, model, route, self._snapshot.purse)
        if unpaid is not None:
            raise unpaid
        return model, route

    def list_models(self, principal: Principal) -> list[ModelView]:
        """Return the models that the principal may use: its team's, then the platform's, each by name."""
        visible = [
            m for m in self._snapshot.models.values() if m.team_slug in (principal.team_slug, PLATFORM_SLUG)
        ]
        return sorted(visible, key=lambda m: (m.team_slug != principal.team_slug, m.name))

    def models_of_type(self, team_slug: str, model_type: str) -> list[ModelView]:
        """Return a team's models of a type, by name: what its resource of the type hosts."""
        found = [
            m
            for m in self._snapshot.models.values()
            if m.team_slug == team_slug and m.model_type == model_type
        ]
        return sorted(found, key=lambda m: m.name)

    def models_that_may_run(self, team_slug: str, model_type: str, *, pool: bool) -> list[ModelView]:
        """Return what a resource of the team may be asked for, by id: its own models of the type and the platform's, on a
        shared pool those of all teams."""
        found = [
            m
            for m in self._snapshot.models.values()
            if m.model_type == model_type and (pool or m.team_slug in (team_slug, PLATFORM_SLUG))
        ]
        return sorted(found, key=lambda m: m.model_id)

    def model_by_id(self, team_slug: str, model_id: str, *, pool: bool) -> ModelView | None:
        """Return one of the models that a team's requests may name; on a shared pool, of those of all teams."""
        return next(
            (
                m
                for m in self._snapshot.models.values()
                if m.model_id == model_id and (pool or m.team_slug in (team_slug, PLATFORM_SLUG))
            ),
            None,
        )

    async def refresh(self) -> None:
        """Renew the snapshot. Raises `Unavailable` and keeps the old one."""
        async with self._lock:
            stamp = await self._registry.stamp()
            models = self._snapshot.models
            if stamp != self._model_stamp:
                models = {(m.team_slug, m.name): m for m in await self._registry.models()}
                self._models_changed(sorted(models.values(), key=lambda m: m.created_unix_s))
            resources = tuple(await self._views.route_resources())
            still_on = {r.resource_id for r in resources if r.wanted == "on"}
            self._turned_off += [
                r for r in self._snapshot.resources if r.wanted == "on" and r.resource_id not in still_on
            ]
            self._snapshot = Snapshot(models, resources, await self._views.purse())
            self._model_stamp = stamp
            self.loaded = True

    async def refresh_if_possible(self) -> None:
        """Renew after a change made here, so that its maker sees it at once; without the database it comes later."""
        try:
            await self.refresh()
        except Unavailable as error:
            log.info("routes_not_refreshed", error=str(error))

    async def keep_fresh(self, when_off: WhenOff) -> None:
        """Renew until cancelled, and end what waits for resources that were turned off."""
        while True:
            try:
                await self.refresh()
            except Unavailable as error:
                if not self._away:
                    log.warning("routes_not_refreshed", error=str(error))
                self._away = True
            else:
                self._away = False
                while self._turned_off:
                    resource = self._turned_off.pop()
                    ended = await when_off(
                        resource.resource_id, "resource_off", "The resource was turned off."
                    )
                    log.info("resource_turned_off", resource_id=resource.resource_id, jobs_ended=ended)
            await asyncio.sleep(REFRESH_S)


def _not_found() -> NoReturn:
    raise ApiError(
        404, "model_not_found", "The model does not exist, or you do not have access to it.", param="model"
    )
