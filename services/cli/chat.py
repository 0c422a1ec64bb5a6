"""`roundhouse chat`: one question, its answer as it is written."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from services.cli.acting import api
from services.cli.client import ApiClient, CliError
from services.cli.output import Json, plain, print_json


def chat(
    context: typer.Context,
    message: Annotated[str | None, typer.Argument(help="Read from standard input if left out.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Default: ROUNDHOUSE_MODEL, or the only one there is.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="At most so many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token each time.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a model; the answer is printed as it comes."""
    client = api(context)
    asked = sys.stdin.read() if message is None else message
    messages = [{"role": "system", "content": system}] if system is not None else []
    body: dict[str, Any] = {
        "model": model or client.default_model or _only_model(client),
        "messages": [*messages, {"role": "user", "content": asked}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if temperature is not None:
        body["temperature"] = temperature
    answer = _print_stream(client, body, quiet=as_json)
    if as_json:
        print_json({"model": body["model"], **answer})


def _print_stream(client: ApiClient, body: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Print deltas unless `quiet`; return the whole. The line is ended even where the stream breaks."""
    content: list[str] = []
    finish_reason = usage = None
    try:
        for event in client.stream("/v1/chat/completions", body):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
                text = choice["delta"].get("content") or ""
                content.append(text)
                if not quiet:
                    sys.stdout.write(plain(text) if sys.stdout.isatty() else text)
                    sys.stdout.flush()
    finally:
        if content and not quiet:
            sys.stdout.write("\n")
    return {"content": "".join(content), "finish_reason": finish_reason, "usage": usage}


def _only_model(client: ApiClient) -> str:
    names = [str(each["id"]) for each in client.get("/v1/models")["data"]]
    if len(names) != 1:
        raise CliError(
            "name a model with --model: " + (", ".join(sorted(names)) or "this key may use none yet")
        )
    return names[0]
