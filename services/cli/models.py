"""`roundhouse models`: the team's models."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.acting import api
from services.cli.output import Json, print_fields, print_json, print_table

app = typer.Typer(help="Models: list and register.", no_args_is_help=True)
PATH = "/api/models"


@app.command("list")
def list_all(context: typer.Context, as_json: Json = False) -> None:
    """All models of the team."""
    models = list(api(context).list(PATH))
    if as_json:
        print_json(models)
        return
    print_table(
        ("name", "revision", "model type", "context tokens", "id"),
        (
            (each["name"], each["revision"], each["model_type"], each["context_tokens"], each["model_id"])
            for each in models
        ),
    )


@app.command()
def register(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The model's name within the team.")],
    folder: Annotated[str, typer.Argument(help="A folder below the server's import folder.")],
    model_type: Annotated[
        str | None, typer.Option(help="The type's name; a new one only the platform gives.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Register a folder of safetensors, config and tokenizer as a model."""
    body = {"name": name, "path": folder} | ({"model_type": model_type} if model_type else {})
    model = api(context).post(PATH, body)
    if as_json:
        print_json(model)
        return
    print_fields((field, model[field]) for field in ("name", "model_id", "model_type", "revision", "url"))
