"""`roundhouse usage`: what was used, and what it cost."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.acting import api
from services.cli.output import Json, print_fields, print_json, print_table


def usage(
    context: typer.Context,
    start: Annotated[
        str | None, typer.Option("--from", help="RFC 3339 or a date; default: 30 days ago.")
    ] = None,
    end: Annotated[str | None, typer.Option("--to", help="RFC 3339 or a date; default: now.")] = None,
    group_by: Annotated[str | None, typer.Option(help="day, model, key or resource.")] = None,
    as_json: Json = False,
) -> None:
    """Requests, tokens, GPU-minutes and their cost."""
    document = api(context).get("/api/usage", **{"from": start, "to": end, "group_by": group_by})
    if as_json:
        print_json(document)
        return
    print_table(
        (document["group_by"], "requests", "prompt tokens", "completion tokens", "tokens USD", "minutes", "minutes USD"),
        (
            (
                row["group"], row["requests"], row["prompt_tokens"], row["completion_tokens"], row["tokens_usd"],
                row["minutes"], row["minutes_usd"],
            )
            for row in document["data"]
        ),
    )  # fmt: skip
    print_fields([("balance", f"{document['balance_usd']} USD")])
