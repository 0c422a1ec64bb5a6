"""Opens a batch, for a command or for a schedule, in the transaction of whoever asks."""

from __future__ import annotations

from dataclasses import dataclass

from services.batch.own_table import add_own
from services.batch.store import Store
from services.batch.views import Views
from shared.database import Connection
from shared.ids import new_id
from shared.messages import CreateBatch


@dataclass(frozen=True, slots=True)
class NotOpened:
    """Why there is no batch."""

    code: str
    message: str


class Opener:
    """open_per_team: batches that may be open at once."""

    def __init__(self, store: Store, views: Views, open_per_team: int) -> None:
        self._store, self._views, self._open_per_team = store, views, open_per_team

    async def open(self, connection: Connection, command: CreateBatch) -> str | NotOpened:
        """Return the new batch's id."""
        file = await self._views.input_file(connection, command.team_id, command.input_file_id)
        if file is None:
            return NotOpened("file_not_found", "There is no such file.")
        if await self._store.open_count(connection, command.team_id) >= self._open_per_team:
            message = f"A team has at most {self._open_per_team} batches that are not over."
            return NotOpened("too_many_batches", message)
        batch_id = new_id("batch")
        await self._store.add_batch(connection, batch_id, command, file.storage_path)
        if command.own_resource is not None:
            await add_own(connection, batch_id, command.team_id, command.own_resource)
        return batch_id
