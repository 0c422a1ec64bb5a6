"""`/api/resources/{id}/scaling`: how many GPUs a resource may have, and when. The scheduler owns the settings."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from services.gateway.management import bodies
from services.gateway.management.acting import timestamp
from services.gateway.store import Row
from shared import messages
from shared.inference.errors import bad_request


def bounds_of(body: bodies.SetScaling) -> tuple[int, int]:
    """Return (min, max). Raises `ApiError` 400 for a number that goes with the other mode, or is missing."""
    needed, foreign = (("min", "max"), ("gpus",)) if body.autoscaling else (("gpus",), ("min", "max"))
    mode = "on" if body.autoscaling else "off"
    for name in foreign:
        if getattr(body, name) is not UNSET:
            raise bad_request("invalid_value", f"'{name}' does not go with autoscaling {mode}.", name)
    for name in needed:
        if getattr(body, name) is UNSET:
            raise bad_request("missing_parameter", f"With autoscaling {mode} '{name}' is required.", name)
    least, most = (getattr(body, name) for name in (needed[0], needed[-1]))
    if least > most:
        raise bad_request("invalid_value", "min may not be above max.", "min")
    return least, most


def command_windows(body: bodies.SetScaling) -> list[messages.ScalingWindow]:
    return [
        messages.ScalingWindow(
            name=window.name,
            start=window.start,
            duration_minutes=window.duration_minutes,
            time_zone=window.time_zone,
            min_count=window.min,
            max_count=window.max,
        )
        for window in body.windows
    ]


def costs_more(row: Row, least: int, most: int, windows: list[messages.ScalingWindow]) -> bool:
    """Whether the settings allow or ask for more GPUs than those that `row` has."""
    least = max([least, *(window.min_count for window in windows)])
    most = max([most, *(window.max_count for window in windows)])
    return bool(least > row["min_count"] or most > row["max_count"])


def scaling_json(row: Row) -> dict[str, Any]:
    """Return the settings as `/api` shows them, and what follows from them now."""
    is_on = row["wanted"] == "on"
    return {
        "autoscaling": row["autoscaling"],
        "min": row["min_count"],
        "max": row["max_count"],
        "idle_timeout_s": row["idle_timeout_s"],
        "when_asleep": row["when_asleep"],
        "target_wait_s": row["target_wait_s"],
        "windows": [
            {
                "name": window.name,
                "start": window.start,
                "duration_minutes": window.duration_minutes,
                "time_zone": window.time_zone,
                "min": window.min_count,
                "max": window.max_count,
            }
            for window in msgspec.json.decode(row["windows"], type=list[messages.ScalingWindow])
        ],
        "in_force": {
            "min": row["min_now"],
            "max": row["max_now"],
            "window": row["window_now"],
            "until": timestamp(row["bounds_until"]),
        },
        "wanted_gpus": _wanted(row) if is_on else None,
        "why": row["wanted_why"] if is_on else "",
    }


def _wanted(row: Row) -> int:
    """What was decided last, within what is in force by now."""
    decided = row["min_now"] if row["wanted_count"] is None else row["wanted_count"]
    return int(min(max(decided, row["min_now"]), row["max_now"]))
