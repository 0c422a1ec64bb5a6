"""All SQL on models, their revisions and their types. Every query of a team's models takes the team's id.

A model's row is changed under its lock and counts its changes in `version`; what a refused change means comes back as one
of the exceptions here. Files are `model_import.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from services.gateway.revision_rules import REVISIONS_PER_MODEL, KeptRevision, Room, room_for_another
from services.gateway.store import LimitReached, NameTaken, Row
from shared.database import Connection, Database
from shared.inference.principal import BaseView, ModelView

MODELS_PER_TEAM = 500
"""Every gateway holds all models in memory, and each is a folder on the store's disk."""

_MODEL = """
    SELECT m.model_id, m.team_id, t.slug, m.name, m.signature, m.created_at, m.version, r.revision, r.folder,
           r.context_tokens, (r.manifest->>'vocab_size')::int AS vocab_size,
           r.manifest->'eos_token_ids' AS eos_token_ids, y.name AS model_type,
           r.base_model_id, r.base_revision, br.folder AS base_folder, bt.slug || '/' || b.name AS base_name
    FROM gateway.models m JOIN gateway.teams t USING (team_id) JOIN gateway.model_types y USING (signature)
    JOIN gateway.model_revisions r ON r.model_id = m.model_id AND r.revision = m.current_revision
    LEFT JOIN gateway.model_revisions br ON br.model_id = r.base_model_id AND br.revision = r.base_revision
    LEFT JOIN gateway.models b ON b.model_id = r.base_model_id
    LEFT JOIN gateway.teams bt ON bt.team_id = b.team_id
    WHERE m.deleted_at IS NULL
"""
_REVISIONS = """
    SELECT r.revision, r.revision = m.current_revision AS is_current, r.context_tokens, r.created_at,
           r.base_model_id, r.base_revision, bt.slug || '/' || b.name AS base_name,
           (SELECT sum((file->>'size_bytes')::bigint)::bigint FROM jsonb_array_elements(r.manifest->'files') AS file)
               AS size_bytes
    FROM gateway.models m JOIN gateway.model_revisions r USING (model_id)
    LEFT JOIN gateway.models b ON b.model_id = r.base_model_id
    LEFT JOIN gateway.teams bt ON bt.team_id = b.team_id
    WHERE m.team_id = $1 AND m.model_id = $2 AND m.deleted_at IS NULL AND r.removed_at IS NULL
    ORDER BY r.revision DESC
"""
# Of whichever team: a platform's model may carry other teams' adapters.
_STOOD_ON = """
    SELECT DISTINCT a.base_revision FROM gateway.model_revisions a JOIN gateway.models m USING (model_id)
    WHERE a.base_model_id = $1 AND a.removed_at IS NULL AND m.deleted_at IS NULL
"""


@dataclass(frozen=True, slots=True)
class NewRevision:
    """A revision whose files are in the store already."""

    model_id: str
    revision: int
    folder: str
    manifest: Mapping[str, Any]
    context_tokens: int
    base: tuple[str, int] | None = None
    """Of an adapter: model and revision that it stands on."""


class ModelGone(Exception):
    """The team has no such model, or no longer."""


class StaleVersion(Exception):
    """The model was changed since its reader saw it."""


class UnknownRevision(Exception):
    """The model has no such revision, or no longer."""


class BaseGone(Exception):
    """What an adapter stands on was deleted or removed since."""


class HasAdapters(Exception):
    """Adapters stand on the model."""


class ModelRegistry:
    """The gateway's tables of models."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def stamp(self) -> tuple[Any, ...]:
        """Return a value that changes whenever a model does: rows are never removed and versions only grow."""
        row = await self._database.fetchrow("SELECT count(*), sum(version) FROM gateway.models")
        return tuple(row) if row else ()

    async def models(self) -> list[ModelView]:
        """Return every model of every team."""
        return [_model(row) for row in await self._database.fetch(_MODEL)]

    async def models_of(self, team_id: str, after: str, limit: int) -> list[ModelView]:
        sql = _MODEL + " AND m.team_id = $1 AND m.model_id > $2 ORDER BY m.model_id LIMIT $3"
        return [_model(row) for row in await self._database.fetch(sql, team_id, after, limit)]

    async def model(self, team_id: str, model_id: str) -> ModelView | None:
        sql = _MODEL + " AND m.team_id = $1 AND m.model_id = $2"
        row = await self._database.fetchrow(sql, team_id, model_id)
        return None if row is None else _model(row)

    async def model_by_name(self, team_id: str, id_or_name: str) -> ModelView | None:
        """Return a model of the team or of the platform, by its id, by `team/name`, or by the name of the team's own."""
        sql = _MODEL + (
            " AND (m.team_id = $1 OR t.is_platform)"
            " AND (m.model_id = $2 OR t.slug || '/' || m.name = $2 OR (m.team_id = $1 AND m.name = $2))"
            " ORDER BY m.model_id = $2 DESC LIMIT 1"
        )
        row = await self._database.fetchrow(sql, team_id, id_or_name)
        return None if row is None else _model(row)

    async def has_model_named(self, team_id: str, name: str) -> bool:
        sql = "SELECT 1 FROM gateway.models WHERE team_id = $1 AND name = $2 AND deleted_at IS NULL"
        return await self._database.fetchrow(sql, team_id, name) is not None

    async def revisions(self, team_id: str, model_id: str) -> list[Row]:
        """Return what may be chosen, the newest first; empty when the team has no such model."""
        return await self._database.fetch(_REVISIONS, team_id, model_id)

    # ---- types

    async def model_type(self, signature: str) -> str | None:
        row = await self._database.fetchrow(
            "SELECT name FROM gateway.model_types WHERE signature = $1", signature
        )
        return None if row is None else row["name"]

    async def model_types(self) -> list[Row]:
        return await self._database.fetch(
            "SELECT name, signature, architecture, parameter_count FROM gateway.model_types ORDER BY name"
        )

    async def ensure_model_type(self, signature: str, name: str, architecture: str, parameters: int) -> str:
        """Return the name of the type; an existing one keeps its own. Raises `NameTaken` by another signature."""
        try:
            async with self._database.transaction() as connection:
                await connection.execute(
                    "INSERT INTO gateway.model_types (signature, name, architecture, parameter_count)"
                    " VALUES ($1, $2, $3, $4) ON CONFLICT (signature) DO NOTHING",
                    signature,
                    name,
                    architecture,
                    parameters,
                )
                found: str = await connection.fetchval(
                    "SELECT name FROM gateway.model_types WHERE signature = $1", signature
                )
                return found
        except asyncpg.UniqueViolationError as error:
            raise NameTaken from error

    # ---- changes

    async def add_model(self, team_id: str, name: str, signature: str, first: NewRevision) -> None:
        """Raises `NameTaken`, `BaseGone`, or `LimitReached` when the team has `MODELS_PER_TEAM` models."""
        try:
            async with self._database.transaction() as connection:
                # The row lock lets two concurrent requests not both take the last free place.
                await connection.fetchval(
                    "SELECT 1 FROM gateway.teams WHERE team_id = $1 FOR UPDATE", team_id
                )
                held = await connection.fetchval(
                    "SELECT count(*) FROM gateway.models WHERE team_id = $1 AND deleted_at IS NULL", team_id
                )
                if held >= MODELS_PER_TEAM:
                    raise LimitReached
                await connection.execute(
                    "INSERT INTO gateway.models (model_id, team_id, name, signature) VALUES ($1, $2, $3, $4)",
                    first.model_id,
                    team_id,
                    name,
                    signature,
                )
                await _insert_revision(connection, first)
        except asyncpg.UniqueViolationError as error:
            raise NameTaken from error

    async def next_revision(self, team_id: str, model_id: str) -> int:
        """Return a number that is given to nobody else. Raises `ModelGone`, or `LimitReached` without room for it."""
        async with self._database.transaction() as connection:
            current: int = (await _lock(connection, team_id, model_id))["current_revision"]
            await _room(connection, model_id, current)
            number: int = await connection.fetchval(
                "UPDATE gateway.models SET last_revision = last_revision + 1 WHERE model_id = $1"
                " RETURNING last_revision",
                model_id,
            )
            return number

    async def add_revision(self, team_id: str, new: NewRevision) -> None:
        """Make it the current one; the oldest gives way where there are too many.

        Raises as `next_revision`, and `BaseGone`.
        """
        async with self._database.transaction() as connection:
            current: int = (await _lock(connection, team_id, new.model_id))["current_revision"]
            room = await _room(connection, new.model_id, current)
            if room.gives_way is not None:
                await connection.execute(
                    "UPDATE gateway.model_revisions SET removed_at = now() WHERE model_id = $1 AND revision = $2",
                    new.model_id,
                    room.gives_way,
                )
            await _insert_revision(connection, new)
            await connection.execute(
                "UPDATE gateway.models SET current_revision = $2, version = version + 1 WHERE model_id = $1",
                new.model_id,
                new.revision,
            )

    async def change_model(
        self, team_id: str, model_id: str, name: str | None, revision: int | None, seen_version: int | None
    ) -> None:
        """Rename it, choose another revision. Raises `ModelGone`, `StaleVersion`, `UnknownRevision`, `NameTaken`."""
        try:
            async with self._database.transaction() as connection:
                row = await _lock(connection, team_id, model_id)
                if seen_version not in (None, row["version"]):
                    raise StaleVersion
                if revision is not None and not await connection.fetchval(
                    "SELECT 1 FROM gateway.model_revisions"
                    " WHERE model_id = $1 AND revision = $2 AND removed_at IS NULL",
                    model_id,
                    revision,
                ):
                    raise UnknownRevision
                await connection.execute(
                    "UPDATE gateway.models SET name = coalesce($2, name),"
                    " current_revision = coalesce($3, current_revision), version = version + 1 WHERE model_id = $1"
                    " AND (name, current_revision) IS DISTINCT FROM (coalesce($2, name), coalesce($3, current_revision))",
                    model_id,
                    name,
                    revision,
                )
        except asyncpg.UniqueViolationError as error:
            raise NameTaken from error

    async def delete_model(self, team_id: str, model_id: str) -> None:
        """Its files stay for a while: jobs on the way name the revision. Raises `ModelGone`, `HasAdapters`."""
        async with self._database.transaction() as connection:
            await _lock(connection, team_id, model_id)
            if await connection.fetch(_STOOD_ON, model_id):
                raise HasAdapters
            await connection.execute(
                "UPDATE gateway.models SET deleted_at = now(), version = version + 1 WHERE model_id = $1",
                model_id,
            )

    async def folders_unused_for(self, age_s: float) -> list[str]:
        """Return the store's folders of models and revisions that were removed at least so long ago."""
        rows = await self._database.fetch(
            "SELECT model_id AS folder FROM gateway.models WHERE deleted_at <= now() - make_interval(secs => $1)"
            " UNION ALL"
            " SELECT folder FROM gateway.model_revisions WHERE removed_at <= now() - make_interval(secs => $1)",
            age_s,
        )
        return [row["folder"] for row in rows]


async def _lock(connection: Connection, team_id: str, model_id: str) -> Row:
    row = await connection.fetchrow(
        "SELECT current_revision, version FROM gateway.models"
        " WHERE team_id = $1 AND model_id = $2 AND deleted_at IS NULL FOR UPDATE",
        team_id,
        model_id,
    )
    if row is None:
        raise ModelGone
    return row


async def _room(connection: Connection, model_id: str, current: int) -> Room:
    stood_on = {row["base_revision"] for row in await connection.fetch(_STOOD_ON, model_id)}
    rows = await connection.fetch(
        "SELECT revision FROM gateway.model_revisions WHERE model_id = $1 AND removed_at IS NULL", model_id
    )
    numbers = [row["revision"] for row in rows]
    kept = [KeptRevision(number, number == current, number in stood_on) for number in numbers]
    room = room_for_another(kept, REVISIONS_PER_MODEL)
    if room is None:
        raise LimitReached
    return room


async def _insert_revision(connection: Connection, new: NewRevision) -> None:
    base_id, base_revision = new.base or (None, None)
    if base_id is not None:
        # Under the base's lock, which whoever deletes it or removes a revision takes as well. Then, in a statement of its
        # own that sees what they did, whether it is still there.
        await connection.fetchval("SELECT 1 FROM gateway.models WHERE model_id = $1 FOR SHARE", base_id)
        if not await connection.fetchval(
            "SELECT 1 FROM gateway.models JOIN gateway.model_revisions USING (model_id)"
            " WHERE model_id = $1 AND revision = $2 AND deleted_at IS NULL AND removed_at IS NULL",
            base_id,
            base_revision,
        ):
            raise BaseGone
    await connection.execute(
        "INSERT INTO gateway.model_revisions"
        " (model_id, revision, folder, manifest, context_tokens, base_model_id, base_revision)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7)",
        new.model_id,
        new.revision,
        new.folder,
        json.dumps(new.manifest),
        new.context_tokens,
        base_id,
        base_revision,
    )


def _model(row: Row) -> ModelView:
    created: datetime = row["created_at"]
    base = None
    if row["base_model_id"] is not None:
        base = BaseView(row["base_model_id"], row["base_name"], row["base_revision"], row["base_folder"])
    return ModelView(
        model_id=row["model_id"],
        team_id=row["team_id"],
        team_slug=row["slug"],
        name=row["name"],
        revision=row["revision"],
        folder=row["folder"],
        signature=row["signature"],
        model_type=row["model_type"],
        context_tokens=row["context_tokens"],
        vocab_size=row["vocab_size"],
        eos_token_ids=tuple(json.loads(row["eos_token_ids"])),
        created_unix_s=int(created.timestamp()),
        base=base,
        version=row["version"],
    )
