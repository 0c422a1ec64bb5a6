"""The adviser on records of real facts and intervals, asked through a real gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.billing.advice_round import DAYS, AdviceRound
from services.billing.rounds import MinutesRound
from shared.messages import Timings
from tests.conftest import Vhost
from tests.gateway_harness import Gateway, running_gateway
from tests.integration.billing_stand import Stand, insert_interval, open_stand
from tests.unit.billing.builders import make_usage

RATE = 60_000_000_000
MAIN, IDLE = "res_" + "a" * 32, "res_" + "b" * 32


@pytest.fixture
async def stand(database: str) -> AsyncIterator[Stand]:
    async with open_stand(database) as opened:
        yield opened


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as running:
        yield running


def answered(job: int, at: datetime, resource_id: str = MAIN, **fields: Any) -> Any:
    """A second of GPU time on the team's own resource."""
    accepted = int(at.timestamp() * 1000)
    return make_usage(
        job_id=f"job_{job}", billing="resource", resource_id=resource_id, accepted_unix_ms=accepted,
        first_token_unix_ms=None, finished_unix_ms=accepted + 1000,
        timings=Timings(queue_ms=0.0, swap_ms=0.0, prefill_ms=100.0, decode_ms=900.0), **fields,
    )  # fmt: skip


async def advise(stand: Stand) -> None:
    await MinutesRound(stand.database, stand.instruments, 24 * 8).once()
    await AdviceRound(stand.database).once()


async def test_advice_is_made_from_what_was_asked_and_paid(gateway: Gateway, stand: Stand) -> None:
    # Given an hour in which a GPU of a dollar a minute answered forty requests, one that nobody asked, and tokens paid
    hour: datetime = await stand.admin.fetchval("SELECT date_trunc('hour', now(), 'UTC')") - timedelta(
        hours=20
    )
    for number, resource_id in enumerate((MAIN, IDLE)):
        await insert_interval(
            stand.admin,
            f"inc_{number}",
            hour,
            hour + timedelta(minutes=20 - 10 * number),
            resource_id=resource_id,
        )
    await stand.admin.execute("UPDATE scheduler.resources SET model_type = 'smollm2-135m'")
    await stand.record(*(answered(n, hour + timedelta(seconds=10 * (n // 4))) for n in range(40)))
    await stand.record(
        make_usage(job_id="job_t", accepted_unix_ms=int(hour.timestamp() * 1000)),
        answered(90, hour, outcome="failed"),
        answered(91, hour - timedelta(days=DAYS)),
    )
    # When the adviser has looked, and the team (which the stand calls team_a) asks
    await advise(stand)
    key = await gateway.make_team("acme")
    assert (await gateway.call("GET", "/api/billing/advice", key=key)).json["computed_at"] is None
    await gateway.sql.execute(
        "UPDATE billing.advice SET team_id = (SELECT team_id FROM gateway.teams WHERE slug = 'acme')"
    )
    told = (await gateway.call("GET", "/api/billing/advice", key=key)).json
    # Then the days' requests are in it, and those alone
    (of_type,) = told["model_types"]
    assert (of_type["requests"], of_type["by_token_nanousd"]) == (41, 41 * 1400)
    assert of_type["paid_nanousd"] == 30 * 10**9 + 1400
    # twenty-four of the forty were finished within a minute by one GPU, less than sixty one after the other
    assert of_type["requests_a_minute_milli"] >= 59_000
    assert of_type["fixed"]["cost_nanousd"] == of_type["fixed"]["gpus"] * RATE * 24 * DAYS == RATE * 24 * DAYS
    assert of_type["autoscaled"] == {"cost_nanousd": RATE, "gpus": 1, "by_hour_of_day": []}
    assert of_type["windows"]["cost_nanousd"] == DAYS * RATE
    assert [n for n, gpus in enumerate(of_type["windows"]["by_hour_of_day"]) if gpus] == [hour.hour]
    assert of_type["cheapest"] == "by_token" and of_type["break_even_within_one_gpu"] is False
    assert told["idle_resources"] == [
        {"resource_id": IDLE, "name": IDLE, "minutes": 10, "cost_nanousd": 10 * 10**9}
    ]
    assert len(told["assumptions"]) >= 5


async def test_advice_is_renewed_and_a_quiet_team_keeps_its_last(stand: Stand) -> None:
    hour: datetime = await stand.admin.fetchval("SELECT date_trunc('hour', now(), 'UTC')") - timedelta(
        hours=5
    )
    await stand.record(answered(1, hour))
    await advise(stand)
    first = await stand.admin.fetchrow("SELECT * FROM billing_api.advice_v1")
    await stand.record(answered(2, hour), answered(3, hour, team_id="team_b"))
    await advise(stand)
    rows = await stand.admin.fetch(
        "SELECT team_id, document -> 'model_types' -> 0 ->> 'requests' AS requests, computed_at"
        " FROM billing_api.advice_v1 ORDER BY team_id"
    )
    assert [(row["team_id"], row["requests"]) for row in rows] == [("team_a", "2"), ("team_b", "1")]
    assert first is not None and rows[0]["computed_at"] > first["computed_at"]
