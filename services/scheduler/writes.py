"""SQL of each action of the reconciler: the one place where places, intervals and starts are written."""

from __future__ import annotations

from services.scheduler.actions import (
    Action,
    BeginInterval,
    EndInterval,
    FreePlace,
    GiveUpStart,
    GrantPlace,
    MarkReady,
    MovePlace,
    NotePlace,
    NoteScaling,
    ProveInterval,
    SendStart,
    SendStop,
    SetBounds,
    SetResource,
)
from services.scheduler.scaling_store import note_bounds, note_scaling
from services.scheduler.views import ResourceView
from shared.database import Connection
from shared.ids import new_id


class StaleView(Exception):
    """The rows are no longer what was decided on (a command came between). Nothing was changed; look again."""


async def write(connection: Connection, epoch: int, view: ResourceView, action: Action) -> None:
    """Store one action, in a transaction that has passed the fence. Raises `StaleView`."""
    match action:
        case GrantPlace():
            await connection.execute(
                """INSERT INTO scheduler.places
                       (resource_id, place, state, incarnation, worker_id, node_id, device, epoch, start_attempt)
                   VALUES ($1, $2, 'starting', $3, $4, $5, $6, $7, $8)""",
                view.resource_id,
                action.place,
                new_id("inc"),
                new_id("wrk"),
                action.node_id,
                action.device,
                epoch,
                action.start_attempt,
            )
        case NotePlace():
            await connection.execute(
                """UPDATE scheduler.places SET phase = $2, device = $3, epoch = $5,
                       reported_at = coalesce(to_timestamp($4), reported_at)
                   WHERE incarnation = $1""",
                action.incarnation,
                action.phase,
                action.device,
                action.reported_at,
                epoch,
            )
        case MarkReady():
            await _mark_ready(connection, epoch, view, action)
        case MovePlace():
            await _move(connection, epoch, action.incarnation, action.came_from, action.to)
        case GiveUpStart():
            await _record_start(connection, view, action.incarnation, None, action.words)
            await _move(connection, epoch, action.incarnation, "starting", "draining")
        case FreePlace():
            if action.failed_start is not None:
                await _record_start(connection, view, action.incarnation, None, action.failed_start)
            await connection.execute(
                "DELETE FROM scheduler.places WHERE incarnation = $1", action.incarnation
            )
        case BeginInterval():
            await _begin_interval(connection, view, action.place, action.incarnation, action.at)
        case ProveInterval():
            await connection.execute(
                """UPDATE scheduler.state_intervals SET proved_until = greatest(proved_until, to_timestamp($2))
                   WHERE incarnation = $1 AND ended_at IS NULL""",
                action.incarnation,
                action.until,
            )
        case EndInterval():
            await connection.execute(
                """UPDATE scheduler.state_intervals SET proved_until = greatest(proved_until, to_timestamp($2)),
                       ended_at = greatest(proved_until, to_timestamp($2))
                   WHERE incarnation = $1 AND ended_at IS NULL""",
                action.incarnation,
                action.until,
            )
        case SendStop():
            # Written before it is sent: from here on the worker may know, so the drain is not taken back.
            await connection.execute(
                """UPDATE scheduler.places SET drain_sent_at = coalesce(drain_sent_at, clock_timestamp()), epoch = $2
                   WHERE incarnation = $1""",
                action.incarnation,
                epoch,
            )
        case SetBounds():
            if not await note_bounds(connection, view.resource_id, action.version, action.bounds):
                raise StaleView(f"the scaling settings of {view.resource_id} have changed")
        case NoteScaling():
            await note_scaling(connection, view.resource_id, action)
        case SetResource():
            await connection.execute(
                """UPDATE scheduler.resources SET state = $2, reason = $3, expected_live_at = to_timestamp($4),
                       changed_at = CASE WHEN state <> $2 THEN now() ELSE changed_at END
                   WHERE resource_id = $1""",
                view.resource_id,
                action.state,
                action.reason,
                action.expected_live_at,
            )
        case SendStart():
            raise AssertionError("a start is sent, not stored")


async def _mark_ready(connection: Connection, epoch: int, view: ResourceView, action: MarkReady) -> None:
    if action.started:
        await _record_start(connection, view, action.incarnation, action.at, "")
    done = await connection.execute(
        """UPDATE scheduler.places SET state = 'ready', phase = 'ready', epoch = $3, reported_at = to_timestamp($2),
               ready_at = coalesce(ready_at, to_timestamp($2))
           WHERE incarnation = $1 AND state IN ('starting', 'lost')""",
        action.incarnation,
        action.at,
        epoch,
    )
    _expect_one(done, action.incarnation)
    await _begin_interval(connection, view, action.place, action.incarnation, action.at)


async def _begin_interval(
    connection: Connection, view: ResourceView, place: int, incarnation: str, at: float
) -> None:
    await connection.execute(
        """INSERT INTO scheduler.state_intervals
               (incarnation, resource_id, team_id, place, pool, hourly_rate_nanousd, started_at, proved_until)
           VALUES ($1, $2, $3, $4, $5, $6, to_timestamp($7), to_timestamp($7))
           ON CONFLICT DO NOTHING""",
        incarnation,
        view.resource_id,
        view.team_id,
        place,
        view.pool,
        view.hourly_rate_nanousd,
        at,
    )


async def _record_start(
    connection: Connection, view: ResourceView, incarnation: str, succeeded_at: float | None, reason: str
) -> None:
    """Remember how a start went; the first word about an incarnation holds. succeeded_at: None for a failure."""
    await connection.execute(
        """INSERT INTO scheduler.starts (incarnation, resource_id, option_id, granted_at, ended_at, succeeded, reason)
           SELECT incarnation, resource_id, $2, granted_at,
                  greatest(granted_at, coalesce(to_timestamp($3), clock_timestamp())), $3 IS NOT NULL, $4
           FROM scheduler.places WHERE incarnation = $1
           ON CONFLICT DO NOTHING""",
        incarnation,
        view.option_id,
        succeeded_at,
        reason[:500],
    )


async def _move(connection: Connection, epoch: int, incarnation: str, came_from: str, to: str) -> None:
    done = await connection.execute(
        "UPDATE scheduler.places SET state = $3, epoch = $4 WHERE incarnation = $1 AND state = $2",
        incarnation,
        came_from,
        to,
        epoch,
    )
    _expect_one(done, incarnation)


def _expect_one(done: str, incarnation: str) -> None:
    if done != "UPDATE 1":
        raise StaleView(f"the place of {incarnation} is not as it was")
