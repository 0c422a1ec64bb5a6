"""`/api/billing/top_ups` and `/api/billing/deposits`: a team pays, and sees what came in."""

from __future__ import annotations

from typing import Any

from aiohttp import web

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
    timestamp,
)
from services.gateway.management.bodies import TopUp, parse
from services.gateway.management.idempotency import idempotency_key, idempotent
from services.gateway.money import format_usd, parse_usd
from services.gateway.payments.provider import PaymentProvider
from services.gateway.payments.stripe_events import NANOUSD_PER_CENT
from services.gateway.routes import MANAGE, RouteSpec
from services.gateway.store import Row
from shared.ids import new_id
from shared.inference.errors import ApiError, bad_request
from shared.usd import NANO

MIN_TOP_UP_NANOUSD = NANO
"""A dollar: less is eaten up by what a card payment costs."""
MAX_TOP_UP_NANOUSD = 100_000 * NANO


class Deposits:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = deps.views
        self._provider = deps.payments
        self._public_url = deps.public_url

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        return [
            schemas.route(
                "POST", "/api/billing/top_ups", once(self.top_up), MANAGE, "Make a page where the team pays", TopUp,
                {201: schemas.TOP_UP}, query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", "/api/billing/deposits", self.deposits, MANAGE,
                "Credits and payments, and what was taken back of them",
                answers={200: schemas.page(schemas.DEPOSIT)}, query=PAGE_QUERY | TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def top_up(self, request: web.Request) -> web.Response:
        """The balance grows when the provider has reported the payment, not before."""
        team = await acting_team(request, self._store)
        body = parse(await read_json(request), TopUp)
        amount = parse_usd(body.amount_usd, "amount_usd")
        if not MIN_TOP_UP_NANOUSD <= amount <= MAX_TOP_UP_NANOUSD or amount % NANOUSD_PER_CENT:
            message = "amount_usd must be whole cents from 1 to 100000 USD."
            raise bad_request("invalid_money", message, "amount_usd")
        checkout = await self._payments().create_checkout(
            team.team_id, amount, self._return_url(request), self._same_request(request, team.team_id)
        )
        return answer(
            {
                "top_up_id": checkout.checkout_id,
                "url": checkout.url,
                "amount_nanousd": amount,
                "amount_usd": format_usd(amount),
            },
            201,
        )

    def _payments(self) -> PaymentProvider:
        if self._provider is None:
            raise ApiError(
                409, "payments_off", "No payment provider is set up here. Ask the platform for credit."
            )
        return self._provider

    def _return_url(self, request: web.Request) -> str:
        return f"{self._public_url or request.url.origin()}/console"

    @staticmethod
    def _same_request(request: web.Request, team_id: str) -> str:
        key = idempotency_key(request)
        return f"{team_id}:{key}" if key is not None else new_id("top")

    async def deposits(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        rows = await self._views.deposits(team.team_id, page.after, page.limit + 1)
        return listing(rows, page, _deposit_json, lambda row: row["transaction_id"])


def _deposit_json(row: Row) -> dict[str, Any]:
    return {
        "transaction_id": row["transaction_id"],
        "kind": row["kind"],
        "corrects": row["corrects"],
        "words": row["words"],
        "amount_nanousd": row["amount_nanousd"],
        "amount_usd": format_usd(row["amount_nanousd"]),
        "created_at": timestamp(row["created_at"]),
    }
