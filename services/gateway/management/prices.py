"""`/api/prices` and `/api/rates`: versions of what tokens and hours cost. Billing owns them: writes are commands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web

from services.gateway.commands import refusal
from services.gateway.edge import read_json
from services.gateway.management import schemas
from services.gateway.management.acting import (
    PAGE_QUERY,
    ManagementDeps,
    answer,
    listing,
    page_of,
    path_id,
    query_of,
    read_time,
    timestamp,
)
from services.gateway.management.bodies import SetPrice, SetRate, parse
from services.gateway.management.idempotency import command_envelope
from services.gateway.money import format_usd, format_usd_per_million, parse_usd, parse_usd_per_million
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec
from services.gateway.store import Row
from shared import messages, topology
from shared.budgets.period import EPOCH
from shared.inference.errors import bad_request

NEXT_VERSION_DELAY = timedelta(seconds=4)
"""A version that follows another one starts a second after billing has it at the earliest, and the command takes a moment."""

_MILLISECOND = timedelta(milliseconds=1)

TYPE_QUERY: dict[str, Any] = {"model_type": schemas.TEXT}
OPTION_QUERY: dict[str, Any] = {"option_id": schemas.TEXT}


class Prices:
    def __init__(self, deps: ManagementDeps) -> None:
        self._registry = deps.models
        self._views = deps.views
        self._commands = deps.commands

    def routes(self) -> list[RouteSpec]:
        return [
            schemas.route(
                "PUT", "/api/prices", self.set_price, PLATFORM, "Set the price of a model type's tokens", SetPrice,
                {200: schemas.PRICE},
            ),
            schemas.route(
                "GET", "/api/prices", self.list_prices, MANAGE, "List prices of tokens, all versions",
                answers={200: schemas.page(schemas.PRICE)}, query=PAGE_QUERY | TYPE_QUERY,
            ),
            schemas.route(
                "DELETE", "/api/prices/{version_id}", self.withdraw, PLATFORM, "Withdraw a price that has not begun",
                answers={204: None},
            ),
            schemas.route(
                "PUT", "/api/rates", self.set_rate, PLATFORM, "Set what an hour on a performance option costs",
                SetRate, {200: schemas.RATE},
            ),
            schemas.route(
                "GET", "/api/rates", self.list_rates, MANAGE, "List hourly rates, all versions",
                answers={200: schemas.page(schemas.RATE)}, query=PAGE_QUERY | OPTION_QUERY,
            ),
            schemas.route(
                "DELETE", "/api/rates/{version_id}", self.withdraw, PLATFORM, "Withdraw a rate that has not begun",
                answers={204: None},
            ),
        ]  # fmt: skip

    async def set_price(self, request: web.Request) -> web.Response:
        """Without `starts_at` it is idempotent: the price that holds already is answered as it is."""
        query_of(request)
        body = parse(await read_json(request), SetPrice)
        prompt = parse_usd_per_million(body.prompt_usd_per_million, "prompt_usd_per_million")
        completion = parse_usd_per_million(body.completion_usd_per_million, "completion_usd_per_million")
        if not any(row["name"] == body.model_type for row in await self._registry.model_types()):
            raise bad_request("unknown_model_type", "There is no such model type.", "model_type")
        soon = datetime.now(UTC) + NEXT_VERSION_DELAY
        known = await self._views.price_at(body.model_type, body.work_class, soon)
        same = known is not None and (prompt, completion) == (
            known["prompt_nanousd"],
            known["completion_nanousd"],
        )
        if body.starts_at is None and known is not None and known["holds"] and same:
            return answer(_price_json(known))
        starts_unix_ms = _start(body.starts_at, datetime.now(UTC) if known is None else soon)
        command = messages.SetPrice(
            **await command_envelope(request, self._commands),
            model_type=body.model_type,
            work_class=body.work_class,
            prompt_nanousd=prompt,
            completion_nanousd=completion,
            starts_unix_ms=starts_unix_ms,
        )
        result = await self._call(command)
        return answer(
            {
                "price_id": result.body["price_id"],
                "model_type": body.model_type,
                "work_class": body.work_class,
                **_amounts(prompt, completion),
                "starts_at": _from_unix_ms(starts_unix_ms),
            }
        )

    async def list_prices(self, request: web.Request) -> web.Response:
        page = page_of(request)
        model_type = query_of(request).get("model_type")
        rows = await self._views.prices(model_type, page.after, page.limit + 1)
        return listing(rows, page, _price_json, lambda row: row["price_id"])

    async def set_rate(self, request: web.Request) -> web.Response:
        """Without `starts_at` it is idempotent: the rate that holds already is answered as it is."""
        query_of(request)
        body = parse(await read_json(request), SetRate)
        rate = parse_usd(body.hourly_rate_usd, "hourly_rate_usd")
        soon = datetime.now(UTC) + NEXT_VERSION_DELAY
        known = await self._views.rate_at(body.option_id, soon)
        if body.starts_at is None and known is not None and known["hourly_rate_nanousd"] == rate:
            return answer(_rate_json(known))
        starts_unix_ms = _start(body.starts_at, soon)
        command = messages.SetRate(
            **await command_envelope(request, self._commands),
            option_id=body.option_id,
            hourly_rate_nanousd=rate,
            starts_unix_ms=starts_unix_ms,
        )
        result = await self._call(command)
        return answer(
            {
                "rate_id": result.body["rate_id"],
                "option_id": body.option_id,
                "hourly_rate_usd": format_usd(rate),
                "hourly_rate_nanousd": rate,
                "starts_at": _from_unix_ms(starts_unix_ms),
            }
        )

    async def list_rates(self, request: web.Request) -> web.Response:
        page = page_of(request)
        option_id = query_of(request).get("option_id")
        rows = await self._views.rates(option_id, page.after, page.limit + 1)
        return listing(rows, page, _rate_json, lambda row: row["rate_id"])

    async def withdraw(self, request: web.Request) -> web.Response:
        query_of(request)
        version_id = path_id(request, "version_id")
        envelope = await command_envelope(request, self._commands)
        await self._call(messages.WithdrawPrice(**envelope, version_id=version_id))
        return web.Response(status=204)

    async def _call(self, command: messages.Command) -> messages.CommandResult:
        result = await self._commands.call(topology.BILLING_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        return result


def _start(given: str | None, otherwise: datetime) -> int:
    """When a version begins, in Unix milliseconds: as given, to the millisecond, else at that moment."""
    moment = otherwise if given is None else read_time(given, "starts_at")
    return (moment - EPOCH) // _MILLISECOND


def _from_unix_ms(unix_ms: int) -> str | None:
    return timestamp(EPOCH + unix_ms * _MILLISECOND)


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


def _rate_json(row: Row) -> dict[str, Any]:
    return {
        "rate_id": row["rate_id"],
        "option_id": row["option_id"],
        "hourly_rate_usd": format_usd(row["hourly_rate_nanousd"]),
        "hourly_rate_nanousd": row["hourly_rate_nanousd"],
        "starts_at": timestamp(row["starts_at"]),
    }
