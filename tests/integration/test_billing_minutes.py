"""Minutes are posted as the hour goes on, once, from what the scheduler's intervals prove."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from datetime import datetime, timedelta

import asyncpg
import pytest

from services.billing import rounds
from services.billing.rounds import MinutesRound
from services.billing.settings import BillingSettings
from shared.settings import SettingsError, load
from tests.conftest import Vhost
from tests.integration.billing_stand import Stand, insert_interval, insert_rate, open_stand, until
from tests.integration.test_billing_broker import Process

RATE = 60_000_000_000  # one USD a minute, so that amounts are read as minutes
MINUTE = 10**9


def minutes_round(stand: Stand, lookback_h: int = 48) -> MinutesRound:
    return MinutesRound(stand.database, stand.instruments, lookback_h)


async def this_hour(stand: Stand) -> datetime:
    hour: datetime = await stand.admin.fetchval("SELECT date_trunc('hour', now(), 'UTC')")
    return hour


async def balances(admin: asyncpg.Connection[asyncpg.Record]) -> dict[str, int]:
    rows = await admin.fetch(
        "SELECT account_id, sum(amount_nanousd)::bigint AS amount FROM billing.entries GROUP BY account_id"
    )
    return {row["account_id"]: row["amount"] for row in rows}


async def test_minutes_grow_with_what_is_proved_and_repeats_post_nothing(database: str) -> None:
    async with open_stand(database) as stand:
        hour = await this_hour(stand) - timedelta(hours=1)
        await insert_interval(stand.admin, "inc_1", hour, hour + timedelta(seconds=90))
        minutes = minutes_round(stand)
        await minutes.once()
        await minutes.once()
        assert await balances(stand.admin) == {"team:team_a": -2 * MINUTE, "revenue:minutes": 2 * MINUTE}
        await stand.admin.execute(
            "UPDATE scheduler.state_intervals SET proved_until = $1", hour + timedelta(seconds=150)
        )
        await minutes.once()
        await minutes_round(stand).once()  # a process that has just started
        rows = await stand.admin.fetch(
            "SELECT unique_key, amount_nanousd FROM billing_api.ledger_v1 WHERE account_id = 'revenue:minutes' "
            "ORDER BY transaction_id"
        )
        charged = await stand.admin.fetchrow(
            "SELECT minutes, posted_nanousd, postings FROM billing.minute_charges"
        )
    key = f"minutes:res_a:0:{hour:%Y-%m-%dT%HZ}:{RATE}"
    assert [tuple(row) for row in rows] == [(f"{key}:1", 2 * MINUTE), (f"{key}:2", MINUTE)]
    assert charged is not None and tuple(charged) == (3, 3 * MINUTE, 2)


async def test_a_rate_that_changes_within_the_hour_shares_its_minutes(database: str) -> None:
    async with open_stand(database) as stand:
        hour = await this_hour(stand) - timedelta(hours=1)
        border = hour + timedelta(minutes=20, seconds=30)
        await insert_rate(stand.admin, RATE, hour - timedelta(days=1))
        await insert_rate(stand.admin, 2 * RATE, border)
        await insert_interval(stand.admin, "inc_1", hour, hour + timedelta(hours=1))
        await minutes_round(stand).once()
        rows = await stand.admin.fetch(
            "SELECT minutes FROM billing.minute_charges ORDER BY hourly_rate_nanousd"
        )
        assert [row["minutes"] for row in rows] == [21, 39]
        assert await balances(stand.admin) == {"team:team_a": -99 * MINUTE, "revenue:minutes": 99 * MINUTE}


async def test_shared_pools_are_not_charged_by_the_minute(database: str) -> None:
    async with open_stand(database) as stand:
        hour = await this_hour(stand) - timedelta(hours=1)
        await insert_interval(
            stand.admin, "inc_1", hour, hour + timedelta(minutes=5), resource_id="pool", pool=True
        )
        await minutes_round(stand).once()
        assert await balances(stand.admin) == {}


async def test_racing_processes_post_each_minute_once(database: str) -> None:
    async with AsyncExitStack() as stack:
        stands = [await stack.enter_async_context(open_stand(database, priced=(n == 0))) for n in range(4)]
        hour = await this_hour(stands[0]) - timedelta(hours=1)
        for place in range(6):
            await insert_interval(
                stands[0].admin, f"inc_{place}", hour, hour + timedelta(minutes=7), place=place
            )
        posters = [minutes_round(stand) for stand in stands]
        for _ in range(3):
            await asyncio.gather(*(poster.once() for poster in posters))
        assert (await balances(stands[0].admin))["team:team_a"] == -42 * MINUTE
        assert await stands[0].admin.fetchval("SELECT count(*) FROM billing.transactions") == 6


async def test_a_long_outage_is_caught_up_with_up_to_the_bound(database: str) -> None:
    async with open_stand(database) as stand:
        now_hour = await this_hour(stand)
        # Given minutes posted thirty hours ago, and a replica that stayed live until an hour ago
        start = now_hour - timedelta(hours=30)
        await insert_interval(stand.admin, "inc_1", start, start + timedelta(minutes=1))
        await minutes_round(stand).once()
        await stand.admin.execute(
            "UPDATE scheduler.state_intervals SET proved_until = $1", now_hour - timedelta(hours=1)
        )
        # When a process with a bound of ten hours looks, then one without
        await minutes_round(stand, lookback_h=10).once()
        assert (await balances(stand.admin))["team:team_a"] == -(1 + 9 * 60) * MINUTE
        rows = await stand.admin.fetch("SELECT hour FROM billing.minute_charges ORDER BY hour")
        assert rows[1]["hour"] == now_hour - timedelta(hours=10)


async def test_an_outage_is_caught_up_with_oldest_hour_first_in_small_transactions(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "CHUNK", 4)
    async with open_stand(database) as stand:
        now_hour = await this_hour(stand)
        await insert_interval(stand.admin, "inc_1", now_hour - timedelta(hours=30), now_hour)
        # When the first chunk is posted and the process dies
        assert await minutes_round(stand)._post_chunk()
        rows = await stand.admin.fetch("SELECT hour FROM billing.minute_charges ORDER BY hour")
        assert [row["hour"] for row in rows] == [now_hour - timedelta(hours=30 - n) for n in range(4)]
        # Then the next process goes on from there
        await minutes_round(stand).once()
        assert (await balances(stand.admin))["team:team_a"] == -30 * 60 * MINUTE
        assert await stand.admin.fetchval("SELECT count(*) FROM billing.transactions") == 30


@pytest.mark.timeout(90)
async def test_a_minute_that_is_proved_is_in_the_balance_within_a_minute(vhost: Vhost, database: str) -> None:
    """By the process as it is run, at its usual pace."""
    async with open_stand(database) as stand:
        start = await stand.admin.fetchval("SELECT date_trunc('hour', now(), 'UTC') - interval '30 minutes'")
        await insert_interval(stand.admin, "inc_1", start, start + timedelta(minutes=1))
        process = await Process.start(vhost, database)
        try:

            async def posted(minutes: int) -> bool:
                return (await balances(stand.admin)).get("team:team_a") == -minutes * MINUTE

            await until(lambda: posted(1))
            await stand.admin.execute(
                "UPDATE scheduler.state_intervals SET proved_until = $1", start + timedelta(minutes=2)
            )
            await until(lambda: posted(2), timeout_s=60)
        finally:
            assert await process.end(signal.SIGTERM) == 0


def test_no_setting_makes_the_balance_older_than_a_minute() -> None:
    environment = {"DATABASE_URL": "postgresql://x", "AMQP_URL": "amqp://x", "OPS_PORT": "0"}
    assert load(BillingSettings, environment).minutes_interval_s <= 30
    with pytest.raises(SettingsError, match="BILLING_MINUTES_INTERVAL_S"):
        load(BillingSettings, environment | {"BILLING_MINUTES_INTERVAL_S": "60.1"})
