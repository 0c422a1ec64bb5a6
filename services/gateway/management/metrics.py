"""`/api/resources/{resource_id}/metrics`: how a resource's requests went, from their records, over any window."""

from __future__ import annotations

from datetime import UTC, datetime

from aiohttp import web

from services.gateway.management import schemas
from services.gateway.management.acting import (
    TEAM_QUERY,
    ManagementDeps,
    acting_team,
    answer,
    not_found,
    path_id,
    query_of,
)
from services.gateway.management.metric_series import (
    MEASURES,
    PERCENTS,
    RULES,
    read_window,
    series_json,
    steps_of,
)
from services.gateway.metric_views import MetricViews
from services.gateway.routes import MANAGE, RouteSpec, Schema

NUMBER: Schema = {"type": "number", "minimum": 0}
_QUANTILES = schemas.obj(**{f"p{percent}": schemas.OPTIONAL_NUMBER for percent in PERCENTS})
POINT = schemas.obj(
    start=schemas.TIME, requests=schemas.COUNT, errors=schemas.COUNT, cancelled=schemas.COUNT,
    prompt_tokens=schemas.COUNT, completion_tokens=schemas.COUNT, requests_per_minute=NUMBER,
    completion_tokens_per_s=NUMBER, live_gpus=NUMBER, live_ms=schemas.COUNT, busy_ms=schemas.COUNT,
    utilisation={"type": ["number", "null"], "minimum": 0, "maximum": 1},
    **{f"{measure}_ms": _QUANTILES for measure in MEASURES},
)  # fmt: skip
METRICS: Schema = schemas.obj(
    resource_id=schemas.TEXT, model=schemas.OPTIONAL_TEXT, bucket={"enum": list(RULES)},
    **{"from": schemas.TIME, "to": schemas.TIME}, total=POINT, data=schemas.array(POINT),
)  # fmt: skip


class Metrics:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = deps.views
        self._metrics = MetricViews(deps.views.database)

    def routes(self) -> list[RouteSpec]:
        return [
            schemas.route(
                "GET", "/api/resources/{resource_id}/metrics", self.metrics, MANAGE,
                "Requests, errors, live GPUs, response times, waits, swaps, tokens a second, utilisation, by time",
                answers={200: METRICS},
                query=TEAM_QUERY | {
                    "from": schemas.TIME,
                    "to": schemas.TIME,
                    "bucket": {"type": "string", "enum": list(RULES), "default": "minute"},
                    "model": schemas.TEXT,
                },
            )
        ]  # fmt: skip

    async def metrics(self, request: web.Request) -> web.Response:
        """GPUs are the whole resource's also where `model` names one: they have no part for each model."""
        team = await acting_team(request, self._store)
        query = query_of(request)
        now = datetime.now(UTC)
        window, bucket = read_window(query, now)
        resource = await self._views.resource(team.team_id, path_id(request, "resource_id"))
        if resource is None:
            raise not_found()
        model = query.get("model")
        names = None if model is None else [model, f"{team.slug}/{model}"]
        resource_id = resource["resource_id"]
        steps = steps_of(
            window,
            await self._metrics.counts(resource_id, window, names),
            await self._metrics.histograms(resource_id, window, names),
            await self._metrics.busy(resource_id, window),
            await self._metrics.live(resource_id, window),
        )
        return answer(
            {"resource_id": resource_id, "model": model, "bucket": bucket, **series_json(window, steps, now)}
        )
