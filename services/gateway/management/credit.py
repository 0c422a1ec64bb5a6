"""`/api/billing/account` and `/api/billing/credits`: how a team stands and pays; billing owns it, writes are commands."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from services.gateway.commands import refusal
from services.gateway.edge import read_json
from services.gateway.management import schemas
from services.gateway.management.acting import TEAM_QUERY, ManagementDeps, acting_team, answer
from services.gateway.management.bodies import ChangeTerms, GrantCredit, parse
from services.gateway.management.idempotency import command_envelope, idempotency_key, idempotent
from services.gateway.money import format_usd, parse_usd
from services.gateway.paying import insufficient_credit
from services.gateway.routes import MANAGE, PLATFORM, RouteSpec
from services.gateway.views import Views
from shared import messages, topology
from shared.inference.errors import bad_request


class Credit:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = deps.views
        self._commands = deps.commands

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        return [
            schemas.route(
                "GET", "/api/billing/account", self.account, MANAGE, "How the team pays, and what it has left",
                answers={200: schemas.ACCOUNT}, query=TEAM_QUERY,
            ),
            schemas.route(
                "PUT", "/api/billing/account/terms", self.set_terms, PLATFORM, "Set how the team pays", ChangeTerms,
                {200: schemas.ACCOUNT}, query=TEAM_QUERY,
            ),
            schemas.route(
                "POST", "/api/billing/credits", once(self.grant), PLATFORM,
                "Grant the team credit; needs an Idempotency-Key", GrantCredit, {201: schemas.CREDIT},
                query=TEAM_QUERY,
            ),
        ]  # fmt: skip

    async def account(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        return answer({"team": team.slug, **account_json(await self._views.account(team.team_id))})

    async def set_terms(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        body = parse(await read_json(request), ChangeTerms)
        limit = body.credit_limit_usd
        command = messages.SetTeamTerms(
            **await command_envelope(request, self._commands),
            team_id=team.team_id,
            pays=body.pays,
            credit_limit_nanousd=None if limit is None else parse_usd(limit, "credit_limit_usd"),
        )
        result = await self._commands.call(topology.BILLING_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        return answer({"team": team.slug, **account_json(result.body)})

    async def grant(self, request: web.Request) -> web.Response:
        """Without a key a request that is sent again, because its answer was lost, would grant twice."""
        if idempotency_key(request) is None:
            raise bad_request("missing_idempotency_key", "Granting credit needs an Idempotency-Key.")
        team = await acting_team(request, self._store)
        body = parse(await read_json(request), GrantCredit)
        amount = parse_usd(body.amount_usd, "amount_usd")
        if amount == 0:
            raise bad_request("invalid_money", "amount_usd must be above zero.", "amount_usd")
        command = messages.GrantCredit(
            **await command_envelope(request, self._commands),
            team_id=team.team_id,
            amount_nanousd=amount,
            reason=body.reason,
        )
        result = await self._commands.call(topology.BILLING_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        granted = {
            "transaction_id": result.body["transaction_id"],
            "amount_nanousd": amount,
            "amount_usd": format_usd(amount),
        }
        return answer({"team": team.slug, **granted, **account_json(result.body)}, 201)


async def require_credit(views: Views, team_id: str) -> None:
    """For what costs money by the minute. Raises `ApiError` 402 for a team that may spend nothing."""
    if (await views.account(team_id))["spendable_nanousd"] == 0:
        raise insufficient_credit()


def account_json(standing: dict[str, Any]) -> dict[str, Any]:
    """What a team has and may spend; null is without a bound."""
    limit, spendable = standing["credit_limit_nanousd"], standing["spendable_nanousd"]
    return {
        "pays": standing["pays"],
        "credit_limit_nanousd": limit,
        "credit_limit_usd": None if limit is None else format_usd(limit),
        "balance_nanousd": standing["balance_nanousd"],
        "balance_usd": format_usd(standing["balance_nanousd"]),
        "spendable_nanousd": spendable,
        "spendable_usd": None if spendable is None else format_usd(spendable),
    }
