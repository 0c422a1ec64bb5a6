"""`roundhouse batch`: submit a file of lines, watch it with a progress bar, fetch its results."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.cli.acting import api
from services.cli.client import ApiClient, CliError
from services.cli.output import Json, print_fields, print_json, print_table

app = typer.Typer(help="Batches: submit, watch, results, cancel, list.", no_args_is_help=True)
PATH = "/v1/batches"
OVER = ("completed", "failed", "expired", "cancelled")
LOOK_S = 1.0
FIELDS = ("id", "status", "model", "input_file_id", "output_file_id", "error_file_id")
BatchId = Annotated[str, typer.Argument(help="The batch's id.")]


@app.command()
def submit(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Lines of JSON with custom_id, method, url and body.")],
    window: Annotated[str, typer.Option(help="Minutes or hours that it may take: 30m to 168h.")] = "24h",
    watch_it: Annotated[bool, typer.Option("--watch", help="Stay until it is over.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a file and run its lines; the first line says which endpoint."""
    client = api(context)
    endpoint = first_url(file)
    uploaded = client.upload("/v1/files", file, {"purpose": "batch"})
    batch = client.post(
        PATH, {"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": window}
    )
    if watch_it:
        batch = _watched(client, str(batch["id"]))
    _show(batch, as_json=as_json)


@app.command()
def watch(context: typer.Context, batch_id: BatchId, as_json: Json = False) -> None:
    """Show how far a batch is until it is over."""
    _show(_watched(api(context), batch_id), as_json=as_json)


@app.command()
def results(
    context: typer.Context,
    batch_id: BatchId,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write here instead of standard output.")
    ] = None,
) -> None:
    """The results so far, as lines of JSON in the input's order."""
    pieces = api(context).download(f"{PATH}/{batch_id}/results")
    if out is None:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        return
    # What does not arrive whole does not replace what was there.
    part = out.with_name(out.name + ".part")
    try:
        with part.open("wb") as opened:
            for piece in pieces:
                opened.write(piece)
        part.replace(out)
    except OSError as error:
        raise CliError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


@app.command()
def cancel(context: typer.Context, batch_id: BatchId, as_json: Json = False) -> None:
    """Stop a batch; what is done stays, and is all that is paid for."""
    _show(api(context).post(f"{PATH}/{batch_id}/cancel"), as_json=as_json)


@app.command("list")
def list_all(context: typer.Context, as_json: Json = False) -> None:
    """All batches of the team, newest first."""
    batches = list(_all(api(context)))
    if as_json:
        print_json(batches)
        return
    print_table(
        ("id", "status", "model", "lines", "completed", "failed"),
        ((each["id"], each["status"], each["model"], *_counts(each)) for each in batches),
    )


def first_url(file: Path) -> str:
    """The `url` of the first line that says something. Raises `CliError`."""
    try:
        with file.open("rb") as opened:
            first = next((line for line in opened if line.strip().removeprefix(b"\xef\xbb\xbf")), b"")
        url = json.loads(first.decode("utf-8-sig"))["url"]
    except OSError as error:
        raise CliError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CliError(f"the first line of {file} is no JSON object with a url") from error
    return str(url)


def _all(client: ApiClient) -> Iterator[dict[str, Any]]:
    after: str | None = None
    while True:
        page = client.get(PATH, limit="100", after=after)
        yield from page["data"]
        after = page["last_id"]
        if not page["has_more"]:
            return


def _watched(client: ApiClient, batch_id: str) -> dict[str, Any]:
    """Look at the batch until it is over; the bar is drawn on standard error, so that results can be piped."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("validating", total=None, pace="")
        while True:
            batch = client.get(f"{PATH}/{batch_id}")
            total, completed, failed = _counts(batch)
            bar.update(
                task,
                description=batch["status"],
                total=total or None,
                completed=completed + failed,
                pace=pace_of(batch, time.time()),
            )
            if batch["status"] in OVER:
                return batch
            time.sleep(LOOK_S)


def pace_of(batch: Mapping[str, Any], now_unix_s: float) -> str:
    """How fast it goes and how long it will take, in words; or what it waits for. Pure."""
    progress = batch["roundhouse"]
    if progress["waiting_for"]:
        return f"waits: {progress['waiting_for']}"
    if progress["expected_finish_at"] is None:
        return ""
    left_s = max(0, round(progress["expected_finish_at"] - now_unix_s))
    minutes, seconds = divmod(left_s, 60)
    return f"{progress['lines_per_s']:g} lines/s, {progress['tokens_per_s']:g} tokens/s, {minutes}:{seconds:02d} left"


def _counts(batch: Mapping[str, Any]) -> tuple[int, int, int]:
    counts = batch["request_counts"]
    return counts["total"], counts["completed"], counts["failed"]


def _show(batch: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(batch)
        return
    total, completed, failed = _counts(batch)
    fields = [(name, batch[name]) for name in FIELDS]
    fields += [("lines", total), ("completed", completed), ("failed", failed)]
    fields += [
        (
            f"line {problem['line']}" if problem["line"] else "error",
            f"{problem['code']}: {problem['message']}",
        )
        for problem in (batch["errors"] or {"data": []})["data"]
    ]
    print_fields(fields)
