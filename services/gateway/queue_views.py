"""SELECTs on the batch service's view of credentials for the teams' vhost, and where that vhost is."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from shared.database import Database

_SELECT = """
    SELECT credential_id, key_id, name, tag, created_at, rotated_at, ready FROM batch_api.queue_credentials_v1
"""


class QueueViews:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def credentials(self, team_id: str, after: str, limit: int) -> list[asyncpg.Record]:
        """Those in force, oldest first."""
        return await self._database.fetch(
            _SELECT + " WHERE team_id = $1 AND credential_id > $2 ORDER BY credential_id LIMIT $3",
            team_id,
            after,
            limit,
        )

    async def credential(self, team_id: str, credential_id: str) -> asyncpg.Record | None:
        return await self._database.fetchrow(
            _SELECT + " WHERE team_id = $1 AND credential_id = $2", team_id, credential_id
        )


@dataclass(frozen=True, slots=True)
class QueueDoor:
    """url: of the teams' vhost as teams reach it, without a user."""

    views: QueueViews
    url: str
    vhost: str
