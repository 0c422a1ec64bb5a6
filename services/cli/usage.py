"""`roundhouse usage`: what was used, and what it cost."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.acting import api
from services.cli.output import Json, print_fields, print_json, print_table, usd

PATH = "/api/billing/usage"


def usage(
    context: typer.Context,
    start: Annotated[
        str | None, typer.Option("--from", help="RFC 3339 or a date; default: 30 days ago.")
    ] = None,
    end: Annotated[str | None, typer.Option("--to", help="RFC 3339 or a date; default: now.")] = None,
    group_by: Annotated[str | None, typer.Option(help="team, key, model (the default) or resource.")] = None,
    bucket: Annotated[str | None, typer.Option(help="hour, or day (the default).")] = None,
    as_json: Json = False,
) -> None:
    """Requests, tokens, GPU-minutes and their cost. A row without a name: GPU time that no request used."""
    asked = {"from": start, "to": end, "group_by": group_by, "bucket": bucket}
    rows = list(api(context).list(PATH, **asked))
    if as_json:
        print_json(rows)
        return
    print_table(
        ("from", group_by or "model", "requests", "prompt tokens", "completion tokens", "GPU minutes", "USD"),
        (
            (
                row["start"].removesuffix(":00.000Z"), row["name"] or row["group"], row["requests"],
                row["prompt_tokens"], row["completion_tokens"], row["gpu_minutes"], row["cost_usd"],
            )
            for row in rows
        ),
    )  # fmt: skip
    total = sum(row["cost_nanousd"] for row in rows)
    print_fields([("in all", f"{usd(total)} USD")])
