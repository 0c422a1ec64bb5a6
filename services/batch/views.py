"""SELECTs on other services' views: files, models and teams of the gateway, resources of the scheduler."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import asyncpg

from services.batch.routing import Purse
from shared.database import Connection, Database
from shared.inference.principal import BaseView, ModelView, ResourceView

_MODEL = "SELECT * FROM gateway_api.model_revisions_v1"


@dataclass(frozen=True, slots=True)
class InputFile:
    storage_path: str
    purpose: str


class Views:
    """What the batch service may read of other services."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def input_file(self, connection: Connection, team_id: str, file_id: str) -> InputFile | None:
        """connection: of the transaction it is asked in: one more of the pool beside it would be waited for by all, in vain."""
        row = await connection.fetchrow(
            "SELECT storage_path, purpose FROM gateway_api.files_v1 WHERE team_id = $1 AND file_id = $2",
            team_id,
            file_id,
        )
        return None if row is None else InputFile(row["storage_path"], row["purpose"])

    async def find_model(self, team_id: str, name: str) -> ModelView | None:
        """The current revision of a model that the team may use: its own by `name` or `team/name`, or the platform's."""
        if "\x00" in name:  # no text of the database's can be so
            return None
        slug, slash, own_name = name.rpartition("/")
        row = await self._database.fetchrow(
            _MODEL + " WHERE is_current AND name = $2 AND (team_id = $1 OR is_platform)"
            " AND CASE WHEN $4 THEN team_slug = $3 ELSE team_id = $1 END",
            team_id,
            own_name,
            slug,
            bool(slash),
        )
        return None if row is None else _model(row)

    async def model(self, model_id: str, revision: int) -> ModelView | None:
        """A given revision; None when the model was deleted."""
        row = await self._database.fetchrow(
            _MODEL + " WHERE model_id = $1 AND revision = $2", model_id, revision
        )
        return None if row is None else _model(row)

    async def existing(self, revisions: AbstractSet[tuple[str, int]]) -> set[tuple[str, int]]:
        """Those of these revisions, as (model, number), that are not deleted."""
        rows = await self._database.fetch(
            "SELECT model_id, revision FROM gateway_api.model_revisions_v1"
            " JOIN unnest($1::text[], $2::int[]) AS wanted (model_id, revision) USING (model_id, revision)",
            [each[0] for each in revisions],
            [each[1] for each in revisions],
        )
        return {(row["model_id"], row["revision"]) for row in rows}

    async def ppt_fallback(self, team_ids: list[str]) -> dict[str, bool]:
        """Whether each team lets its work go to shared pools while its own resource cannot take it."""
        rows = await self._database.fetch(
            "SELECT team_id, ppt_fallback FROM gateway_api.teams_v1 WHERE team_id = ANY($1)", team_ids
        )
        return {row["team_id"]: row["ppt_fallback"] for row in rows}

    async def is_suspended(self, team_id: str) -> bool:
        row = await self._database.fetchrow(
            "SELECT suspended FROM gateway_api.teams_v1 WHERE team_id = $1", team_id
        )
        return row is None or bool(row["suspended"])

    async def purse(self) -> Purse:
        """What tokens have a price now, who may spend nothing, and which budgets stop batches."""
        priced = await self._database.fetch(
            "SELECT DISTINCT model_type FROM billing_api.prices_v1 WHERE work_class = 'batch' AND starts_at <= now()"
        )
        spent = await self._database.fetch(
            "SELECT team_id FROM billing_api.spendable_v1 WHERE spendable_nanousd = 0"
        )
        stopped = await self._database.fetch(
            "SELECT team_id, scope, scope_id FROM billing_api.capped_batches_v1"
        )
        # What is reserved is no reason yet: it is what runs may cost at most, and each line asks for its own part.
        refused = await self._database.fetch(
            "SELECT team_id, scope, scope_id FROM billing_api.budgets_v1"
            " WHERE 'refuse_ppt' = ANY(actions) AND posted_nanousd >= limit_nanousd"
        )
        return Purse(
            frozenset(row[0] for row in priced),
            frozenset(row[0] for row in spent),
            frozenset((row[0], row[1], row[2]) for row in stopped),
            frozenset((row[0], row[1], row[2]) for row in refused),
        )

    async def resources(self, connection: Connection | None = None) -> list[ResourceView]:
        """connection: see `input_file`."""
        rows = await (connection or self._database).fetch(
            "SELECT resource_id, team_id, model_type, pool, wanted, state, live_count, max_context_tokens, reason,"
            " extract(epoch FROM expected_live_at)::float8 AS expected_live_unix_s,"
            " extract(epoch FROM created_at)::float8 AS created_unix_s,"
            " when_asleep = 'wake' AND min_now = 0 AND max_now > 0 AS wakes, takes_traffic"
            " FROM scheduler_api.resources_v1 JOIN scheduler_api.scaling_v1 USING (resource_id)"
            " JOIN scheduler_api.holds_v1 USING (resource_id) WHERE deleted_at IS NULL"
        )
        return [ResourceView(**dict(row)) for row in rows]


def _model(row: asyncpg.Record) -> ModelView:
    return ModelView(
        model_id=row["model_id"],
        team_id=row["team_id"],
        team_slug=row["team_slug"],
        name=row["name"],
        revision=row["revision"],
        folder=row["folder"],
        signature=row["signature"],
        model_type=row["model_type"],
        context_tokens=row["context_tokens"],
        vocab_size=row["vocab_size"],
        eos_token_ids=tuple(json.loads(row["eos_token_ids"])),
        created_unix_s=int(row["created_at"].timestamp()),
        base=None
        if row["base_model_id"] is None
        else BaseView(row["base_model_id"], row["base_name"], row["base_revision"], row["base_folder"]),
    )
