"""What an owner of jobs knows of hard caps, of who pays from credit, and of prices: a snapshot that one task renews, and that
outlives the database."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

import structlog

from shared.budgets.caps import Cap, TokenPrice
from shared.budgets.period import credit_budget_id
from shared.database import Database
from shared.messages import BudgetAction
from shared.outcomes import Unavailable

log = structlog.get_logger()

REFRESH_S = 0.5


class BudgetTable:
    """Read without waiting. A cap that is made or a price that is set holds here `REFRESH_S` later.

    actions: budgets that do any of these when they are spent are caps here.
    """

    def __init__(self, database: Database, actions: Sequence[BudgetAction] = ("refuse_ppt",)) -> None:
        self._database = database
        self._actions = list(actions)
        self._caps: dict[str, list[Cap]] = {}
        self._prices: dict[tuple[str, str], list[TokenPrice]] = {}
        self._away = False
        self.loaded = False
        """Whether it was ever filled: before that a cap might be overlooked."""

    def caps_of_team(self, team_id: str) -> list[Cap]:
        return self._caps.get(team_id, [])

    def prices_of(self, model_type: str, work_class: str) -> list[TokenPrice]:
        return self._prices.get((model_type, work_class), [])

    async def refresh(self) -> None:
        """Renew the snapshot. Raises `Unavailable` and keeps the old one."""
        cap_rows = await self._database.fetch(
            "SELECT budget_id, team_id, scope, scope_id, period FROM billing_api.budgets_v1"
            " WHERE actions && $1",
            self._actions,
        )
        credit_rows = await self._database.fetch(
            "SELECT team_id FROM billing_api.spendable_v1 WHERE spendable_nanousd IS NOT NULL"
        )
        price_rows = await self._database.fetch(
            "SELECT model_type, work_class, prompt_nanousd, completion_nanousd,"
            " floor(extract(epoch FROM starts_at) * 1000)::bigint AS starts_unix_ms FROM billing_api.prices_v1"
        )
        caps: dict[str, list[Cap]] = defaultdict(list)
        for row in cap_rows:
            caps[row["team_id"]].append(Cap(**dict(row)))
        for row in credit_rows:
            team_id = row["team_id"]
            caps[team_id].append(Cap(credit_budget_id(team_id), team_id, "credit", team_id, "ever"))
        prices: dict[tuple[str, str], list[TokenPrice]] = defaultdict(list)
        for row in price_rows:
            prices[row["model_type"], row["work_class"]].append(TokenPrice(**dict(row)))
        self._caps, self._prices = dict(caps), dict(prices)
        self.loaded = True

    async def keep_fresh(self) -> None:
        """Renew until cancelled."""
        while True:
            try:
                await self.refresh()
            except Unavailable as error:
                if not self._away:
                    log.warning("budgets_not_refreshed", error=str(error))
                self._away = True
            else:
                self._away = False
            await asyncio.sleep(REFRESH_S)
