"""`/api/options`: performance options, which the scheduler owns, with the rates of billing; writes are commands."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from services.gateway.commands import refusal
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
)
from services.gateway.management.bodies import CreateOption, parse
from services.gateway.management.idempotency import command_envelope, idempotent
from services.gateway.money import format_usd, parse_usd
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec
from services.gateway.store import Row
from shared import messages, topology
from shared.inference.errors import bad_request

TYPE_QUERY: dict[str, Any] = {"model_type": {"type": "string"}}
LISTED_OPTION = schemas.obj(
    **schemas.OPTION["properties"],
    measured_rpm_per_gpu=schemas.OPTIONAL_NUMBER,
    free_gpus=schemas.OPTIONAL_COUNT,
)


class Options:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._registry = deps.models
        self._views = deps.views
        self._commands = deps.commands

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        return [
            schemas.route(
                "POST", "/api/options", once(self.create_option), PLATFORM, "Make a performance option", CreateOption,
                {201: schemas.OPTION},
            ),
            schemas.route(
                "GET", "/api/options", self.list_options, MANAGE,
                "List performance options with their rates, what one GPU was seen to do, and how many are free",
                answers={200: schemas.page(LISTED_OPTION)}, query=PAGE_QUERY | TYPE_QUERY | TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def create_option(self, request: web.Request) -> web.Response:
        query_of(request)
        body = parse(await read_json(request), CreateOption)
        if body.kv_tokens < body.max_context_tokens:
            raise bad_request("invalid_value", "kv_tokens must be at least max_context_tokens.", "kv_tokens")
        await self._require_type(body.model_type)
        command = messages.CreateOption(
            **await command_envelope(request, self._commands),
            model_type=body.model_type,
            name=body.name,
            device_kind=body.device_kind,
            precision=body.precision,
            max_batch=body.max_batch,
            max_context_tokens=body.max_context_tokens,
            kv_tokens=body.kv_tokens,
            hourly_rate_nanousd=parse_usd(body.hourly_rate_usd, "hourly_rate_usd"),
        )
        result = await self._commands.call(topology.SCHEDULER_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        row = await self._views.option(body.model_type, body.name)
        if row is None:
            raise RuntimeError("the option that was just made is not there")
        return answer(option_json(row), 201)

    async def list_options(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        model_type = query_of(request).get("model_type")
        rows = await self._views.options(team.team_id, model_type, page.after, page.limit + 1)
        return listing(rows, page, listed_option_json, lambda row: row["option_id"])

    async def _require_type(self, model_type: str) -> None:
        if not any(row["name"] == model_type for row in await self._registry.model_types()):
            raise bad_request("unknown_model_type", "There is no such model type.", "model_type")


def option_json(row: Row) -> dict[str, Any]:
    """Return an option from its own row, or from a resource's that carries its option's columns."""
    return {
        "option_id": row["option_id"],
        "model_type": row["model_type"],
        "name": row["option_name"] if "option_name" in row.keys() else row["name"],  # noqa: SIM118 (a Record's `in` looks at values)
        "device_kind": row["device_kind"],
        "precision": row["precision"],
        "max_batch": row["max_batch"],
        "max_context_tokens": row["max_context_tokens"],
        "kv_tokens": row["kv_tokens"],
        "hourly_rate_usd": format_usd(row["rate_in_force_nanousd"]),
        "hourly_rate_nanousd": row["rate_in_force_nanousd"],
    }


def listed_option_json(row: Row) -> dict[str, Any]:
    """Return an option with what is known of its GPUs."""
    measured = row["measured_rpm_per_gpu"]
    return option_json(row) | {
        "measured_rpm_per_gpu": None if measured is None else round(measured, 2),
        "free_gpus": row["free_gpus"],
    }
