"""`/api/billing/advice`: what the team's last days would have cost in other ways, as billing computed it."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from services.gateway.billing_views import BillingViews
from services.gateway.management import schemas
from services.gateway.management.acting import TEAM_QUERY, ManagementDeps, acting_team, answer, timestamp
from services.gateway.routes import MANAGE, RouteSpec, Schema

_OPTIONAL: Schema = {"type": ["integer", "null"]}
_WAY: Schema = {
    "oneOf": [
        {"type": "null"},
        schemas.obj(
            cost_nanousd=schemas.COUNT, gpus=schemas.COUNT, by_hour_of_day=schemas.array(schemas.COUNT)
        ),
    ]
}
_OF_TYPE = schemas.obj(
    model_type=schemas.TEXT, requests=schemas.COUNT, prompt_tokens=schemas.COUNT, completion_tokens=schemas.COUNT,
    paid_nanousd=schemas.INTEGER, by_token_nanousd=_OPTIONAL, requests_a_minute_milli=_OPTIONAL, fixed=_WAY,
    autoscaled=_WAY, windows=_WAY, break_even_milli=_OPTIONAL,
    break_even_within_one_gpu={"type": ["boolean", "null"]},
    cheapest={"enum": ["paid", "by_token", "fixed", "autoscaled", "windows"]},
)  # fmt: skip
ADVICE: Schema = {
    "type": "object",
    "properties": {
        "computed_at": schemas.OPTIONAL_TIME,
        "from": schemas.OPTIONAL_TIME,
        "to": schemas.OPTIONAL_TIME,
        "assumptions": schemas.array(schemas.TEXT),
        "model_types": schemas.array(_OF_TYPE),
        "idle_resources": schemas.array(
            schemas.obj(
                resource_id=schemas.TEXT, name=schemas.OPTIONAL_TEXT, minutes=schemas.COUNT, cost_nanousd=schemas.COUNT
            )
        ),
    },
    "required": ["computed_at", "from", "to", "assumptions", "model_types", "idle_resources"],
    "additionalProperties": False,
}  # fmt: skip
NOTHING_YET: dict[str, Any] = {
    "from": None, "to": None, "assumptions": [], "model_types": [], "idle_resources": [],
}  # fmt: skip


class Advice:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = BillingViews(deps.views.database)

    def routes(self) -> list[RouteSpec]:
        return [
            schemas.route(
                "GET", "/api/billing/advice", self.advice, MANAGE,
                "What the last days would have cost by the token, and with other numbers of GPUs",
                answers={200: ADVICE}, query=TEAM_QUERY,
            )
        ]  # fmt: skip

    async def advice(self, request: web.Request) -> web.Response:
        """Answer with the newest advice; a team that never asked or paid for anything has none, and is told so."""
        team = await acting_team(request, self._store)
        row = await self._views.advice(team.team_id)
        if row is None:
            return answer({"computed_at": None, **NOTHING_YET})
        return answer({"computed_at": timestamp(row["computed_at"]), **msgspec.json.decode(row["document"])})
