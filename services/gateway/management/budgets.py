"""`/api/budgets` and `/api/alerts`: limits on what is spent; billing owns them, writes go there as commands."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from services.gateway.commands import refusal
from services.gateway.edge import read_json
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
    timestamp,
)
from services.gateway.management.bodies import ChangeBudget, CreateBudget, parse
from services.gateway.management.idempotency import command_envelope, idempotent
from services.gateway.money import format_usd, parse_usd
from services.gateway.routes import MANAGE, RouteSpec
from services.gateway.store import Row
from shared import messages, topology
from shared.budgets.period import period_end
from shared.inference.errors import bad_request


class Budgets:
    def __init__(self, deps: ManagementDeps) -> None:
        self._store = deps.store
        self._views = deps.views
        self._commands = deps.commands

    def routes(self) -> list[RouteSpec]:
        once = idempotent(self._store)
        one = "/api/budgets/{budget_id}"
        return [
            schemas.route(
                "POST", "/api/budgets", once(self.create), MANAGE, "Make a budget of a team, resource, model or key",
                CreateBudget, {201: schemas.BUDGET}, query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", "/api/budgets", self.list_page, MANAGE, "List budgets with what is spent of each",
                answers={200: schemas.page(schemas.BUDGET)}, query=PAGE_QUERY | TEAM_QUERY,
            ),
            schemas.route(
                "GET", one, self.get, MANAGE, "One budget", answers={200: schemas.BUDGET}, query=TEAM_QUERY,
            ),
            schemas.route(
                "PATCH", one, self.change, MANAGE, "Change the limit, the alerts or what is done when it is spent",
                ChangeBudget, {200: schemas.BUDGET}, query=TEAM_QUERY,
            ),
            schemas.route(
                "DELETE", one, self.delete, MANAGE, "Remove a budget", answers={204: None}, query=TEAM_QUERY,
            ),
            schemas.route(
                "GET", "/api/alerts", self.alerts, MANAGE, "Shares of budgets that were spent, newest first",
                answers={200: schemas.page(schemas.ALERT)},
                query=PAGE_QUERY | TEAM_QUERY | {"budget_id": schemas.TEXT},
            ),
        ]  # fmt: skip

    async def create(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        body = parse(await read_json(request), CreateBudget)
        command = messages.CreateBudget(
            **await command_envelope(request, self._commands),
            team_id=team.team_id,
            scope=body.scope,
            scope_id=await self._scope_id(team, body),
            period=body.period,
            limit_nanousd=parse_usd(body.limit_usd, "limit_usd"),
            alert_percents=body.alert_percents,
            actions=body.actions,
        )
        result = await self._commands.call(topology.BILLING_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        return await self._answer(team, str(result.body["budget_id"]), 201)

    async def list_page(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        rows = await self._views.budgets(team.team_id, page.after, page.limit + 1)
        return listing(rows, page, budget_json, lambda row: row["budget_id"])

    async def get(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        return await self._answer(team, path_id(request, "budget_id"), 200)

    async def change(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        budget_id = path_id(request, "budget_id")
        await self._row(team, budget_id)
        body = parse(await read_json(request), ChangeBudget)
        command = messages.ChangeBudget(
            **await command_envelope(request, self._commands),
            team_id=team.team_id,
            budget_id=budget_id,
            limit_nanousd=parse_usd(body.limit_usd, "limit_usd") if isinstance(body.limit_usd, str) else None,
            alert_percents=body.alert_percents if isinstance(body.alert_percents, list) else None,
            actions=body.actions if isinstance(body.actions, list) else None,
        )
        result = await self._commands.call(topology.BILLING_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        return await self._answer(team, budget_id, 200)

    async def delete(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        budget_id = path_id(request, "budget_id")
        await self._row(team, budget_id)
        command = messages.DeleteBudget(
            **await command_envelope(request, self._commands), team_id=team.team_id, budget_id=budget_id
        )
        result = await self._commands.call(topology.BILLING_COMMANDS, command)
        if not result.ok:
            raise refusal(result)
        return web.Response(status=204)

    async def alerts(self, request: web.Request) -> web.Response:
        team = await acting_team(request, self._store)
        page = page_of(request)
        budget_id = query_of(request).get("budget_id")
        rows = await self._views.alerts(team.team_id, page.after, page.limit + 1, budget_id)
        return listing(rows, page, alert_json, lambda row: row["alert_id"])

    async def _scope_id(self, team: Acting, body: CreateBudget) -> str:
        """The id of what the budget is of. Raises `ApiError` 400 for what the team has not."""
        if body.scope == "team":
            if body.scope_id not in (None, team.team_id):
                raise bad_request("invalid_value", "A team's budget needs no scope_id.", "scope_id")
            return team.team_id
        if body.scope_id is None:
            raise bad_request("missing_parameter", "scope_id is required.", "scope_id")
        if body.scope == "key":
            known = await self._store.has_key(team.team_id, body.scope_id)
        elif body.scope == "model":
            known = await self._store.may_use_model(team.team_id, body.scope_id)
        else:
            known = await self._views.may_use_resource(team.team_id, body.scope_id)
        if not known:
            raise bad_request(f"unknown_{body.scope}", f"The team has no such {body.scope}.", "scope_id")
        return body.scope_id

    async def _answer(self, team: Acting, budget_id: str, status: int) -> web.Response:
        return answer(budget_json(await self._row(team, budget_id)), status)

    async def _row(self, team: Acting, budget_id: str) -> Row:
        row = await self._views.budget(team.team_id, budget_id)
        if row is None:
            raise not_found()
        return row


def budget_json(row: Row) -> dict[str, Any]:
    spent, reserved, limit = row["posted_nanousd"], row["reserved_nanousd"], row["limit_nanousd"]
    return {
        "budget_id": row["budget_id"],
        "scope": row["scope"],
        "scope_id": row["scope_id"],
        "period": row["period"],
        "limit_usd": format_usd(limit),
        "limit_nanousd": limit,
        "alert_percents": sorted(row["alert_percents"]),
        "actions": sorted(row["actions"]),
        "period_start": row["period_start"].isoformat(),
        "period_end": period_end(row["period"], row["period_start"]).isoformat(),
        "spent_usd": format_usd(spent),
        "spent_nanousd": spent,
        "reserved_usd": format_usd(reserved),
        "reserved_nanousd": reserved,
        "is_spent": spent >= limit,
        "created_at": timestamp(row["created_at"]),
        "changed_at": timestamp(row["changed_at"]),
    }


def alert_json(row: Row) -> dict[str, Any]:
    return {
        "alert_id": row["alert_id"],
        "budget_id": row["budget_id"],
        "scope": row["scope"],
        "scope_id": row["scope_id"],
        "period": row["period"],
        "period_start": row["period_start"].isoformat(),
        "percent": row["percent"],
        "limit_usd": format_usd(row["limit_nanousd"]),
        "limit_nanousd": row["limit_nanousd"],
        "spent_usd": format_usd(row["spent_nanousd"]),
        "spent_nanousd": row["spent_nanousd"],
        "created_at": timestamp(row["created_at"]),
    }
