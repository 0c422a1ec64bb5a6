"""SQL of scaling: what a team sets, and what the leader writes of it."""

from __future__ import annotations

import time

import msgspec

from services.scheduler.actions import NoteScaling
from services.scheduler.scaling_settings import Bounds, bounds_at
from shared.database import Connection
from shared.messages import ScaleResource, ScalingWindow, SetScaling


class SettingsChanged(Exception):
    """The settings are no longer those that the command was made for."""


async def set_scaling(connection: Connection, command: SetScaling) -> str:
    """Store the settings of a resource whose row is locked; return in words what was set. Raises `SettingsChanged`."""
    version = await connection.fetchval(
        "SELECT scaling_version FROM scheduler.resources WHERE resource_id = $1", command.resource_id
    )
    if command.if_version is not None and command.if_version != version:
        raise SettingsChanged
    least, most = command.min_count, command.max_count
    await connection.execute(
        """UPDATE scheduler.resources SET autoscaling = $2, min_count = $3, max_count = $4, idle_timeout_s = $6,
               when_asleep = $7, target_wait_s = $8, fixed_count = CASE WHEN $2 THEN fixed_count ELSE $5 END,
               scaling_version = scaling_version + 1, windows = '[]',
               min_now = NULL, max_now = NULL, window_now = NULL, bounds_until = NULL
           WHERE resource_id = $1""",
        command.resource_id,
        command.autoscaling,
        least if command.autoscaling else None,
        most if command.autoscaling else None,
        most,
        command.idle_timeout_s,
        command.when_asleep,
        command.target_wait_s,
    )
    await _set_windows(connection, command.resource_id, least, most, command.windows)
    words = f"between {least} and {most}" if command.autoscaling else f"fixed at {most}"
    return words + (f", with {len(command.windows)} windows" if command.windows else "")


async def set_fixed(connection: Connection, command: ScaleResource) -> None:
    """Turn autoscaling off and set the number; windows stay as they were."""
    windows = await connection.fetchval(
        """UPDATE scheduler.resources SET autoscaling = false, min_count = NULL, max_count = NULL, fixed_count = $2,
               scaling_version = scaling_version + 1
           WHERE resource_id = $1 RETURNING windows""",
        command.resource_id,
        command.fixed_count,
    )
    decoded = msgspec.json.decode(windows, type=list[ScalingWindow])
    await _set_windows(connection, command.resource_id, command.fixed_count, command.fixed_count, decoded)


async def _set_windows(
    connection: Connection, resource_id: str, least: int, most: int, windows: list[ScalingWindow]
) -> None:
    if not windows:
        return
    # On the clock of this process: the leader looks at each bound with the database's, a moment later.
    bounds = bounds_at(least, most, windows, time.time())
    await connection.execute(
        """UPDATE scheduler.resources SET windows = $2, min_now = $3, max_now = $4, window_now = $5,
               bounds_until = to_timestamp($6) WHERE resource_id = $1""",
        resource_id,
        msgspec.json.encode(windows).decode(),
        bounds.min_count,
        bounds.max_count,
        bounds.window,
        bounds.until,
    )


async def note_bounds(connection: Connection, resource_id: str, version: int, bounds: Bounds) -> bool:
    """Store what a turn of the windows made of the settings; False if the settings have changed since."""
    done = await connection.execute(
        """UPDATE scheduler.resources SET min_now = $3, max_now = $4, window_now = $5, bounds_until = to_timestamp($6)
           WHERE resource_id = $1 AND scaling_version = $2""",
        resource_id,
        version,
        bounds.min_count,
        bounds.max_count,
        bounds.window,
        bounds.until,
    )
    return bool(done == "UPDATE 1")


async def note_scaling(connection: Connection, resource_id: str, scaling: NoteScaling) -> None:
    """Store what autoscaling wants and what it has learned. Nothing of a resource that was turned off meanwhile."""
    measured = scaling.measured
    await connection.execute(
        """UPDATE scheduler.resources SET wanted_count = $2, wanted_why = $3,
               job_tokens = coalesce($4, job_tokens), worker_tokens_per_s = coalesce($5, worker_tokens_per_s),
               crowds = coalesce($6, crowds)
           WHERE resource_id = $1 AND wanted = 'on'""",
        resource_id,
        scaling.memory.wanted,
        scaling.words[:500],
        measured.job_tokens if measured is not None else None,
        measured.worker_tokens_per_s if measured is not None else None,
        msgspec.json.encode(scaling.crowds).decode() if scaling.crowds is not None else None,
    )
