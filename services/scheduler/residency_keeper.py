"""Keeps the table of models on workers (`worker_models.py`): what the leader heard, written when it changes."""

from __future__ import annotations

from collections.abc import Mapping

import asyncpg
import msgspec
import structlog

from services.scheduler.snapshot import Stored
from services.scheduler.worker_models import ModelKey, ModelRow, RowChanges, update_rows
from shared.database import DATABASE_ERRORS, Connection, Database
from shared.lease import Lease
from shared.messages import WorkerReport

log = structlog.get_logger()

_LOAD = """
    SELECT incarnation, model_id, revision, state, reason, weight_bytes, loads, load_ms_p50, load_ms_p95, hits, misses,
           pinned, preload
    FROM scheduler.worker_models WHERE incarnation = ANY($1) ORDER BY changed_at
"""
# Of a place that is free by now nothing is kept.
_WRITE = """
    INSERT INTO scheduler.worker_models
        (incarnation, model_id, revision, state, reason, weight_bytes, loads, load_ms_p50, load_ms_p95, hits, misses,
         pinned, preload)
    SELECT p.incarnation, r.model_id, r.revision, r.state, r.reason, r.weight_bytes, r.loads, r.load_ms_p50,
           r.load_ms_p95, r.hits, r.misses, r.pinned, r.preload
    FROM jsonb_to_recordset($2::jsonb) AS r (
        model_id text, revision int, state text, reason text, weight_bytes bigint, loads bigint, load_ms_p50 bigint,
        load_ms_p95 bigint, hits bigint, misses bigint, pinned boolean, preload boolean)
    JOIN scheduler.places p ON p.incarnation = $1
    ON CONFLICT (incarnation, model_id, revision) DO UPDATE SET
        state = excluded.state, reason = excluded.reason, weight_bytes = excluded.weight_bytes,
        loads = excluded.loads, load_ms_p50 = excluded.load_ms_p50, load_ms_p95 = excluded.load_ms_p95,
        hits = excluded.hits, misses = excluded.misses,
        pinned = excluded.pinned, preload = excluded.preload, changed_at = now()
"""
_WRITE_MEMORY = """
    INSERT INTO scheduler.worker_memory (incarnation, model_memory_bytes)
    SELECT incarnation, $2 FROM scheduler.places WHERE incarnation = $1
    ON CONFLICT (incarnation) DO UPDATE SET model_memory_bytes = excluded.model_memory_bytes
"""
_REMOVE = "DELETE FROM scheduler.worker_models WHERE incarnation = $1 AND model_id = $2 AND revision = $3"


async def _write(connection: Connection, incarnation: str, change: RowChanges, memory_bytes: int) -> None:
    rows = msgspec.json.encode(change.written).decode()
    await connection.execute(_WRITE, incarnation, rows)
    await connection.executemany(_REMOVE, [(incarnation, *key) for key in change.removed])
    await connection.execute(_WRITE_MEMORY, incarnation, memory_bytes)


class ResidencyKeeper:
    """The leader's; what it remembers is what the table holds, read anew when it takes the lead."""

    def __init__(self, database: Database, lease: Lease) -> None:
        self._database = database
        self._lease = lease
        self._epoch: int | None = None
        self._rows: dict[str, dict[ModelKey, ModelRow]] = {}
        self._memory_bytes: dict[str, int] = {}

    async def keep(self, stored: Stored, workers: Mapping[str, tuple[WorkerReport, float]]) -> None:
        """Write what the latest reports say of workers with a place. Raises `Fenced`, `Unavailable`."""
        if self._epoch != self._lease.epoch:
            self._epoch, self._rows, self._memory_bytes = self._lease.epoch, {}, {}
        placed = {place.incarnation for place in stored.places}
        self._rows = {key: rows for key, rows in self._rows.items() if key in placed}
        reports = {key: report for key, (report, _) in workers.items() if key in placed}
        await self._read([key for key in reports if key not in self._rows])
        changes = {key: update_rows(self._rows[key], report) for key, report in reports.items()}
        memory_bytes = {key: report.model_memory_bytes for key, report in reports.items()}
        changes = {
            key: change
            for key, change in changes.items()
            if change.written or change.removed or memory_bytes[key] != self._memory_bytes.get(key)
        }
        self._memory_bytes = {key: value for key, value in self._memory_bytes.items() if key in placed}
        if not changes:
            return
        written: list[str] = []
        async with self._database.transaction() as connection:
            await self._lease.fence(connection)
            for incarnation, change in changes.items():
                try:
                    async with connection.transaction():
                        await _write(connection, incarnation, change, memory_bytes[incarnation])
                except DATABASE_ERRORS:
                    raise
                except asyncpg.PostgresError:
                    # What one worker says, and no column takes, hides no other worker's models. It is tried again.
                    log.exception("models_of_worker_not_noted", incarnation=incarnation)
                else:
                    written.append(incarnation)
        for incarnation in written:
            self._rows[incarnation] = changes[incarnation].after
            self._memory_bytes[incarnation] = memory_bytes[incarnation]

    async def _read(self, incarnations: list[str]) -> None:
        if not incarnations:
            return
        found: dict[str, dict[ModelKey, ModelRow]] = {key: {} for key in incarnations}
        for record in await self._database.fetch(_LOAD, incarnations):
            fields = dict(record)
            incarnation = fields.pop("incarnation")
            row = ModelRow(**fields)
            found[incarnation][row.model_id, row.revision] = row
        self._rows |= found
