"""`roundhouse budgets`: limits on what is spent, how they stand, and their alerts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.cli.acting import api, find_id
from services.cli.client import CliError
from services.cli.output import Json, print_fields, print_json, print_table

app = typer.Typer(
    help="Limits on what is spent in a day or a month (UTC), and their alerts.", no_args_is_help=True
)
PATH = "/api/budgets"
ALERTS_PATH = "/api/alerts"
SCOPES = {
    "resource": ("/api/resources", "resource_id"),
    "model": ("/api/models", "model_id"),
    "key": ("/api/keys", "key_id"),
}
"""Where what has a budget is found by its name."""

BudgetId = Annotated[
    str, typer.Argument(metavar="BUDGET", help="The budget's id, as `budgets list` shows it.")
]
Alerts = Annotated[
    list[int] | None, typer.Option("--alert", metavar="PERCENT", help="Tell at this share; may be repeated.")
]
Actions = Annotated[
    list[str] | None,
    typer.Option(
        "--action",
        help="Done when it is spent; may be repeated: refuse_ppt, stop_batches, stop_scale_up, turn_off.",
    ),
]


@app.command("list")
def list_all(context: typer.Context, as_json: Json = False) -> None:
    """All budgets of the team, with what is spent in the running period."""
    budgets = list(api(context).list(PATH))
    if as_json:
        print_json(budgets)
        return
    print_table(
        ("of", "period", "USD limit", "spent", "reserved", "alerts at", "when it is spent", "id"),
        (
            (
                _of(each), each["period"], each["limit_usd"], each["spent_usd"], each["reserved_usd"],
                _percents(each["alert_percents"]), ", ".join(each["actions"]) or None, each["budget_id"],
            )
            for each in budgets
        ),
    )  # fmt: skip


@app.command()
def get(context: typer.Context, budget: BudgetId, as_json: Json = False) -> None:
    """One budget, and how it stands."""
    _show(api(context).get(f"{PATH}/{budget}"), as_json)


@app.command()
def create(
    context: typer.Context,
    limit_usd: Annotated[str, typer.Argument(help='A decimal, such as "25.00".')],
    period: Annotated[str, typer.Option(help="day or month (UTC).")] = "month",
    resource: Annotated[str | None, typer.Option(help="Of this resource, by name or id.")] = None,
    model: Annotated[str | None, typer.Option(help="Of this model, by name or id.")] = None,
    key: Annotated[str | None, typer.Option(help="Of this API key, by name or id.")] = None,
    alert: Alerts = None,
    action: Actions = None,
    as_json: Json = False,
) -> None:
    """Make a budget: of the whole team, unless one of --resource, --model and --key is given."""
    named = {"resource": resource, "model": model, "key": key}
    given = {scope: name for scope, name in named.items() if name is not None}
    if len(given) > 1:
        raise CliError("a budget is of one thing: give one of --resource, --model and --key")
    client = api(context)
    body: dict[str, Any] = {
        "scope": "team",
        "period": period,
        "limit_usd": limit_usd,
        "alert_percents": alert or [],
        "actions": action or [],
    }
    for scope, name in given.items():
        path, id_field = SCOPES[scope]
        body |= {"scope": scope, "scope_id": find_id(client, path, id_field, name)}
    _show(client.post(PATH, body), as_json)


@app.command()
def change(
    context: typer.Context,
    budget: BudgetId,
    limit_usd: Annotated[str | None, typer.Option("--limit", help='A decimal, such as "25.00".')] = None,
    alert: Alerts = None,
    action: Actions = None,
    no_alerts: Annotated[bool, typer.Option("--no-alerts", help="Tell at no share any more.")] = False,
    no_actions: Annotated[
        bool, typer.Option("--no-actions", help="Do nothing any more when it is spent.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Change the limit, the alerts or what is done when it is spent; what is not given stays."""
    if (alert and no_alerts) or (action and no_actions):
        raise CliError("give new ones or none, not both")
    body = {
        "limit_usd": limit_usd,
        "alert_percents": [] if no_alerts else alert,
        "actions": [] if no_actions else action,
    }
    changed = {name: value for name, value in body.items() if value is not None}
    if not changed:
        raise CliError("nothing is to be changed: give --limit, --alert or --action")
    _show(api(context).patch(f"{PATH}/{budget}", changed), as_json)


@app.command()
def delete(context: typer.Context, budget: BudgetId) -> None:
    """Remove a budget; what it counted stays in the books."""
    api(context).delete(f"{PATH}/{budget}")


@app.command()
def alerts(
    context: typer.Context,
    budget: Annotated[str | None, typer.Option(help="Of this budget alone, by its id.")] = None,
    as_json: Json = False,
) -> None:
    """Shares of budgets that were spent, newest first."""
    found = list(api(context).list(ALERTS_PATH, budget_id=budget))
    if as_json:
        print_json(found)
        return
    print_table(
        ("when", "of", "period", "began", "percent", "USD spent", "of a limit of", "budget"),
        (
            (
                each["created_at"], _of(each), each["period"], each["period_start"], each["percent"],
                each["spent_usd"], each["limit_usd"], each["budget_id"],
            )
            for each in found
        ),
    )  # fmt: skip


def _of(budget: dict[str, Any]) -> str:
    return "team" if budget["scope"] == "team" else f"{budget['scope']} {budget['scope_id']}"


def _percents(percents: list[int]) -> str | None:
    return ", ".join(f"{percent}%" for percent in percents) or None


def _show(budget: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(budget)
        return
    print_fields(
        [
            ("of", _of(budget)),
            (
                "period",
                f"{budget['period']} from {budget['period_start']} until {budget['period_end']} (UTC)",
            ),
            ("limit", f"{budget['limit_usd']} USD"),
            ("spent", f"{budget['spent_usd']} USD{', all of it' if budget['is_spent'] else ''}"),
            ("reserved", f"{budget['reserved_usd']} USD by what runs"),
            ("alerts at", _percents(budget["alert_percents"])),
            ("when it is spent", ", ".join(budget["actions"]) or None),
            ("id", budget["budget_id"]),
        ]
    )
