"""Recurring batches: each time that is due makes one batch, in one transaction with the note that it did.

A time has one row, whatever came of it: so a time has one batch, across restarts and whichever service leads.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

import asyncpg
import msgspec
import structlog

from services.batch.opening import NotOpened, Opener
from services.batch.schedule_rules import find_due, first_time
from services.batch.store import Store
from shared.database import Connection, Database
from shared.ids import new_id
from shared.messages import (
    BatchTemplate,
    ChangeSchedule,
    CommandResult,
    CreateBatch,
    CreateSchedule,
    DeleteSchedule,
)
from shared.outcomes import Unavailable

log = structlog.get_logger()

LOOK_S = 1.0
DUE_AT_ONCE = 20
PER_TEAM = 50

ScheduleCommand = CreateSchedule | ChangeSchedule | DeleteSchedule


class Schedules:
    """Commands about schedules, and the task that makes their batches."""

    def __init__(self, database: Database, store: Store, opener: Opener) -> None:
        self._database, self._store, self._opener = database, store, opener

    # ---- commands

    async def carry_out(self, connection: Connection, command: ScheduleCommand) -> CommandResult:
        match command:
            case CreateSchedule():
                return await self._create(connection, command)
            case ChangeSchedule():
                return await self._change(connection, command)
            case DeleteSchedule():
                deleted = await connection.fetchval(
                    "UPDATE batch.schedules SET deleted_at = now() WHERE team_id = $1 AND schedule_id = $2"
                    " AND deleted_at IS NULL RETURNING schedule_id",
                    command.team_id,
                    command.schedule_id,
                )
                return _result(command, code="ok" if deleted is not None else "not_found")

    async def _create(self, connection: Connection, command: CreateSchedule) -> CommandResult:
        try:
            first = first_time(command.cron, command.time_zone, time.time())
        except ValueError as error:
            return _result(command, code="invalid_schedule", message=f"{error}.")
        await connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"batch schedules {command.team_id}"
        )
        held = await connection.fetchval(
            "SELECT count(*) FROM batch.schedules WHERE team_id = $1 AND deleted_at IS NULL", command.team_id
        )
        if held >= PER_TEAM:
            return _result(
                command, code="too_many_schedules", message=f"A team has at most {PER_TEAM} schedules."
            )
        schedule_id = new_id("sched")
        try:
            async with connection.transaction():
                await connection.execute(
                    "INSERT INTO batch.schedules (schedule_id, team_id, key_id, name, cron, time_zone, batch, input_file_id,"
                    " next_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, to_timestamp($9))",
                    schedule_id,
                    command.team_id,
                    command.key_id,
                    command.name,
                    command.cron,
                    command.time_zone,
                    msgspec.json.encode(command.batch).decode(),
                    command.batch.input_file_id,
                    first,
                )
        except asyncpg.UniqueViolationError:
            return _result(
                command, code="name_taken", message=f"The team has a schedule named {command.name!r}."
            )
        return _result(command, schedule_id=schedule_id)

    async def _change(self, connection: Connection, command: ChangeSchedule) -> CommandResult:
        """Pause, or go on: then from the next time on, and not with those of the pause."""
        row = await connection.fetchrow(
            "SELECT cron, time_zone, paused FROM batch.schedules WHERE team_id = $1 AND schedule_id = $2"
            " AND deleted_at IS NULL FOR UPDATE",
            command.team_id,
            command.schedule_id,
        )
        if row is None:
            return _result(command, code="not_found")
        next_unix_s = None
        if row["paused"] and not command.paused:
            next_unix_s = first_time(row["cron"], row["time_zone"], time.time())
        await connection.execute(
            "UPDATE batch.schedules SET paused = $2, next_at = coalesce(to_timestamp($3), next_at) WHERE schedule_id = $1",
            command.schedule_id,
            command.paused,
            next_unix_s,
        )
        return _result(command, schedule_id=command.schedule_id)

    # ---- what is due

    async def run(self) -> None:
        """Make the batches that are due, until cancelled."""
        while True:
            try:
                await self.make_due()
            except Unavailable as error:
                log.warning("schedules_held", error=str(error))
            await asyncio.sleep(LOOK_S)

    async def make_due(self) -> None:
        """One look. Raises `Unavailable`."""
        rows = await self._database.fetch(
            "SELECT schedule_id FROM batch.schedules WHERE next_at <= now() AND NOT paused AND deleted_at IS NULL"
            " ORDER BY next_at LIMIT $1",
            DUE_AT_ONCE,
        )
        for row in rows:
            async with self._store.writing() as connection:
                await self._make(connection, row["schedule_id"])

    async def _make(self, connection: Connection, schedule_id: str) -> None:
        row = await connection.fetchrow(
            "SELECT team_id, key_id, cron, time_zone, batch, extract(epoch FROM next_at)::float8 AS next_unix_s,"
            " extract(epoch FROM now())::float8 AS now_unix_s"
            " FROM batch.schedules WHERE schedule_id = $1 AND NOT paused AND deleted_at IS NULL FOR UPDATE",
            schedule_id,
        )
        if row is None:  # paused or deleted since
            return
        found = find_due(row["cron"], row["time_zone"], row["next_unix_s"], row["now_unix_s"])
        if found.due_unix_s is not None:
            await self._make_batch(connection, schedule_id, row, found.due_unix_s)
        await connection.execute(
            "UPDATE batch.schedules SET next_at = coalesce(to_timestamp($2), next_at), paused = $2::float8 IS NULL"
            " WHERE schedule_id = $1",
            schedule_id,
            found.next_unix_s,
        )

    async def _make_batch(
        self, connection: Connection, schedule_id: str, row: asyncpg.Record, due_unix_s: float
    ) -> None:
        due_at = datetime.fromtimestamp(due_unix_s, UTC)
        problem, batch_id = await self._unpaid(connection, row["team_id"], row["key_id"]), None
        if problem is None:
            template = msgspec.json.decode(row["batch"], type=BatchTemplate)
            command = CreateBatch(
                command_id=f"{schedule_id} {due_at:%Y-%m-%dT%H:%M}",
                deadline_unix_ms=0,
                reply_queue="",
                actor=f"schedule {schedule_id}",
                team_id=row["team_id"],
                key_id=row["key_id"],
                **msgspec.structs.asdict(template),
            )
            opened = await self._opener.open(connection, command)
            if isinstance(opened, NotOpened):
                problem = opened.code
            else:
                batch_id = opened
        await connection.execute(
            "INSERT INTO batch.schedule_runs (schedule_id, due_at, batch_id, problem) VALUES ($1, $2, $3, $4)",
            schedule_id,
            due_at,
            batch_id,
            problem,
        )
        log.info(
            "schedule_due",
            schedule_id=schedule_id,
            due_at=due_at.isoformat(),
            batch_id=batch_id,
            problem=problem,
        )

    async def _unpaid(self, connection: Connection, team_id: str, key_id: str) -> str | None:
        """Batches that come by themselves are not made while nobody would pay for them."""
        found: str | None = await connection.fetchval(
            """
            SELECT 'budget_exceeded' FROM billing_api.capped_batches_v1
            WHERE team_id = $1 AND (scope, scope_id) IN (('team', $1), ('key', $2))
            UNION ALL
            SELECT 'insufficient_credit' FROM billing_api.spendable_v1 WHERE team_id = $1 AND spendable_nanousd = 0
            LIMIT 1
            """,
            team_id,
            key_id,
        )
        return found


def _result(command: ScheduleCommand, code: str = "ok", message: str = "", **body: str) -> CommandResult:
    return CommandResult(
        command_id=command.command_id, ok=code == "ok", code=code, message=message, body=dict(body)
    )
