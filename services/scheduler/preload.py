"""Which models a starting worker loads before it says that it is ready: those that its resource was asked for last."""

from __future__ import annotations

import asyncpg

from shared.database import Database
from shared.messages import ModelRef, WeightsRef

MAX_PRELOADED = 4

# Asked for most lately first, then those never asked for, the oldest first. A pool hosts the platform's models.
_MODELS = """
    SELECT m.model_id, m.revision, m.name, m.folder, m.signature, m.base_model_id, m.base_revision, m.base_name,
           m.base_folder
    FROM gateway_api.models_v1 m
    LEFT JOIN LATERAL (
        SELECT max(r.accepted_at) AS last_asked FROM billing_api.requests_v1 r
        WHERE r.resource_id = $2 AND r.model_id = m.model_id AND r.accepted_at > now() - interval '7 days'
    ) AS used ON true
    WHERE m.model_type = $1 AND m.team_id = $3
    ORDER BY used.last_asked DESC NULLS LAST, m.created_at
    LIMIT $4
"""


async def models_to_preload(
    database: Database, model_type: str, resource_id: str, team_id: str
) -> list[ModelRef]:
    """Models of the resource's team and type, the likeliest first. Raises `Unavailable`."""
    rows = await database.fetch(_MODELS, model_type, resource_id, team_id, MAX_PRELOADED)
    return [_ref(row) for row in rows]


def _ref(row: asyncpg.Record) -> ModelRef:
    base = None
    if row["base_model_id"] is not None:
        base = WeightsRef(
            model_id=row["base_model_id"],
            revision=row["base_revision"],
            name=row["base_name"],
            folder=row["base_folder"],
            signature=row["signature"],
        )
    return ModelRef(
        model_id=row["model_id"],
        revision=row["revision"],
        name=row["name"],
        folder=row["folder"],
        signature=row["signature"],
        base=base,
    )
