"""Carries out commands of the gateway: each once, whatever arrives how often, with one stored answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import structlog

from services.batch.opening import NotOpened, Opener
from services.batch.quotes import COUNTING_PER_TEAM, QuoteTable
from services.batch.schedules import Schedules
from services.batch.states import OPEN_STATES
from services.batch.store import Store
from services.batch.views import Views
from shared.broker import Broker, Delivery
from shared.database import Connection
from shared.file_store import FileStore
from shared.ids import new_id
from shared.messages import (
    BatchCommand,
    CancelBatch,
    ChangeSchedule,
    CommandResult,
    CreateBatch,
    CreateQueueCredential,
    CreateSchedule,
    DeleteBatchFile,
    DeleteSchedule,
    QueueCredentialCommand,
    QuoteBatch,
    RevokeQueueCredential,
    RotateQueueCredential,
)
from shared.outcomes import Done, Dropped, Outcome, Unavailable

log = structlog.get_logger()


class QueueCommands(Protocol):
    """`submission.credentials.Credentials`."""

    async def run(self, connection: Connection, command: QueueCredentialCommand) -> CommandResult: ...


class CommandHandler:
    """changed: told when there is something new to look at. queue: who makes credentials for submission through the broker;
    None where that is not set up."""

    def __init__(
        self,
        broker: Broker,
        store: Store,
        views: Views,
        files: FileStore,
        changed: Callable[[], None],
        opener: Opener,
        quotes: QuoteTable,
        schedules: Schedules,
        queue: QueueCommands | None,
    ) -> None:
        self._broker, self._store, self._views, self._files = broker, store, views, files
        self._changed = changed
        self._opener, self._quotes, self._schedules = opener, quotes, schedules
        self._queue = queue

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
                    case QuoteBatch():
                        result = await self._quote(connection, command)
                    case CreateSchedule() | ChangeSchedule() | DeleteSchedule():
                        result = await self._schedules.carry_out(connection, command)
                    case CancelBatch():
                        result = await self._cancel(connection, command)
                    case DeleteBatchFile():
                        deleted = await self._store.delete_file(connection, command.team_id, command.file_id)
                        result = _yes(command) if deleted is not None else _no(command, "not_found")
                    case CreateQueueCredential() | RotateQueueCredential() | RevokeQueueCredential():
                        result = await self._queue_credential(connection, command)
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

    async def _queue_credential(
        self, connection: Connection, command: QueueCredentialCommand
    ) -> CommandResult:
        if self._queue is None:
            return _no(command, "queue_off", "Batches through the queue are not set up here.")
        return await self._queue.run(connection, command)

    async def _create(self, connection: Connection, command: CreateBatch) -> CommandResult:
        opened = await self._opener.open(connection, command)
        if isinstance(opened, NotOpened):
            return _no(command, opened.code, opened.message)
        return _yes(command, batch_id=opened)

    async def _quote(self, connection: Connection, command: QuoteBatch) -> CommandResult:
        file = await self._views.input_file(connection, command.team_id, command.input_file_id)
        if file is None:
            return _no(command, "file_not_found", "There is no such file.")
        if await self._quotes.counting_of(connection, command.team_id) >= COUNTING_PER_TEAM:
            message = f"At most {COUNTING_PER_TEAM} quotes of a team are counted at once."
            return _no(command, "too_many_quotes", message)
        quote_id = new_id("quote")
        await self._quotes.add(connection, quote_id, command, file.storage_path)
        return _yes(command, quote_id=quote_id)

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
