"""Which models a starting worker loads before it says that it is ready: those that its resource was asked for last."""

from __future__ import annotations

from services.scheduler.model_refs import COLUMNS, model_ref
from shared.database import Database
from shared.messages import ModelRef

MAX_PRELOADED = 4

# Asked for most lately first, then those never asked for, the oldest first. A pool hosts the platform's models.
_MODELS = f"""
    SELECT {COLUMNS}
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
    return [model_ref(row) for row in rows]
