"""`roundhouse batch schedule` and what goes with it: batches that come again and again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli.acting import api
from services.cli.batch_file import first_url
from services.cli.output import Json, print_fields, print_json, print_table

SCHEDULES = "/api/batches/schedules"
ScheduleId = Annotated[str, typer.Argument(help="The schedule's id.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to those of `roundhouse batch`."""
    for command in (schedule, schedules, pause, resume, unschedule):
        app.command()(command)


def schedule(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A name that no other schedule of the team has.")],
    file: Annotated[Path, typer.Argument(help="Lines of JSON with custom_id, method, url and body.")],
    cron: Annotated[str, typer.Argument(help="Minute, hour, day of month, month, day of week.")],
    time_zone: Annotated[str, typer.Option(help="Whose clock counts.")] = "UTC",
    window: Annotated[str, typer.Option(help="Minutes or hours that each may take: 30m to 168h.")] = "24h",
    own: Annotated[
        bool, typer.Option("--own", help="Each on GPUs of its own, sized for the window.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a file and run its lines at certain times, again and again."""
    client = api(context)
    endpoint = first_url(file)
    uploaded = client.upload("/v1/files", file, {"purpose": "batch"})
    batch: dict[str, Any] = {
        "input_file_id": uploaded["id"],
        "endpoint": endpoint,
        "completion_window": window,
    }
    if own:
        batch["own_resource"] = {}
    made = client.post(SCHEDULES, {"name": name, "cron": cron, "time_zone": time_zone, "batch": batch})
    _show_schedule(made, as_json=as_json)


def schedules(context: typer.Context, as_json: Json = False) -> None:
    """All recurring batches of the team."""
    found = list(api(context).list(SCHEDULES))
    if as_json:
        print_json(found)
        return
    print_table(
        ("id", "name", "cron", "time zone", "next"),
        (
            (each["schedule_id"], each["name"], each["cron"], each["time_zone"], each["next_at"] or "paused")
            for each in found
        ),
    )


def pause(context: typer.Context, schedule_id: ScheduleId, as_json: Json = False) -> None:
    """Make no batches until it is resumed; its times meanwhile are not made up for."""
    _show_schedule(api(context).patch(f"{SCHEDULES}/{schedule_id}", {"paused": True}), as_json=as_json)


def resume(context: typer.Context, schedule_id: ScheduleId, as_json: Json = False) -> None:
    """Go on with the next time."""
    _show_schedule(api(context).patch(f"{SCHEDULES}/{schedule_id}", {"paused": False}), as_json=as_json)


def unschedule(context: typer.Context, schedule_id: ScheduleId) -> None:
    """End a schedule; the batches that it made stay."""
    api(context).delete(f"{SCHEDULES}/{schedule_id}")


def _show_schedule(made: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    print_fields(
        [(name, made[name]) for name in ("schedule_id", "name", "cron", "time_zone", "next_at", "paused")]
    )
    if made["runs"]:
        print_table(
            ("due", "batch", ""),
            ((run["due_at"], run["batch_id"] or "-", run["problem"] or "") for run in made["runs"]),
        )
