"""What is paid for, row by row of the table in services/billing/README.md, on the real ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.billing.__main__ import ROLE
from services.billing.instruments import Instruments
from services.billing.rounds import MinutesRound
from shared.database import Database
from shared.messages import UsageEvent
from tests.conftest import Vhost
from tests.integration.billing_stand import (
    EPOCH,
    Stand,
    insert_interval,
    insert_rate,
    job_charges,
    open_stand,
)
from tests.integration.fleet import Fleet, running_fleet
from tests.unit.billing.builders import make_usage, make_void

PROMPT, COMPLETION = 20, 60
"""Nano-USD for a token; 10 prompt and 20 completion tokens are what the builders' facts have."""
A_MINUTE = 10**9
"""What one costs at the rate of `insert_interval`'s option: a USD."""


@pytest.fixture
async def stand(database: str) -> AsyncIterator[Stand]:
    async with open_stand(database) as opened:
        await opened.admin.execute(
            "INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at) "
            "VALUES ('price_b', 'smollm2-135m', 'batch', 10, 30, $1)",
            EPOCH,
        )
        yield opened


def sent(count: int, **fields: Any) -> UsageEvent:
    """The gateway's word: its client went after so many tokens."""
    return make_void(delivered_tokens=count, **fields)


@pytest.mark.parametrize(
    ("facts", "amount", "postings"),
    [
        pytest.param([[make_usage()]], 10 * PROMPT + 20 * COMPLETION, 1, id="answered"),
        pytest.param(
            [[make_usage(outcome="cancelled", completion_tokens=9), sent(7)]], 10 * PROMPT + 7 * COMPLETION, 1,
            id="cancelled-at-token-7",
        ),
        pytest.param(
            [[make_usage(outcome="cancelled", completion_tokens=0), sent(0)]], 10 * PROMPT, 1,
            id="cancelled-when-the-prompt-was-read",
        ),
        pytest.param(
            [[make_usage(outcome="cancelled", completion_tokens=0, prefill_ran=False), sent(0)]], 0, 0,
            id="cancelled-in-the-queue",
        ),
        pytest.param([[make_usage(outcome="failed", error_code="poison")]], 0, 0, id="failed-by-us"),
        pytest.param(
            [[make_usage(outcome="failed", completion_tokens=5), make_void(reason="failed", delivered_tokens=5)]], 0, 0,
            id="failed-by-us-in-mid-answer",
        ),
        pytest.param(
            [[make_usage(outcome="expired", completion_tokens=0, prefill_ran=False)]], 0, 0, id="expired-in-the-queue"
        ),
        pytest.param(
            [[make_usage()], [make_void(reason="deadline", delivered_tokens=3)]], 0, 2, id="expired-in-mid-answer"
        ),
        pytest.param([[make_usage()], [sent(5)]], 10 * PROMPT + 5 * COMPLETION, 2, id="voided-after-its-charge"),
        pytest.param([[make_usage()], [make_usage()], [make_usage()]], 10 * PROMPT + 20 * COMPLETION, 1, id="told-again"),
        pytest.param(
            [[make_usage(attempt=1, completion_tokens=7, outcome="cancelled"), make_usage(attempt=2)]],
            10 * PROMPT + 20 * COMPLETION, 1, id="resumed-by-another-worker",
        ),
        pytest.param([[make_usage(work_class="batch")]], 10 * 10 + 20 * 30, 1, id="batch-at-its-price"),
        pytest.param([[make_usage(completion_tokens=3 * 20)]], 10 * PROMPT + 60 * COMPLETION, 1, id="n-answers"),
        pytest.param([[make_usage(completion_tokens=0)]], 10 * PROMPT, 1, id="a-prompt-that-is-only-scored"),
        pytest.param(
            [[make_usage(operation="embeddings", completion_tokens=0)]], 10 * PROMPT, 1, id="embeddings"
        ),
        pytest.param([[make_usage(billing="resource")]], 0, 0, id="on-gpus-of-ones-own"),
    ],
)  # fmt: skip
async def test_tokens(stand: Stand, facts: list[list[UsageEvent]], amount: int, postings: int) -> None:
    for told_together in facts:
        await stand.record(*told_together)
    assert await job_charges(stand.admin) == ({"job_1": (amount, postings)} if postings else {})


async def test_a_new_price_counts_for_what_is_accepted_from_then_on(stand: Stand) -> None:
    at_ms = make_usage().accepted_unix_ms
    await stand.admin.execute(
        "INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at) "
        "VALUES ('price_2', 'smollm2-135m', 'live', 40, 120, $1)",
        EPOCH + timedelta(milliseconds=at_ms),
    )
    # Accepted a millisecond earlier, it pays the old price, although it ends when the new one is in force
    await stand.record(make_usage(), make_usage(job_id="job_2", accepted_unix_ms=at_ms - 1))
    assert await job_charges(stand.admin) == {"job_1": (2 * 1400, 1), "job_2": (1400, 1)}


def live(start_s: int, end_s: int, **fields: Any) -> dict[str, Any]:
    return {"start_s": start_s, "end_s": end_s, **fields}


@pytest.mark.parametrize(
    ("intervals", "minutes"),
    [
        pytest.param([], 0, id="starting-or-failed-to-start"),
        pytest.param([live(0, 0)], 0, id="ready-and-not-yet-proved"),
        pytest.param([live(5, 65)], 1, id="live-for-a-minute"),
        pytest.param([live(0, 601, ended=True)], 11, id="drained-in-its-eleventh-minute"),
        pytest.param([live(0, 600, ended=True)], 10, id="lost-after-its-last-sign-of-life"),
        pytest.param([live(0, 90, ended=True), live(100, 190)], 3, id="redeployed-within-the-hour"),
        pytest.param([live(0, 600, ended=True), live(3000, 3600)], 20, id="off-and-on-again"),
        pytest.param(
            [live(at, at + 2, ended=True) for at in range(0, 300, 10)], 1, id="coming-and-going-all-the-time"
        ),
        pytest.param([live(0, 90), live(0, 90, place=1)], 4, id="two-gpus"),
        pytest.param([live(3570, 3630)], 2, id="across-the-hour"),
        pytest.param([live(0, 600, pool=True)], 0, id="shared-gpus"),
    ],
)
async def test_minutes(stand: Stand, intervals: list[dict[str, Any]], minutes: int) -> None:
    await post_minutes(stand, intervals)
    amount = await stand.admin.fetchval(
        "SELECT coalesce(-sum(amount_nanousd), 0)::bigint FROM billing_api.ledger_v1 WHERE account_id = 'team:team_a'"
    )
    assert amount == minutes * A_MINUTE


async def test_a_rate_that_changes_within_the_hour(stand: Stand) -> None:
    """Each rate pays its own minutes; the one in which it changed belongs to the earlier."""
    hour: datetime = await stand.admin.fetchval(
        "SELECT date_trunc('hour', now(), 'UTC') - interval '2 hours'"
    )
    await insert_rate(stand.admin, 60 * A_MINUTE, hour - timedelta(days=1))
    await insert_rate(stand.admin, 120 * A_MINUTE, hour + timedelta(seconds=1230))
    await post_minutes(stand, [live(0, 3600)])
    rows = await stand.admin.fetch("SELECT minutes, posted_nanousd FROM billing.minute_charges ORDER BY 1")
    assert [tuple(row) for row in rows] == [(21, 21 * A_MINUTE), (39, 2 * 39 * A_MINUTE)]


async def post_minutes(stand: Stand, intervals: list[dict[str, Any]]) -> None:
    hour: datetime = await stand.admin.fetchval("SELECT date_trunc('hour', now(), 'UTC')") - timedelta(
        hours=2
    )
    for number, interval in enumerate(intervals):
        start, end = interval.pop("start_s"), interval.pop("end_s")
        await insert_interval(
            stand.admin, f"inc_{number}", hour + timedelta(seconds=start),
            hour + timedelta(seconds=end), **interval,
        )  # fmt: skip
    await MinutesRound(stand.database, stand.instruments, 48).once()


async def test_a_start_is_free_and_a_drain_is_paid_to_its_end(
    tmp_path: Path, vhost: Vhost, database: str
) -> None:
    """A real scheduler and a real agent: what they write down is what billing charges."""
    async with AsyncExitStack() as stack:
        fleet: Fleet = await stack.enter_async_context(running_fleet(tmp_path, vhost.amqp_url, database))
        minutes = MinutesRound(await Database.open(database, ROLE, stack), Instruments(), 48)

        async def charged() -> int:
            await minutes.once()
            return int(await fleet.database.fetchval("SELECT count(*) FROM billing.transactions"))

        async def state_is(state: str) -> bool:
            return await fleet.state(resource_id) == state

        async def interval(column: str) -> Any:
            return await fleet.database.fetchval(f"SELECT {column} FROM scheduler.state_intervals")

        fleet.start_scheduler()
        fleet.start_agent()
        (fleet.behaviour / "slow-start").touch()
        resource_id = await fleet.create_resource(1)
        await fleet.turn_on(resource_id)
        # While it starts, for however long, nothing is charged
        await fleet.until(lambda: state_is("starting"), "it starts")
        await asyncio.sleep(2)
        assert await fleet.places() and await charged() == 0 and await interval("count(*)") == 0
        # Live, it is charged from then on
        (fleet.behaviour / "slow-start").unlink()
        await fleet.until(lambda: fleet.is_live(resource_id), "it is live")
        live_at = await fleet.database.fetchval("SELECT ready_at FROM scheduler.places")

        async def first_minute() -> bool:
            return await charged() == 1

        await fleet.until(first_minute, "its first minute is charged")
        assert await interval("started_at") >= live_at
        # A drain finishes what runs, and is paid for until it has
        (fleet.behaviour / "busy").touch()
        await fleet.turn_off(resource_id)
        await fleet.until(lambda: state_is("draining"), "it drains")
        before = await interval("proved_until")

        async def is_proved_further() -> bool:
            return bool(await interval("proved_until") > before)

        await fleet.until(is_proved_further, "its drain is proved")
        (fleet.behaviour / "busy").unlink()
        await fleet.until(lambda: state_is("off"), "it is off")
        ended = await interval("ended_at")
        assert ended is not None and ended > before
        # From then on nothing more comes
        posted = await charged()
        await asyncio.sleep(2)
        assert await charged() == posted
