"""`roundhouse resources`: the team's GPUs."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

import typer

from services.cli.acting import api, find_id
from services.cli.client import ApiClient
from services.cli.output import Json, print_fields, print_json, print_table

app = typer.Typer(help="Dedicated GPUs: list, look at, turn on and off, scale.", no_args_is_help=True)
Named = Annotated[str, typer.Argument(metavar="RESOURCE", help="Name or id of the resource.")]
PATH = "/api/resources"
KEPT = ("idle_timeout_s", "when_asleep", "target_wait_s", "windows")
"""Scaling settings that new bounds do not change."""


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
                each["name"], each["state"], _bounds(each["scaling"]), each["live_gpus"], each["model_type"],
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
    """Set the number of GPUs, and turn autoscaling off."""
    client = api(context)
    _show(client.patch(_path(client, resource), {"gpus": gpus}), as_json)


@app.command()
def autoscale(
    context: typer.Context,
    resource: Named,
    least: Annotated[int, typer.Option("--min", help="The fewest GPUs; 0 lets it fall asleep.")],
    most: Annotated[int, typer.Option("--max", help="The most GPUs.")],
    as_json: Json = False,
) -> None:
    """Let its load decide how many GPUs it has, between two numbers. What else is set stays."""
    client = api(context)
    _show(set_bounds(client, resource, least, most), as_json)


@app.command()
def decisions(
    context: typer.Context,
    resource: Named,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many of the latest.")] = 20,
    as_json: Json = False,
) -> None:
    """What the scheduler decided about it, and why; newest first."""
    client = api(context)
    rows = list(islice(client.list(f"{_path(client, resource)}/decisions"), count))
    if as_json:
        print_json(rows)
        return
    print_table(
        ("at", "action", "why"), ((each["decided_at"], each["action"], each["words"]) for each in rows)
    )


def set_bounds(client: ApiClient, resource: str, least: int, most: int) -> dict[str, Any]:
    """Turn autoscaling on with these bounds; what else is set stays, unless somebody changes it just then: a `CliError`."""
    path = _path(client, resource)
    now, tag = client.get_tagged(path)
    kept = {name: now["scaling"][name] for name in KEPT}
    return client.put(f"{path}/scaling", {"autoscaling": True, "min": least, "max": most, **kept}, tag)


def _bounds(scaling: dict[str, Any]) -> str:
    """How many GPUs it may have now: of a window that is open, if one is."""
    now = scaling["in_force"]
    return str(now["min"]) if now["min"] == now["max"] else f"{now['min']} to {now['max']}"


def _scaling_fields(resource: dict[str, Any]) -> list[tuple[str, str]]:
    scaling = resource["scaling"]
    now = scaling["in_force"]
    opened = f", window {now['window']} until {now['until']}" if now["window"] is not None else ""
    wanted = "" if scaling["wanted_gpus"] is None else f"{scaling['wanted_gpus']} wanted, "
    fields = [("gpus", f"{_bounds(scaling)}{opened}; {wanted}{resource['live_gpus']} live")]
    return fields + ([("because", scaling["why"])] if scaling["why"] else [])


def _path(client: ApiClient, resource: str) -> str:
    return f"{PATH}/{find_id(client, PATH, 'resource_id', resource)}"


def _show(resource: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(resource)
        return
    print_fields(
        [
            *((name, resource[name]) for name in ("name", "resource_id", "state", "reason", "wanted")),
            *_scaling_fields(resource),
            ("model type", resource["model_type"]),
            ("option", f"{resource['option']['name']}, {resource['option']['hourly_rate_usd']} USD/hour"),
            ("expected live", resource["expected_live_at"]),
            ("models", ", ".join(model["name"] for model in resource["models"]) or None),
            *((f"place {place['place']}", _place_words(place)) for place in resource["places"]),
        ]
    )


def _place_words(place: dict[str, Any]) -> str:
    """Of one that starts also how far it is: placing, loading, warming."""
    return f"starting ({place['phase']})" if place["state"] == "starting" else str(place["state"])
