"""`roundhouse batch`: quote a file of lines, submit it, watch it with a progress bar, fetch its results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.cli import batch_queue, batch_queue_users, batch_schedules
from services.cli.acting import api
from services.cli.batch_file import first_url
from services.cli.batch_quote import own_fields, show_quote
from services.cli.client import ApiClient, CliError
from services.cli.output import Json, print_fields, print_json, print_table
from services.cli.settings import load_queue_user

app = typer.Typer(
    help="Batches: quote, submit, watch, results, cancel, list; recurring ones: schedule, schedules, pause, resume, unschedule; "
    "users of the queue: queue-user, queue-users, queue-rotate, queue-revoke.",
    no_args_is_help=True,
)
batch_schedules.add_to(app)
batch_queue_users.add_to(app)
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
    own: Annotated[bool, typer.Option("--own", help="On GPUs of its own, sized for the window.")] = False,
    option: Annotated[str | None, typer.Option(help="With --own: the performance option.")] = None,
    max_gpus: Annotated[int | None, typer.Option(help="With --own: GPUs at most.")] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Publish the lines, as the user that QUEUE_URL names.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option("--id", help="With --queue: the same id again submits the same lines, each once."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --queue --watch: where results go, as they come.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload a file, or publish its lines to the queue, and run them; the first line says which endpoint."""
    if queue:
        if own or option is not None or max_gpus is not None:
            raise CliError("--queue does not go with --own")
        if out is not None and not watch_it:
            raise CliError("--out goes with --watch")
        _through_queue(file, window, name, out, watch_it=watch_it, as_json=as_json)
        return
    if name is not None or out is not None:
        raise CliError("--id and --out go with --queue")
    client = api(context)
    endpoint = first_url(file)
    if not own and (option is not None or max_gpus is not None):
        raise CliError("--option and --max-gpus go with --own")
    uploaded = client.upload("/v1/files", file, {"purpose": "batch"})
    body = {"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": window}
    if own:
        body["own_resource"] = {"option": option, "max_gpus": max_gpus}
    batch = client.post(PATH, body)
    if watch_it:
        batch = _watched(client, str(batch["id"]))
    _show(batch, as_json=as_json)


@app.command()
def quote(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Lines of JSON with custom_id, method, url and body.")],
    deadline: Annotated[str, typer.Option(help="Minutes or hours that it may take: 30m to 168h.")] = "24h",
    option: Annotated[str | None, typer.Option(help="One performance option; else all are quoted.")] = None,
    max_gpus: Annotated[int | None, typer.Option(help="GPUs of its own at most.")] = None,
    as_json: Json = False,
) -> None:
    """Upload a file and say what its lines would take and cost: by the token, and on GPUs of their own."""
    client = api(context)
    uploaded = client.upload("/v1/files", file, {"purpose": "batch"})
    body = {"input_file_id": uploaded["id"], "endpoint": first_url(file), "completion_window": deadline,
            "option": option, "max_gpus": max_gpus}  # fmt: skip
    made = client.post("/api/batches/quote", body)
    while made["status"] == "counting":
        time.sleep(LOOK_S)
        made = client.get(f"/api/batches/quotes/{made['quote_id']}")
    if made["errors"]:
        raise CliError(f"{made['errors'][0]['code']}: {made['errors'][0]['message']}")
    if as_json:
        print_json(made)
    else:
        show_quote(made)


@app.command()
def watch(context: typer.Context, batch_id: BatchId, as_json: Json = False) -> None:
    """Show how far a batch is until it is over."""
    _show(_watched(api(context), batch_id), as_json=as_json)


@app.command()
def results(
    context: typer.Context,
    batch_id: Annotated[str | None, typer.Argument(help="The batch's id; none with --queue.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write here instead of standard output.")
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Take those that wait in the reply queue, of whatever batch.")
    ] = False,
) -> None:
    """The results so far, as lines of JSON in the input's order."""
    if queue == (batch_id is not None):
        raise CliError("name a batch, or --queue")
    if queue:
        with batch_queue.opened(out) as place:
            batch_queue.take_results(load_queue_user(), place)
        return
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


def _through_queue(
    file: Path, window: str, name: str | None, out: Path | None, *, watch_it: bool, as_json: bool
) -> None:
    user = load_queue_user()
    if not watch_it:
        made = batch_queue.submit(user, file, window, name, None)
    else:
        with batch_queue.opened(out) as place:
            made = batch_queue.submit(user, file, window, name, place)
        if out is None:  # the results are what is printed
            return
    if as_json:
        print_json(made)
    else:
        print_fields((field, value) for field, value in made.items() if value is not None)


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
    fields += own_fields(batch["roundhouse"]["own_resource"])
    print_fields(fields)
