"""SQL of the resources that batches have for themselves. Writes are the leader's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import msgspec

from services.batch.own_rules import Seen
from services.batch.quote import Counted, Option, OptionQuote, Quote
from services.batch.store import Store
from shared.database import Connection, Database
from shared.messages import OwnResource

_ROWS = """
    SELECT o.batch_id, o.team_id, b.key_id, b.state AS batch_state, o.state, o.option_name, o.max_gpus, o.quote_id, o.option_id,
           o.max_batch, o.gpus, o.gpus_at_most, o.start_s, o.resource_id, b.total - b.completed - b.failed AS lines_left,
           b.lines_per_s::float8 AS lines_per_s, b.model_type, b.model_id, b.expires_at,
           extract(epoch FROM now() - coalesce(o.held_at, now()))::float8 AS held_for_s
    FROM batch.own_resources o JOIN batch.batches b USING (batch_id)
"""


@dataclass(frozen=True, slots=True)
class OwnRow:
    """A batch that has, or is to have, a resource for itself."""

    batch_id: str
    team_id: str
    key_id: str
    batch_state: str
    state: str
    option_name: str | None
    max_gpus: int | None
    quote_id: str | None
    option_id: str | None
    max_batch: int | None
    gpus: int | None
    gpus_at_most: int | None
    start_s: float | None
    resource_id: str | None
    lines_left: int
    lines_per_s: float
    model_type: str | None
    model_id: str | None
    expires_at: datetime
    held_for_s: float


async def add_own(connection: Connection, batch_id: str, team_id: str, wanted: OwnResource) -> None:
    """Note, with the batch, that it is to have a resource for itself."""
    await connection.execute(
        "INSERT INTO batch.own_resources (batch_id, team_id, option_name, max_gpus, quote_id) VALUES ($1, $2, $3, $4, $5)",
        batch_id,
        team_id,
        wanted.option,
        wanted.max_gpus,
        wanted.quote_id,
    )


class OwnTable:
    def __init__(self, database: Database, store: Store) -> None:
        self._database, self._store = database, store

    async def get(self, batch_id: str) -> OwnRow | None:
        row = await self._database.fetchrow(_ROWS + " WHERE o.batch_id = $1", batch_id)
        return None if row is None else OwnRow(**dict(row))

    async def held(self) -> list[OwnRow]:
        """Those whose resource may be there."""
        rows = await self._database.fetch(_ROWS + " WHERE o.state = 'held' ORDER BY o.batch_id")
        return [OwnRow(**dict(row)) for row in rows]

    async def seen(self, rows: list[OwnRow]) -> Mapping[str, Seen]:
        """The resources of these batches that are there, by batch: they bear the batches' ids as names."""
        found = await self._database.fetch(
            "SELECT r.name, r.resource_id, r.wanted, r.state, extract(epoch FROM h.on_until - now())::float8 AS on_for_s"
            " FROM scheduler_api.resources_v1 r JOIN scheduler_api.holds_v1 h USING (resource_id)"
            " JOIN unnest($1::text[], $2::text[]) AS own (batch_id, team_id)"
            "   ON r.name = own.batch_id AND r.team_id = own.team_id"
            " WHERE r.deleted_at IS NULL",
            [row.batch_id for row in rows],
            [row.team_id for row in rows],
        )
        return {
            row["name"]: Seen(row["resource_id"], row["wanted"], row["state"], row["on_for_s"])
            for row in found
        }

    async def spendable(self, team_id: str) -> int | None:
        """In nano-USD; None is without a bound."""
        row = await self._database.fetchrow(
            "SELECT spendable_nanousd FROM billing_api.spendable_v1 WHERE team_id = $1", team_id
        )
        return None if row is None else row["spendable_nanousd"]

    async def stopped(self, row: OwnRow, resource_id: str | None) -> bool:
        """Whether a budget is used up that stops this batch, or resources of the team, or the team has nothing to spend."""
        found = await self._database.fetchrow(
            """
            SELECT 1 FROM billing_api.capped_resources_v1 c
            WHERE c.team_id = $1 AND (c.resource_id IS NULL OR c.resource_id = $2)
            UNION ALL
            SELECT 1 FROM billing_api.capped_batches_v1 c
            WHERE c.team_id = $1 AND (c.scope, c.scope_id) IN (('team', $1), ('resource', $2), ('model', $3), ('key', $4))
            UNION ALL
            SELECT 1 FROM billing_api.spendable_v1 s WHERE s.team_id = $1 AND s.spendable_nanousd = 0
            LIMIT 1
            """,
            row.team_id,
            resource_id,
            row.model_id,
            row.key_id,
        )
        return found is not None

    async def live_gpus(self, resource_id: str) -> int:
        row = await self._database.fetchrow(
            "SELECT live_count FROM scheduler_api.resources_v1 WHERE resource_id = $1", resource_id
        )
        return 0 if row is None else int(row["live_count"])

    async def quoted(self, team_id: str, quote_id: str, input_path: str, endpoint: str) -> Quote | None:
        """A quote of this file; None if there is none (any more)."""
        row = await self._database.fetchrow(
            "SELECT quote FROM batch.quotes WHERE team_id = $1 AND quote_id = $2 AND input_path = $3 AND endpoint = $4"
            " AND state = 'ready'",
            team_id,
            quote_id,
            input_path,
            endpoint,
        )
        return None if row is None else msgspec.json.decode(row["quote"], type=Quote)

    async def hold(self, batch_id: str, option: Option, quoted: OptionQuote, counted: Counted) -> None:
        """Note what the batch gets, before the resource is asked for: from now on it has to go when the batch is over."""
        async with self._store.writing() as connection:
            await connection.execute(
                "UPDATE batch.own_resources SET state = 'held', held_at = now(), option_id = $2, max_batch = $3, gpus = $4,"
                " gpus_at_most = $5, start_s = $6, quoted = $7, counted = $8 WHERE batch_id = $1 AND state = 'wanted'",
                batch_id,
                option.option_id,
                option.max_batch,
                quoted.gpus,
                quoted.gpus_at_most,
                quoted.start_s,
                msgspec.json.encode(quoted).decode(),
                msgspec.json.encode(counted).decode(),
            )

    async def note_asked(self, batch_id: str) -> None:
        """The command to make the resource goes out (again): from now on it may be carried out for a while."""
        async with self._store.writing() as connection:
            await connection.execute(
                "UPDATE batch.own_resources SET held_at = now() WHERE batch_id = $1 AND state = 'held'",
                batch_id,
            )

    async def note_resource(self, batch_id: str, resource_id: str) -> None:
        await self._set(batch_id, "resource_id = $2", resource_id)

    async def note_gpus(self, batch_id: str, gpus: int) -> None:
        await self._set(batch_id, "gpus = $2", gpus)

    async def release(self, batch_id: str) -> None:
        await self._set(batch_id, "state = $2, released_at = now()", "released")

    async def _set(self, batch_id: str, assignment: str, value: object) -> None:
        """assignment: one of the constants above."""
        async with self._store.writing() as connection:
            await connection.execute(
                f"UPDATE batch.own_resources SET {assignment} WHERE batch_id = $1 AND state <> 'released'",
                batch_id,
                value,
            )
