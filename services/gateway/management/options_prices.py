"""`/api/options` (owned by the scheduler) and `/api/prices` (owned by billing): writes go to them as commands."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from services.gateway.commands import refusal
from services.gateway.edge import read_json
from services.gateway.errors import bad_request
from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    ManagementDeps,
    answer,
    listing,
    page_of,
    query_of,
    read_time,
    timestamp,
)
from services.gateway.management.bodies import CreateOption, SetPrice, parse
from services.gateway.management.idempotency import command_envelope, idempotent
from services.gateway.money import format_usd, format_usd_per_million, parse_usd, parse_usd_per_million
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec
from services.gateway.store import Row
from shared import messages, topology

NEXT_PRICE_DELAY_S = 2.0
"""A later price may not start in the past, and the command takes a moment to arrive."""

TYPE_QUERY: dict[str, Any] = {"model_type": {"type": "string"}}


class OptionsAndPrices:
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
                "GET", "/api/options", self.list_options, MANAGE, "List performance options with their rates",
                answers={200: schemas.page(schemas.OPTION)}, query=PAGE_QUERY | TYPE_QUERY,
            ),
            schemas.route(
                "PUT", "/api/prices", self.set_price, PLATFORM, "Set the price of a model type's tokens", SetPrice,
                {200: schemas.PRICE},
            ),
            schemas.route(
                "GET", "/api/prices", self.list_prices, MANAGE, "List prices",
                answers={200: schemas.page(schemas.PRICE)}, query=PAGE_QUERY | TYPE_QUERY,
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
        page = page_of(request)
        model_type = query_of(request).get("model_type")
        rows = await self._views.options(model_type, page.after, page.limit + 1)
        return listing(rows, page, option_json, lambda row: row["option_id"])

    async def set_price(self, request: web.Request) -> web.Response:
        """Without `starts_at` it is idempotent: the price that holds already is answered as it is."""
        query_of(request)
        body = parse(await read_json(request), SetPrice)
        prompt = parse_usd_per_million(body.prompt_usd_per_million, "prompt_usd_per_million")
        completion = parse_usd_per_million(body.completion_usd_per_million, "completion_usd_per_million")
        await self._require_type(body.model_type)
        latest = await self._views.latest_price(body.model_type, body.work_class)
        if body.starts_at is not None:
            starts_unix_ms = int(read_time(body.starts_at, "starts_at").timestamp() * 1000)
        elif latest is None:
            starts_unix_ms = int(time.time() * 1000)
        else:
            if (latest["prompt_nanousd"], latest["completion_nanousd"]) == (prompt, completion):
                return answer(_price_json(latest))
            starts_unix_ms = int((time.time() + NEXT_PRICE_DELAY_S) * 1000)
        command = messages.SetPrice(
            **await command_envelope(request, self._commands),
            model_type=body.model_type,
            work_class=body.work_class,
            prompt_nanousd=prompt,
            completion_nanousd=completion,
            starts_unix_ms=starts_unix_ms,
        )
        result = await self._commands.call(topology.BILLING_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        return answer(
            {
                "price_id": result.body["price_id"],
                "model_type": body.model_type,
                "work_class": body.work_class,
                **_amounts(prompt, completion),
                "starts_at": timestamp(datetime.fromtimestamp(starts_unix_ms / 1000, UTC)),
            }
        )

    async def list_prices(self, request: web.Request) -> web.Response:
        page = page_of(request)
        model_type = query_of(request).get("model_type")
        rows = await self._views.prices(model_type, page.after, page.limit + 1)
        return listing(rows, page, _price_json, lambda row: row["price_id"])

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
        "hourly_rate_usd": format_usd(row["hourly_rate_nanousd"]),
        "hourly_rate_nanousd": row["hourly_rate_nanousd"],
    }


def _price_json(row: Row) -> dict[str, Any]:
    return {
        "price_id": row["price_id"],
        "model_type": row["model_type"],
        "work_class": row["work_class"],
        **_amounts(row["prompt_nanousd"], row["completion_nanousd"]),
        "starts_at": timestamp(row["starts_at"]),
    }


def _amounts(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_usd_per_million": format_usd_per_million(prompt),
        "completion_usd_per_million": format_usd_per_million(completion),
        "prompt_nanousd": prompt,
        "completion_nanousd": completion,
    }
