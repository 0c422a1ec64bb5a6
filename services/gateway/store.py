"""All SQL on the gateway's own tables but those of models (`model_registry.py`). Every query of a team's things takes
the team's id.

Reads of other services' views are in `views.py`. A refused row that means something to a client (a name taken) comes
back as a value; everything else that PostgreSQL refuses is a bug and raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import asyncpg

from shared.database import Database
from shared.inference.principal import Principal

KEYS_PER_TEAM = 50

Row = asyncpg.Record

_PRINCIPAL = """
    SELECT k.secret_sha256, k.key_id, k.scopes, t.team_id, t.slug, t.is_platform, t.ppt_fallback, t.suspended
    FROM gateway.api_keys k JOIN gateway.teams t USING (team_id)
    WHERE k.revoked_at IS NULL AND k.secret_sha256 = ANY($1)
"""


@dataclass(frozen=True, slots=True)
class NewKey:
    key_id: str
    team_id: str
    name: str
    prefix: str
    secret_sha256: bytes
    scopes: tuple[str, ...]


class NameTaken(Exception):
    """Another row has this name already."""


class LimitReached(Exception):
    """The team has as many of these as it may."""


class Store:
    """The gateway's tables."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ---- who asks

    async def principals(
        self, digests: Iterable[bytes], timeout_s: float
    ) -> dict[bytes, tuple[Principal, bool]]:
        """Return the principal of each valid key by the key's digest, and whether its team is suspended."""
        rows = await self._database.fetch(_PRINCIPAL, list(digests), timeout_s=timeout_s)
        return {
            row["secret_sha256"]: (
                Principal(
                    key_id=row["key_id"],
                    team_id=row["team_id"],
                    team_slug=row["slug"],
                    is_platform=row["is_platform"],
                    ppt_fallback=row["ppt_fallback"],
                    scopes=frozenset(row["scopes"]),
                ),
                row["suspended"],
            )
            for row in rows
        }

    async def ensure_platform(self, team_id: str, key: NewKey) -> None:
        """Make the platform team and its key; an older platform key made this way is revoked. Idempotent."""
        async with self._database.transaction() as connection:
            await connection.execute(
                "INSERT INTO gateway.teams (team_id, slug, name, is_platform) VALUES ($1, 'platform', 'Platform', true)"
                " ON CONFLICT DO NOTHING",
                team_id,
            )
            platform_id = await connection.fetchval("SELECT team_id FROM gateway.teams WHERE is_platform")
            await connection.execute(
                "UPDATE gateway.api_keys SET revoked_at = now()"
                " WHERE team_id = $1 AND name = $2 AND secret_sha256 <> $3 AND revoked_at IS NULL",
                platform_id,
                key.name,
                key.secret_sha256,
            )
            await connection.execute(
                "INSERT INTO gateway.api_keys (key_id, team_id, name, prefix, secret_sha256, scopes)"
                " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (secret_sha256) DO UPDATE SET revoked_at = NULL"
                " WHERE api_keys.team_id = EXCLUDED.team_id AND api_keys.name = EXCLUDED.name",
                key.key_id,
                platform_id,
                key.name,
                key.prefix,
                key.secret_sha256,
                list(key.scopes),
            )

    # ---- teams

    async def add_team(self, team_id: str, slug: str, name: str, ppt_fallback: bool) -> Row:
        """Raises `NameTaken` for a slug in use."""
        try:
            async with self._database.transaction() as connection:
                return _one(
                    await connection.fetchrow(
                        "INSERT INTO gateway.teams (team_id, slug, name, ppt_fallback) VALUES ($1, $2, $3, $4)"
                        " RETURNING *",
                        team_id,
                        slug,
                        name,
                        ppt_fallback,
                    )
                )
        except asyncpg.UniqueViolationError as error:
            raise NameTaken from error

    async def team(self, team_id: str) -> Row | None:
        return await self._database.fetchrow("SELECT * FROM gateway.teams WHERE team_id = $1", team_id)

    async def team_by_slug(self, slug: str) -> Row | None:
        return await self._database.fetchrow("SELECT * FROM gateway.teams WHERE slug = $1", slug)

    async def teams(self, after: str, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT * FROM gateway.teams WHERE team_id > $1 ORDER BY team_id LIMIT $2", after, limit
        )

    async def change_team(self, team_id: str, name: str | None, ppt_fallback: bool | None) -> Row:
        async with self._database.transaction() as connection:
            return _one(
                await connection.fetchrow(
                    "UPDATE gateway.teams SET name = coalesce($2, name), ppt_fallback = coalesce($3, ppt_fallback)"
                    " WHERE team_id = $1 RETURNING *",
                    team_id,
                    name,
                    ppt_fallback,
                )
            )

    # ---- keys

    async def add_key(self, key: NewKey) -> Row:
        """Raises `LimitReached` when the team has `KEYS_PER_TEAM` valid keys."""
        async with self._database.transaction() as connection:
            # The row lock lets two concurrent requests not both take the last free place.
            await connection.fetchval(
                "SELECT 1 FROM gateway.teams WHERE team_id = $1 FOR UPDATE", key.team_id
            )
            held = await connection.fetchval(
                "SELECT count(*) FROM gateway.api_keys WHERE team_id = $1 AND revoked_at IS NULL", key.team_id
            )
            if held >= KEYS_PER_TEAM:
                raise LimitReached
            return _one(
                await connection.fetchrow(
                    "INSERT INTO gateway.api_keys (key_id, team_id, name, prefix, secret_sha256, scopes)"
                    " VALUES ($1, $2, $3, $4, $5, $6) RETURNING *",
                    key.key_id,
                    key.team_id,
                    key.name,
                    key.prefix,
                    key.secret_sha256,
                    list(key.scopes),
                )
            )

    async def keys(self, team_id: str, after: str, limit: int) -> list[asyncpg.Record]:
        return await self._database.fetch(
            "SELECT * FROM gateway.api_keys WHERE team_id = $1 AND key_id > $2 AND revoked_at IS NULL"
            " ORDER BY key_id LIMIT $3",
            team_id,
            after,
            limit,
        )

    async def has_key(self, team_id: str, key_id: str) -> bool:
        row = await self._database.fetchrow(
            "SELECT FROM gateway.api_keys WHERE team_id = $1 AND key_id = $2 AND revoked_at IS NULL",
            team_id,
            key_id,
        )
        return row is not None

    async def may_use_model(self, team_id: str, model_id: str) -> bool:
        """Whether it is the team's own model, or one of the platform's."""
        row = await self._database.fetchrow(
            "SELECT FROM gateway.models m JOIN gateway.teams t USING (team_id)"
            " WHERE m.model_id = $2 AND m.deleted_at IS NULL AND (m.team_id = $1 OR t.is_platform)",
            team_id,
            model_id,
        )
        return row is not None

    async def revoke_key(self, team_id: str, key_id: str) -> bytes | None:
        """Return the digest of the key that was revoked, or None when the team has no such valid key."""
        async with self._database.transaction() as connection:
            digest: bytes | None = await connection.fetchval(
                "UPDATE gateway.api_keys SET revoked_at = now()"
                " WHERE team_id = $1 AND key_id = $2 AND revoked_at IS NULL RETURNING secret_sha256",
                team_id,
                key_id,
            )
            return digest

    # ---- idempotency keys

    async def begin_idempotent(
        self, team_id: str, key: str, request_sha256: bytes, stale_s: int
    ) -> Row | None:
        """Take the key; None means it is ours now. Otherwise the row of the request that has it.

        A request that has not ended after `stale_s` died with its gateway: the key is free for the same request.
        """
        async with self._database.transaction() as connection:
            taken = await connection.fetchval(
                "INSERT INTO gateway.idempotency_keys AS held (team_id, key, request_sha256) VALUES ($1, $2, $3)"
                " ON CONFLICT (team_id, key) DO UPDATE SET created_at = now()"
                " WHERE held.status IS NULL AND held.request_sha256 = EXCLUDED.request_sha256"
                " AND held.created_at < now() - make_interval(secs => $4) RETURNING 1",
                team_id,
                key,
                request_sha256,
                float(stale_s),
            )
            if taken is not None:
                return None
            return await connection.fetchrow(
                "SELECT request_sha256, status, response FROM gateway.idempotency_keys"
                " WHERE team_id = $1 AND key = $2",
                team_id,
                key,
            )

    async def renew_idempotent(self, team_id: str, key: str) -> None:
        """Say that the key's first request still runs."""
        async with self._database.transaction() as connection:
            await connection.execute(
                "UPDATE gateway.idempotency_keys SET created_at = now()"
                " WHERE team_id = $1 AND key = $2 AND status IS NULL",
                team_id,
                key,
            )

    async def end_idempotent(self, team_id: str, key: str, status: int, response: Any) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(
                "UPDATE gateway.idempotency_keys SET status = $3, response = $4 WHERE team_id = $1 AND key = $2",
                team_id,
                key,
                status,
                json.dumps(response),
            )

    async def forget_idempotent(self, team_id: str, key: str) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(
                "DELETE FROM gateway.idempotency_keys WHERE team_id = $1 AND key = $2 AND status IS NULL",
                team_id,
                key,
            )

    async def sweep_idempotent(self, keep_s: int) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(
                "DELETE FROM gateway.idempotency_keys WHERE created_at < now() - make_interval(secs => $1)",
                float(keep_s),
            )


def _one(row: asyncpg.Record | None) -> Row:
    if row is None:
        raise RuntimeError("a statement that returns one row returned none")
    return row
