"""Carries out commands of the gateway: each once, whatever arrives how often, with one stored answer."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from services.batch.states import OPEN_STATES
from services.batch.store import Store
from services.batch.views import Views
from shared.broker import Broker, Delivery
from shared.database import Connection
from shared.file_store import FileStore
from shared.ids import new_id
from shared.messages import BatchCommand, CancelBatch, CommandResult, CreateBatch, DeleteBatchFile
from shared.outcomes import Done, Dropped, Outcome, Unavailable

log = structlog.get_logger()


class CommandHandler:
    """changed: told when there is something new to look at. open_per_team: batches that may be open at once."""

    def __init__(
        self,
        broker: Broker,
        store: Store,
        views: Views,
        files: FileStore,
        changed: Callable[[], None],
        open_per_team: int,
    ) -> None:
        self._broker, self._store, self._views, self._files = broker, store, views, files
        self._changed = changed
        self._open_per_team = open_per_team

    async def on_command(self, delivery: Delivery) -> Outcome:
        command: BatchCommand = delivery.message
        if command.deadline_unix_ms < time.time_ns() // 1_000_000:
            return Dropped("command is past its deadline")
        deleted: str | None = None
        async with self._store.writing() as connection:
            result = await self._store.result_of(connection, command.command_id)
            if result is None:
                match command:
                    case CreateBatch():
                        result = await self._create(connection, command)
                    case CancelBatch():
                        result = await self._cancel(connection, command)
                    case DeleteBatchFile():
                        deleted = await self._store.delete_file(connection, command.team_id, command.file_id)
                        result = _yes(command) if deleted is not None else _no(command, "not_found")
                await self._store.keep_result(connection, result)
        if deleted is not None:
            await self._files.delete(deleted)
        self._changed()
        log.info("command_done", command_id=command.command_id, code=result.code, actor=command.actor)
        try:
            await self._broker.send(command.reply_queue, result)
        except Unavailable as error:
            # Whoever asked repeats the command and gets this same answer.
            log.warning("command_answer_not_sent", command_id=command.command_id, reason=str(error))
        return Done()

    async def _create(self, connection: Connection, command: CreateBatch) -> CommandResult:
        file = await self._views.input_file(command.team_id, command.input_file_id)
        if file is None:
            return _no(command, "file_not_found", "There is no such file.")
        if await self._store.open_count(connection, command.team_id) >= self._open_per_team:
            message = f"A team has at most {self._open_per_team} batches that are not over."
            return _no(command, "too_many_batches", message)
        batch_id = new_id("batch")
        await self._store.add_batch(connection, batch_id, command, file.storage_path)
        return _yes(command, batch_id=batch_id)

    async def _cancel(self, connection: Connection, command: CancelBatch) -> CommandResult:
        state = await self._store.lock_batch(connection, command.team_id, command.batch_id)
        if state is None:
            return _no(command, "not_found")
        if state in ("validating", "in_progress"):
            await self._store.begin_cancelling(connection, command.batch_id)
        elif state not in OPEN_STATES and state != "cancelled":
            return _no(command, "batch_over", f"The batch is {state} already.")
        return _yes(command)


def _yes(command: BatchCommand, **body: str) -> CommandResult:
    return CommandResult(command_id=command.command_id, ok=True, body=dict(body))


def _no(command: BatchCommand, code: str, message: str = "") -> CommandResult:
    return CommandResult(command_id=command.command_id, ok=False, code=code, message=message)
