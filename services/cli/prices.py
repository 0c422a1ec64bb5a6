"""`roundhouse prices` and `roundhouse rates`: what tokens and hours cost, all versions; the platform sets them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from services.cli.acting import api
from services.cli.output import Json, print_fields, print_json, print_table

prices = typer.Typer(help="Prices of tokens on shared GPUs, by model type and class.", no_args_is_help=True)
rates = typer.Typer(help="Hourly rates of performance options.", no_args_is_help=True)

StartsAt = Annotated[str | None, typer.Option("--from", help="RFC 3339; default: now.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="Its id, as the list shows it.")]


@prices.command("list")
def list_prices(
    context: typer.Context,
    model_type: Annotated[str | None, typer.Option(help="Of this type alone.")] = None,
    as_json: Json = False,
) -> None:
    """All versions of prices; of those that have begun the latest holds."""
    found = list(api(context).list("/api/prices", model_type=model_type))
    if as_json:
        print_json(found)
        return
    print_table(
        ("model type", "class", "USD/million prompt", "USD/million completion", "from", "id"),
        (
            (
                each["model_type"], each["work_class"], each["prompt_usd_per_million"],
                each["completion_usd_per_million"], each["starts_at"], each["price_id"],
            )
            for each in found
        ),
    )  # fmt: skip


@prices.command("set")
def set_price(
    context: typer.Context,
    model_type: Annotated[str, typer.Argument(help="The model type's name.")],
    work_class: Annotated[str, typer.Argument(metavar="CLASS", help="live or batch.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT_USD", help="For a million prompt tokens.")],
    completion: Annotated[
        str, typer.Argument(metavar="COMPLETION_USD", help="For a million completion tokens.")
    ],
    starts_at: StartsAt = None,
    as_json: Json = False,
) -> None:
    """Set a price (platform key); it counts for what is accepted from its start on."""
    body = {
        "model_type": model_type,
        "work_class": work_class,
        "prompt_usd_per_million": prompt,
        "completion_usd_per_million": completion,
    }
    _show(api(context).put("/api/prices", body | _start(starts_at)), as_json)


@prices.command("withdraw")
def withdraw_price(context: typer.Context, version: Version) -> None:
    """Take back a price that has not begun (platform key)."""
    api(context).delete(f"/api/prices/{version}")


@rates.command("list")
def list_rates(
    context: typer.Context,
    option: Annotated[str | None, typer.Option(help="Of this performance option alone, by its id.")] = None,
    as_json: Json = False,
) -> None:
    """All versions of hourly rates; of those that have begun the latest holds."""
    found = list(api(context).list("/api/rates", option_id=option))
    if as_json:
        print_json(found)
        return
    print_table(
        ("option", "USD/hour", "from", "id"),
        ((each["option_id"], each["hourly_rate_usd"], each["starts_at"], each["rate_id"]) for each in found),
    )


@rates.command("set")
def set_rate(
    context: typer.Context,
    option: Annotated[str, typer.Argument(help="The performance option's id.")],
    hourly: Annotated[str, typer.Argument(metavar="USD", help="For an hour on one GPU.")],
    starts_at: StartsAt = None,
    as_json: Json = False,
) -> None:
    """Set an hourly rate (platform key); it counts for minutes that begin from its start on."""
    body = {"option_id": option, "hourly_rate_usd": hourly}
    _show(api(context).put("/api/rates", body | _start(starts_at)), as_json)


@rates.command("withdraw")
def withdraw_rate(context: typer.Context, version: Version) -> None:
    """Take back a rate that has not begun (platform key)."""
    api(context).delete(f"/api/rates/{version}")


def _start(starts_at: str | None) -> dict[str, str]:
    return {} if starts_at is None else {"starts_at": starts_at}


def _show(version: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(version)
    else:
        print_fields(version.items())
