"""By the clock: computes each team's advice anew from its last days, and keeps it for whoever asks."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import msgspec

from services.billing import advice_store, store
from services.billing.adviser import ASSUMPTIONS, advise
from services.billing.instants import to_unix_us
from shared.database import Connection, Database

DAYS = 7
"""A week, so that weekends are in it."""


class AdviceRound:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def once(self) -> None:
        """Compute the advice of every team that asked or paid for anything in the last days."""
        async with self._database.transaction() as connection:
            end: datetime = await connection.fetchval("SELECT date_trunc('hour', now(), 'UTC')")
            first = end - timedelta(days=DAYS)
            teams = await advice_store.teams_seen(connection, first, end)
        for team_id in teams:
            async with self._database.transaction() as connection:
                document = await advice_of(connection, team_id, first, end)
                await advice_store.save_advice(connection, team_id, msgspec.json.encode(document).decode())


async def advice_of(connection: Connection, team_id: str, first: datetime, end: datetime) -> dict[str, Any]:
    """The whole answer for one team and whole hours."""
    minutes = await advice_store.load_minutes(connection, team_id, first, end)
    paid = await advice_store.load_paid(connection, team_id, first, end)
    model_types = sorted(minutes.keys() | paid.keys())
    prices = await store.load_prices(connection, model_types)
    told = []
    for model_type in model_types:
        advice = advise(
            minutes.get(model_type, []),
            paid.get(model_type, 0),
            prices,
            model_type,
            await advice_store.hourly_rate_nanousd(connection, team_id, model_type),
            await advice_store.load_seen(connection, team_id, model_type, first, end),
            to_unix_us(first),
            (end - first) // timedelta(hours=1),
        )
        told.append({"model_type": model_type, **asdict(advice)})
    idle = await advice_store.load_idle(connection, team_id, first, end)
    return {
        "from": first.isoformat().replace("+00:00", "Z"),
        "to": end.isoformat().replace("+00:00", "Z"),
        "assumptions": ASSUMPTIONS,
        "model_types": told,
        "idle_resources": [asdict(resource) for resource in idle],
    }
