"""SQL of the reconciler: load what is stored, and apply what was decided, fenced by the leader's epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import asyncpg
import msgspec

from services.scheduler.actions import (
    Action,
    FreePlace,
    GiveUpStart,
    GrantPlace,
    MarkReady,
    MovePlace,
    NoteScaling,
    SendStart,
    SendStop,
    SetBounds,
    SetResource,
)
from services.scheduler.crowds import SeenCrowds
from services.scheduler.holds import end_holds
from services.scheduler.preload import models_to_preload
from services.scheduler.snapshot import Decided, Stored, StoredPlace, StoredResource
from services.scheduler.views import ResourceView
from services.scheduler.writes import StaleView, write
from shared.database import Connection, Database
from shared.lease import Lease
from shared.messages import ModelRef, NodeReport, ScalingWindow

LOAD_TIMEOUT_S = (
    4.0  # below the lease, so that a slow database costs the leadership and not the watch over it
)
KEPT_DAYS = 7
STARTS_KEPT_DAYS = 30
DEAD_LETTERS_KEPT_DAYS = 30
PRUNE_BATCH = 500

# Resources that are off and have no worker need no look. Times as Unix seconds; milliseconds are fine enough.
_RESOURCES = """
    WITH usual AS (
        SELECT option_id,
               percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM ended_at - granted_at)) AS start_s
        FROM (
            SELECT option_id, granted_at, ended_at,
                   row_number() OVER (PARTITION BY option_id ORDER BY ended_at DESC) AS newest
            FROM scheduler.starts WHERE succeeded AND ended_at > now() - interval '7 days'
        ) AS recent
        WHERE newest <= 20 GROUP BY option_id
    ), capped AS MATERIALIZED (
        SELECT DISTINCT team_id, resource_id FROM billing_api.capped_resources_v1
    )
    SELECT r.resource_id, r.team_id, r.model_type, r.option_id, r.pool, r.wanted, r.fixed_count, r.state, r.reason,
           round(extract(epoch FROM r.expected_live_at), 3)::float8 AS expected_live_at,
           r.autoscaling, r.min_count, r.max_count, r.idle_timeout_s, r.target_wait_s, r.windows, r.scaling_version, r.min_now, r.max_now,
           r.window_now, r.wanted_count, r.job_tokens, r.worker_tokens_per_s, r.crowds,
           extract(epoch FROM r.bounds_until)::float8 AS bounds_until,
           o.device_kind, o.precision, o.max_batch, o.max_context_tokens, o.kv_tokens, o.hourly_rate_nanousd,
           f.failures, extract(epoch FROM f.last_failure_at)::float8 AS last_failure_at,
           coalesce(f.last_failure, '') AS last_failure, usual.start_s::float8 AS usual_start_s,
           NOT r.pool AND EXISTS (
               SELECT 1 FROM capped c
               WHERE c.team_id = r.team_id AND coalesce(c.resource_id, r.resource_id) = r.resource_id
           ) AS is_capped
    FROM scheduler.resources r
    JOIN scheduler.performance_options o USING (option_id)
    LEFT JOIN usual USING (option_id)
    CROSS JOIN LATERAL (
        SELECT count(*)::int AS failures, max(ended_at) AS last_failure_at,
               (array_agg(reason ORDER BY ended_at DESC))[1] AS last_failure
        FROM scheduler.starts s
        WHERE s.resource_id = r.resource_id AND NOT s.succeeded AND s.ended_at > greatest(
            coalesce((SELECT max(ended_at) FROM scheduler.starts
                      WHERE resource_id = r.resource_id AND succeeded), '-infinity'),
            coalesce((SELECT max(decided_at) FROM scheduler.decisions
                      WHERE resource_id = r.resource_id AND action = 'turned_on'), '-infinity'))
    ) AS f
    WHERE r.wanted = 'on' OR r.state <> 'off'
       OR EXISTS (SELECT 1 FROM scheduler.places p WHERE p.resource_id = r.resource_id)
"""
_PLACES = """
    SELECT p.resource_id, p.place, p.state, p.incarnation, p.worker_id, p.node_id, p.device, o.device_kind, p.phase,
           p.start_attempt,
           extract(epoch FROM p.granted_at)::float8 AS granted_at,
           extract(epoch FROM p.ready_at)::float8 AS ready_at,
           extract(epoch FROM p.reported_at)::float8 AS reported_at,
           extract(epoch FROM p.drain_sent_at)::float8 AS drain_sent_at,
           extract(epoch FROM i.proved_until)::float8 AS proved_until,
           EXISTS (SELECT 1 FROM scheduler.starts s WHERE s.incarnation = p.incarnation AND NOT s.succeeded) AS given_up
    FROM scheduler.places p
    JOIN scheduler.resources r USING (resource_id)
    JOIN scheduler.performance_options o USING (option_id)
    LEFT JOIN scheduler.state_intervals i ON i.incarnation = p.incarnation AND i.ended_at IS NULL
"""


class Store:
    """The reconciler's tables. Each write is one transaction that the lease's fence makes the leader's."""

    def __init__(self, database: Database, lease: Lease) -> None:
        self._database = database
        self._lease = lease

    async def load(self) -> Stored:
        """Read one consistent state. Raises `Unavailable`."""

        async def query(connection: Connection) -> Stored:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                now = await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
                resources = await connection.fetch(_RESOURCES)
                places = await connection.fetch(_PLACES)
                quotas = await connection.fetch("SELECT scope, places FROM scheduler.quotas")
            return Stored(
                now=now,
                resources=[_resource(row) for row in resources],
                places=[StoredPlace(**dict(row)) for row in places],
                quotas={row["scope"]: row["places"] for row in quotas},
            )

        return await self._database.bounded(query, LOAD_TIMEOUT_S)

    async def models_to_preload(self, resource: StoredResource) -> list[ModelRef]:
        """What a worker that starts now should load first. Raises `Unavailable`."""
        return await models_to_preload(
            self._database, resource.model_type, resource.resource_id, resource.team_id
        )

    async def apply(self, decided: Decided) -> None:
        """Store all that was decided about one resource, or nothing. Raises `StaleView`, `Fenced`, `Unavailable`."""
        writes = [action for action in decided.actions if not _only_sends(action, decided.view)]
        if not writes:
            return
        try:
            async with self._database.transaction() as connection:
                epoch = await self._lease.fence(connection)
                inputs = msgspec.json.encode(decided.view).decode()
                for action in writes:
                    await write(connection, epoch, decided.view, action)
                    words = decision_of(decided.view, action)
                    if words is not None:
                        await connection.execute(
                            """INSERT INTO scheduler.decisions (resource_id, action, words, inputs)
                               VALUES ($1, $2, $3, $4)""",
                            decided.view.resource_id,
                            *words,
                            inputs,
                        )
        except (asyncpg.UniqueViolationError, asyncpg.CheckViolationError) as error:
            # The database's own bounds refused it: a command changed the resource after it was looked at.
            raise StaleView(f"{error.constraint_name or error}") from error

    async def note_nodes(self, nodes: Iterable[tuple[NodeReport, float]]) -> None:
        """Keep the nodes' reports for display. Raises `Fenced`, `Unavailable`."""
        rows = [
            (report.node_id, report.agent_id, msgspec.json.encode(report.devices).decode(), heard_at)
            for report, heard_at in nodes
        ]
        if not rows:
            return
        async with self._database.transaction() as connection:
            await self._lease.fence(connection)
            await connection.executemany(
                """INSERT INTO scheduler.nodes (node_id, agent_id, devices, reported_at)
                   VALUES ($1, $2, $3, to_timestamp($4))
                   ON CONFLICT (node_id) DO UPDATE SET agent_id = excluded.agent_id, devices = excluded.devices,
                       reported_at = excluded.reported_at""",
                rows,
            )

    async def end_holds(self) -> list[str]:
        """Turn off what was on for a time that is over. Raises `Fenced`, `Unavailable`."""
        async with self._database.transaction() as connection:
            await self._lease.fence(connection)
            return await end_holds(connection)

    async def prune(self) -> None:
        """Delete one small batch of what is older than it is kept. Raises `Fenced`, `Unavailable`."""
        tables = (
            ("command_results", "command_id", "created_at", KEPT_DAYS),
            ("decisions", "decision_id", "decided_at", KEPT_DAYS),
            ("starts", "incarnation", "ended_at", STARTS_KEPT_DAYS),
            ("nodes", "node_id", "reported_at", KEPT_DAYS),
            # What keeps its body is a fact about money: it waits for an operator, however long.
            ("dead_letters", "dead_letter_id", "body IS NULL AND received_at", DEAD_LETTERS_KEPT_DAYS),
        )
        async with self._database.transaction() as connection:
            await self._lease.fence(connection)
            for table, key, time, days in tables:
                await connection.execute(
                    f"""DELETE FROM scheduler.{table} WHERE {key} IN (
                            SELECT {key} FROM scheduler.{table} WHERE {time} < now() - make_interval(days => $1)
                            LIMIT $2)""",
                    days,
                    PRUNE_BATCH,
                )
            # Of models that are gone; of those that were asked for once, when nobody starts up with it any more.
            await connection.execute(
                """DELETE FROM scheduler.model_pins WHERE NOT EXISTS (
                       SELECT 1 FROM gateway_api.models_v1 m WHERE m.model_id = model_pins.model_id)"""
            )
            await connection.execute(
                "DELETE FROM scheduler.model_preloads WHERE asked_at < now() - interval '1 hour'"
            )

    async def job_queue_owners(self) -> Mapping[str, tuple[bool, bool]]:
        """Return (pool, deleted) of every resource whose job queues must be there, or gone since a day at most."""
        rows = await self._database.fetch(
            """SELECT resource_id, pool, deleted_at IS NOT NULL AS deleted FROM scheduler.resources
               WHERE deleted_at IS NULL OR deleted_at > now() - interval '1 day'"""
        )
        return {row["resource_id"]: (row["pool"], row["deleted"]) for row in rows}


def _resource(row: asyncpg.Record) -> StoredResource:
    columns = dict(row)
    windows = msgspec.json.decode(columns.pop("windows"), type=list[ScalingWindow])
    crowds = msgspec.json.decode(columns.pop("crowds") or "null", type=SeenCrowds | None)
    return StoredResource(windows=windows, crowds=crowds, **columns)


def _only_sends(action: Action, view: ResourceView) -> bool:
    """Whether the action writes nothing: a send, unless it is the first word to a draining place."""
    if isinstance(action, SendStop):
        return not any(
            p.incarnation == action.incarnation and p.drain_sent_at is None and action.drain
            for p in view.places
        )
    return isinstance(action, SendStart) or (isinstance(action, NoteScaling) and not action.note)


def decision_of(view: ResourceView, action: Action) -> tuple[str, str] | None:
    """The name and the words under which the action is remembered; None for mere bookkeeping."""
    match action:
        case GrantPlace():
            return "grant", action.words
        case MarkReady():
            return ("ready" if action.started else "found"), action.words
        case MovePlace():
            return action.action, action.words
        case GiveUpStart():
            return "give_up", action.words
        case FreePlace():
            return "free", action.words
        case NoteScaling() if action.record:
            return "scaling", action.words
        case SetBounds() if action.words:
            return "window", action.words
        case SetResource() if action.state != view.state:
            return "state", f"{view.state} → {action.state}" + (f": {action.reason}" if action.reason else "")
    return None
