"""`roundhouse resources`: the team's GPUs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.cli.acting import api, find_id
from services.cli.client import ApiClient
from services.cli.output import Json, print_fields, print_json, print_table

app = typer.Typer(help="Dedicated GPUs: list, look at, turn on and off, scale.", no_args_is_help=True)
Named = Annotated[str, typer.Argument(metavar="RESOURCE", help="Name or id of the resource.")]
PATH = "/api/resources"


@app.command("list")
def list_all(context: typer.Context, as_json: Json = False) -> None:
    """All resources of the team."""
    resources = list(api(context).list(PATH))
    if as_json:
        print_json(resources)
        return
    print_table(
        ("name", "state", "gpus", "live", "model type", "option", "USD/hour", "id"),
        (
            (
                each["name"], each["state"], each["gpus"], each["live_gpus"], each["model_type"],
                each["option"]["name"], each["option"]["hourly_rate_usd"], each["resource_id"],
            )
            for each in resources
        ),
    )  # fmt: skip


@app.command()
def get(context: typer.Context, resource: Named, as_json: Json = False) -> None:
    """One resource: its state, and why."""
    client = api(context)
    _show(client.get(_path(client, resource)), as_json)


@app.command()
def on(context: typer.Context, resource: Named, as_json: Json = False) -> None:
    """Turn it on. It answers when its state is `live`; what it costs begins then, too."""
    client = api(context)
    _show(client.post(f"{_path(client, resource)}/on"), as_json)


@app.command()
def off(context: typer.Context, resource: Named, as_json: Json = False) -> None:
    """Turn it off. What runs is finished; what waits is refused."""
    client = api(context)
    _show(client.post(f"{_path(client, resource)}/off"), as_json)


@app.command()
def scale(
    context: typer.Context,
    resource: Named,
    gpus: Annotated[int, typer.Argument(help="How many GPUs it has from now on.")],
    as_json: Json = False,
) -> None:
    """Set the number of GPUs."""
    client = api(context)
    _show(client.patch(_path(client, resource), {"gpus": gpus}), as_json)


def _path(client: ApiClient, resource: str) -> str:
    return f"{PATH}/{find_id(client, PATH, 'resource_id', resource)}"


def _show(resource: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(resource)
        return
    print_fields(
        [
            *((name, resource[name]) for name in ("name", "resource_id", "state", "reason", "wanted")),
            ("gpus", f"{resource['gpus']} wanted, {resource['live_gpus']} live"),
            ("model type", resource["model_type"]),
            ("option", f"{resource['option']['name']}, {resource['option']['hourly_rate_usd']} USD/hour"),
            ("expected live", resource["expected_live_at"]),
            ("models", ", ".join(model["name"] for model in resource["models"]) or None),
            *((f"place {place['place']}", place["state"]) for place in resource["places"]),
        ]
    )
