"""The storm's caps: a team whose clients go on asking when theirs is spent, and what slices are left over when all is over."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import aiohttp
import asyncpg

from infra.local.management_api import ApiError, ManagementApi
from loadtest.clients import RecordingClient
from loadtest.report import Row
from shared.usd import format_usd

AMPLE_USD = "1000.00"
LEARNED = 4
"""Requests whose cost tells how large the cap is to be."""
FITS = 10
"""So many times as much fits under it: it is spent in mid-storm."""
PAUSE_S = 0.5
SLICES_LIMIT_S = 480.0
"""What a killed gateway held is let go when no request of it can run (300 s) and all facts are read."""
POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class Money:
    """How the caps stood when everything was over."""

    limit_nanousd: int
    spent_nanousd: int
    refused: int
    leases: int
    left_over: int


def cap_team(api: ManagementApi, limit_usd: str = AMPLE_USD) -> str:
    """A hard cap of the whole team's month; return its id."""
    body = {"scope": "team", "period": "month", "limit_usd": limit_usd, "actions": ["refuse_ppt"]}
    return str(api.post("/api/budgets", body)["budget_id"])


@dataclass
class Capped:
    """A team on shared GPUs whose cap is spent soon, and whose client goes on."""

    client: RecordingClient
    api: ManagementApi
    model: str
    prompt: str
    max_tokens: int
    budget_id: str = ""
    limit_nanousd: int = 0

    async def learn(self, session: aiohttp.ClientSession) -> None:
        """Ask a few times under an ample cap, then make it `FITS` times what that cost."""
        self.budget_id = await asyncio.to_thread(cap_team, self.api)
        await asyncio.sleep(1.0)  # gateways look twice a second
        for _ in range(LEARNED):
            await self.ask(session)
        while True:
            stands = await self.stands()
            if stands["spent_nanousd"] and not stands["reserved_nanousd"]:
                break
            await asyncio.sleep(POLL_S)
        self.limit_nanousd = FITS * int(stands["spent_nanousd"])
        change = {"limit_usd": format_usd(self.limit_nanousd)}
        await asyncio.to_thread(self.api.patch, f"/api/budgets/{self.budget_id}", change)

    async def hammer(self, session: aiohttp.ClientSession) -> None:
        """Ask until cancelled, whatever the answer is."""
        while True:
            await self.ask(session)
            await asyncio.sleep(PAUSE_S)

    async def ask(self, session: aiohttp.ClientSession) -> None:
        await self.client.complete(session, self.model, self.prompt, self.max_tokens, stream=False)

    async def stands(self) -> dict[str, Any]:
        """The budget; what killed parts refuse is asked again."""
        while True:
            try:
                return await asyncio.to_thread(self.api.get, f"/api/budgets/{self.budget_id}")
            except ApiError:
                await asyncio.sleep(POLL_S)

    async def reckon(self, url: str, first: datetime) -> Money:
        """Wait until no slice is left, at most `SLICES_LIMIT_S`, and say how all stands then."""
        deadline_s = time.monotonic() + SLICES_LIMIT_S
        connection = await asyncpg.connect(url)
        try:
            while True:
                left = await connection.fetchval("SELECT count(*) FROM billing_api.held_leases_v1")
                if not left or time.monotonic() > deadline_s:
                    break
                await asyncio.sleep(POLL_S)
            # Leases that hold nothing are forgotten after ten minutes: those that are there are enough to see that there were any.
            made = await connection.fetchval(
                "SELECT count(*) FROM billing.budget_leases WHERE created_at >= $1 AND granted_nanousd > 0",
                first,
            )
        finally:
            await connection.close()
        spent = int((await self.stands())["spent_nanousd"])
        refused = sum(record.status == 402 for record in self.client.records)
        return Money(self.limit_nanousd, spent, refused, int(made), int(left))


def money_rows(money: Money) -> list[Row]:
    """A cap that was passed, or never met, and slices that are left over are below their floors. Pure."""
    kept = money.spent_nanousd <= money.limit_nanousd
    return [
        Row("spent under a cap that clients went on at", "nano-USD", money.spent_nanousd, money.limit_nanousd, float(kept), 1),
        Row("requests that it refused", "requests", money.refused, ratio=float(money.refused > 0), floor=1),
        Row("slices that gateways leased", "leases", money.leases, ratio=float(money.leases > 0), floor=1),
        Row("slices left over", "leases", money.left_over, ratio=float(not money.left_over), floor=1),
    ]  # fmt: skip
