"""`roundhouse size`: bounds for autoscaling from request volumes; `roundhouse options`: which GPUs there are to choose from."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from services.cli.acting import api, find_id
from services.cli.client import ApiClient, CliError
from services.cli.output import Json, print_fields, print_json, print_table
from services.cli.resources import set_bounds
from services.cli.sizing import SizeError, choose_size, measured_rpm

RESOURCES = "/api/resources"
SEEN_DAYS = 7
"""A week, so that weekends are in it."""


def size(
    context: typer.Context,
    min_rpm: Annotated[float, typer.Option(help="Requests a minute at the lowest usage.")],
    peak_rpm: Annotated[float, typer.Option(help="Requests a minute at peak usage.")],
    rpm_per_gpu: Annotated[
        float | None,
        typer.Option(
            help="Requests a minute that one GPU does; default: the best hour of the resource's last week."
        ),
    ] = None,
    headroom_percent: Annotated[float, typer.Option(help="How far above the peak, for volatile usage.")] = 0,
    resource: Annotated[str | None, typer.Option(help="Whose measured value counts (name or id).")] = None,
    apply: Annotated[
        str | None, typer.Option(metavar="RESOURCE", help="Set these bounds on this resource (name or id).")
    ] = None,
    as_json: Json = False,
) -> None:
    """The least and the most GPUs for a request volume; the most always do more than the peak."""
    measured = rpm_per_gpu is None
    if rpm_per_gpu is None:
        whose = resource or apply
        if whose is None:
            raise CliError("say --rpm-per-gpu, or --resource for what was measured on it")
        rpm_per_gpu = _measured(api(context), whose)
    try:
        chosen = choose_size(min_rpm, peak_rpm, rpm_per_gpu, headroom_percent)
    except SizeError as error:
        raise CliError(str(error)) from error
    answer: dict[str, Any] = {
        **asdict(chosen),
        "min_rpm": min_rpm,
        "peak_rpm": peak_rpm,
        "rpm_per_gpu": rpm_per_gpu,
        "rpm_per_gpu_measured": measured,
        "headroom_percent": headroom_percent,
        "rpm_at_min": round(chosen.min * rpm_per_gpu, 2),
        "rpm_at_max": round(chosen.max * rpm_per_gpu, 2),
    }
    if apply is not None:
        answer["applied_to"] = set_bounds(api(context), apply, chosen.min, chosen.max)["name"]
    if as_json:
        print_json(answer)
        return
    print_fields(
        [
            ("minimum", f"{chosen.min} GPUs, {answer['rpm_at_min']:g} requests a minute"),
            ("maximum", f"{chosen.max} GPUs, {answer['rpm_at_max']:g} requests a minute"),
            ("one GPU", f"{rpm_per_gpu:g} requests a minute{', as measured' if measured else ''}"),
            *([("set on", answer["applied_to"])] if apply is not None else []),
        ]
    )


def options(
    context: typer.Context,
    model_type: Annotated[str | None, typer.Option(help="Only those of this model type.")] = None,
    as_json: Json = False,
) -> None:
    """Performance options: rates, what one GPU was seen to do for you, and how many GPUs are free now."""
    rows = list(api(context).list("/api/options", model_type=model_type))
    if as_json:
        print_json(rows)
        return
    print_table(
        ("model type", "name", "device", "precision", "batch", "context", "USD/hour", "requests/min/GPU", "free GPUs", "id"),
        (
            (
                row["model_type"], row["name"], row["device_kind"], row["precision"], row["max_batch"],
                row["max_context_tokens"], row["hourly_rate_usd"], row["measured_rpm_per_gpu"], row["free_gpus"],
                row["option_id"],
            )
            for row in rows
        ),
    )  # fmt: skip


def _measured(client: ApiClient, resource: str) -> float:
    start = datetime.now(UTC) - timedelta(days=SEEN_DAYS)
    path = f"{RESOURCES}/{find_id(client, RESOURCES, 'resource_id', resource)}/metrics"
    points = client.get(path, bucket="hour", **{"from": start.isoformat()})["data"]
    seen = measured_rpm(points)
    if seen is None:
        raise CliError(
            f"'{resource}' was too little used in the last {SEEN_DAYS} days: try 'roundhouse bench', or say --rpm-per-gpu"
        )
    return seen
