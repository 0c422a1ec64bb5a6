"""Metrics from facts to `/api/resources/{id}/metrics`: real records, triggers, rounds and gateway, on real PostgreSQL."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.billing import metrics_round
from services.billing.metrics_round import MetricsRound
from services.billing.rounds import SweepRound
from shared.log_buckets import BOUNDS_US, bucket_of, bucket_sql
from shared.messages import Timings
from tests.conftest import Vhost
from tests.gateway_harness import ADMIN_KEY, Gateway, running_gateway
from tests.integration.billing_stand import Stand, insert_interval, open_stand
from tests.unit.billing.builders import make_usage, make_void

RESOURCE = "res_" + "a" * 32
CLOSE = 0.03


@pytest.fixture
async def stand(database: str) -> AsyncIterator[Stand]:
    async with open_stand(database) as opened:
        yield opened


@pytest.fixture
async def gateway(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as running:
        yield running


@dataclass(frozen=True)
class Asked:
    """A request as the client saw it."""

    ended: datetime
    response_ms: int


def hour_ago() -> datetime:
    """The beginning of the last hour that is wholly over."""
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)


def ended(job: str, at: datetime, response_ms: int = 1000, **fields: Any) -> Any:
    """A request on the team's resource that ended then, after a tenth of its time in the queue."""
    accepted = int(at.timestamp() * 1000) - response_ms
    values: dict[str, Any] = {
        "job_id": job,
        "billing": "resource",
        "resource_id": RESOURCE,
        "accepted_unix_ms": accepted,
        "first_token_unix_ms": accepted + response_ms // 2,
        "finished_unix_ms": accepted + response_ms,
        "timings": Timings(
            queue_ms=response_ms / 10, prefill_ms=response_ms * 0.1, decode_ms=response_ms * 0.8
        ),
        **fields,
    }
    return make_usage(**values)


async def compute(stand: Stand) -> None:
    await MetricsRound(stand.database, 30).once()
    assert await stand.admin.fetchval("SELECT count(*) FROM billing.histogram_marks") == 0


async def rows_of(stand: Stand) -> dict[str, list[Any]]:
    return {
        table: [tuple(row) for row in await stand.admin.fetch(f"SELECT * FROM billing.{table} ORDER BY 1, 2, 3, 4, 5")]
        for table in ("minute_counts", "minute_histograms", "hour_counts", "hour_histograms")
    } | {
        table: [tuple(row) for row in await stand.admin.fetch(f"SELECT * FROM billing.{table} ORDER BY 1, 2")]
        for table in ("minute_busy", "hour_busy")
    }  # fmt: skip


async def total(stand: Stand, column: str, table: str = "minute_counts") -> int:
    return int(await stand.admin.fetchval(f"SELECT coalesce(sum({column}), 0) FROM billing.{table}"))


async def own_resource(gateway: Gateway, stand: Stand, *lives: tuple[datetime, datetime]) -> str:
    """A team's key, whose resource is the one that facts are about, with GPUs that were live then."""
    key = await gateway.make_team("acme")
    for place, (start, end) in enumerate(lives or ((hour_ago(), hour_ago()),)):
        await insert_interval(
            stand.admin, f"inc_{place}", start, end, resource_id=RESOURCE, place=place, ended=True
        )
    await gateway.sql.execute(
        "UPDATE scheduler.resources SET team_id = (SELECT team_id FROM gateway.teams WHERE slug = 'acme')"
    )
    return key


async def ask(gateway: Gateway, key: str, query: str, resource: str = RESOURCE) -> Any:
    return await gateway.call("GET", f"/api/resources/{resource}/metrics?{query}", key=key)


def span(start: datetime, end: datetime, bucket: str = "minute") -> str:
    return f"from={start:%Y-%m-%dT%H:%M:%SZ}&to={end:%Y-%m-%dT%H:%M:%SZ}&bucket={bucket}"


async def test_the_database_puts_durations_into_the_same_buckets(stand: Stand) -> None:
    chance = random.Random(7)
    durations = [bound / 1000 + nudge for bound in BOUNDS_US for nudge in (-0.001, -0.0005, 0.0, 0.0005)]
    durations += [math.exp(chance.uniform(-12, 22)) for _ in range(20_000)]
    durations += [0.0, -1.0, 1e300, -1e300, math.inf, -math.inf, math.nan, 0.0995, 0.0005, 0.0015]
    rows = await stand.admin.fetch(
        f"SELECT {bucket_sql('ms')} AS bucket FROM unnest($1::float8[]) WITH ORDINALITY t (ms, n) ORDER BY n",
        durations,
    )
    assert [row["bucket"] for row in rows] == [bucket_of(duration) for duration in durations]


async def test_quantiles_over_any_window_are_close_to_the_exact_ones(gateway: Gateway, stand: Stand) -> None:
    # Given an hour of requests, from a few milliseconds to minutes, more in some minutes than in others
    hour, chance = hour_ago(), random.Random(11)
    asked = [
        Asked(
            hour + timedelta(milliseconds=int(3_599_000 * chance.random() ** 2)),
            max(2, int(math.exp(chance.gauss(6.5, 1.3)))),
        )
        for _ in range(3000)
    ]
    await stand.record(*(ended(f"job_{n}", each.ended, each.response_ms) for n, each in enumerate(asked)))
    await compute(stand)
    key = await own_resource(gateway, stand)
    # When windows are asked for by the minute, and the hour by the hour
    windows = [(hour, hour + timedelta(hours=1), "minute"), (hour, hour + timedelta(hours=1), "hour")]
    for _ in range(12):
        first, last = sorted(chance.sample(range(61), 2))
        windows.append((hour + timedelta(minutes=first), hour + timedelta(minutes=last), "minute"))
    for start, end, bucket in windows:
        told = (await ask(gateway, key, span(start, end, bucket))).json["total"]
        within = sorted(each.response_ms for each in asked if start <= each.ended < end)
        # Then each quantile is close to that of the requests themselves
        assert told["requests"] == len(within) > 0
        for percent in (50, 95, 99):
            exact = within[math.ceil(len(within) * percent / 100) - 1]
            assert told["response_ms"][f"p{percent}"] == pytest.approx(exact, rel=CLOSE), (
                start,
                end,
                percent,
            )
            assert told["queue_ms"][f"p{percent}"] == pytest.approx(exact / 10, rel=CLOSE)
            assert told["first_token_ms"][f"p{percent}"] == pytest.approx(exact // 2, rel=CLOSE)
            assert told["swap_ms"][f"p{percent}"] == 0.0


async def test_a_point_tells_of_requests_gpus_and_tokens(gateway: Gateway, stand: Stand) -> None:
    # Given two GPUs, one of them live for the first half of an hour, and requests in its first two minutes
    hour = hour_ago()
    key = await own_resource(
        gateway,
        stand,
        (hour, hour + timedelta(hours=1)),
        (hour - timedelta(minutes=5), hour + timedelta(minutes=30)),
    )
    at = hour + timedelta(seconds=90)
    await stand.record(
        ended("job_a", at, 10_000),  # had a GPU for nine seconds, to the minute's middle
        ended("job_b", at, 10_000, model_id="model_b", model_name="acme/other"),  # beside it: busy once
        ended("job_c", at, 10_000, worker_id="worker_2", work_class="batch"),
        ended("job_d", at, outcome="failed", timings=Timings()),
        ended("job_e", at, outcome="expired", timings=Timings()),
        ended("job_f", at, outcome="cancelled", timings=Timings()),
        ended("job_g", at, resource_id="res_" + "b" * 32),
        ended("job_h", hour + timedelta(seconds=63), 10_000),  # six seconds of it in the minute before
    )
    await compute(stand)
    # When the first three minutes are asked for
    told = (await ask(gateway, key, span(hour, hour + timedelta(minutes=3)))).json
    # Then the second has all of it, and the first that a GPU was at work
    first, second, third = told["data"]
    counted = ("requests", "errors", "cancelled", "prompt_tokens", "completion_tokens")
    assert [second[name] for name in counted] == [7, 2, 1, 70, 140]
    assert second["requests_per_minute"] == 7 and second["completion_tokens_per_s"] == pytest.approx(
        140 / 60, abs=1e-3
    )
    assert (first["requests"], first["busy_ms"], second["busy_ms"], third["busy_ms"]) == (
        0,
        6000,
        9000 + 9000 + 3000,
        0,
    )
    assert [each["live_ms"] for each in told["data"]] == [120_000] * 3 and second["live_gpus"] == 2
    assert second["utilisation"] == pytest.approx(21 / 120) and first["utilisation"] == pytest.approx(6 / 120)
    assert first["response_ms"] == {"p50": None, "p95": None, "p99": None}
    assert second["response_ms"]["p99"] == pytest.approx(10_000, rel=CLOSE)
    # And the hour sums it up, as does the day
    (by_hour,) = (await ask(gateway, key, span(hour, hour + timedelta(hours=1), "hour"))).json["data"]
    assert (by_hour["requests"], by_hour["busy_ms"], by_hour["live_ms"]) == (7, 27_000, 5_400_000)
    assert by_hour["live_gpus"] == 1.5
    day = (await ask(gateway, key, span(hour - timedelta(hours=1), hour + timedelta(hours=1), "day"))).json
    assert day["total"]["requests"] == 7 and day["total"]["live_ms"] == 5_700_000
    # And a model's requests are told by its name, short or whole, or its id; GPUs are the resource's
    for name in ("other", "acme/other", "model_b"):
        of_model = (await ask(gateway, key, f"{span(hour, hour + timedelta(minutes=3))}&model={name}")).json[
            "total"
        ]
        assert (of_model["requests"], of_model["errors"], of_model["live_ms"]) == (1, 0, 360_000)
        assert of_model["response_ms"]["p50"] == pytest.approx(10_000, rel=CLOSE)
    unknown = (await ask(gateway, key, f"{span(hour, hour + timedelta(minutes=3))}&model=nothing")).json[
        "total"
    ]
    assert unknown["requests"] == 0 and unknown["response_ms"]["p50"] is None


async def test_late_facts_and_corrections_change_their_minutes(stand: Stand) -> None:
    hour = hour_ago()
    await stand.record(
        ended("job_a", hour + timedelta(seconds=5)), ended("job_b", hour + timedelta(seconds=6))
    )
    await compute(stand)
    assert (await total(stand, "requests"), await total(stand, "cancelled")) == (2, 0)
    assert await total(stand, "counts[1]", "minute_histograms WHERE measure = 'response'") == 2
    # A late fact of the same minute
    await stand.record(ended("job_c", hour + timedelta(seconds=7), 3000))
    await compute(stand)
    assert await total(stand, "requests") == await total(stand, "requests", "hour_counts") == 3
    # A correction moves a request into another minute: it leaves the first
    moved = hour + timedelta(minutes=4)
    await stand.record(
        make_void(
            job_id="job_a", billing="resource", resource_id=RESOURCE, voided_unix_ms=int(moved.timestamp() * 1000),
            accepted_unix_ms=int((hour + timedelta(seconds=4)).timestamp() * 1000),
        )
    )  # fmt: skip
    await compute(stand)
    rows = await stand.admin.fetch(
        "SELECT minute, requests, cancelled FROM billing.minute_counts ORDER BY minute"
    )
    assert [tuple(row) for row in rows] == [(hour, 2, 0), (moved, 1, 1)]
    assert await total(stand, "cancelled", "hour_counts") == 1


async def test_computing_again_changes_nothing(stand: Stand) -> None:
    hour = hour_ago()
    await stand.record(
        *(ended(f"job_{n}", hour + timedelta(seconds=20 * n + 9), 500 + 77 * n) for n in range(40))
    )
    await compute(stand)
    before = await rows_of(stand)
    assert all(before.values())
    await stand.admin.execute("UPDATE billing.requests SET charged_nanousd = charged_nanousd")
    marks = await stand.admin.fetchval("SELECT count(*) FROM billing.histogram_marks")
    assert marks == await stand.admin.fetchval("SELECT count(*) FROM billing.minute_busy")
    await compute(stand)
    await compute(stand)
    assert await rows_of(stand) == before


async def test_a_backlog_is_worked_off_in_bounded_parts(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_round, "MARKS", 3)
    monkeypatch.setattr(metrics_round, "TRANSACTIONS_A_ROUND", 2)
    hour = hour_ago()
    await stand.record(*(ended(f"job_{n}", hour + timedelta(minutes=n, seconds=30)) for n in range(8)))
    await MetricsRound(stand.database, 30).once()
    assert await total(stand, "requests") == await total(stand, "requests", "hour_counts") == 6
    await MetricsRound(stand.database, 30).once()
    assert await total(stand, "requests") == await total(stand, "requests", "hour_counts") == 8


async def test_rounds_beside_intake_miss_nothing(stand: Stand) -> None:
    hour = hour_ago()
    facts = [ended(f"job_{n}", hour + timedelta(seconds=n), 200 + n) for n in range(120)]
    done = asyncio.Event()

    async def rounds() -> None:
        while not done.is_set():
            await MetricsRound(stand.database, 30).once()

    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(rounds())
        for n in range(0, len(facts), 10):
            await stand.record(*facts[n : n + 10])
        done.set()
    await compute(stand)
    assert await total(stand, "requests") == await total(stand, "requests", "hour_counts") == 120


async def test_forgetting_requests_leaves_what_was_computed_of_them(stand: Stand) -> None:
    # Given two requests that are old enough to be forgotten, and one that is not
    now: datetime = await stand.admin.fetchval("SELECT date_trunc('minute', now(), 'UTC')")
    old, new = now - timedelta(days=29, hours=23), now - timedelta(days=1)
    for job, at in (("job_old", old), ("job_old_2", old), ("job_new", new)):
        await stand.record(ended(job, at))
    await MetricsRound(stand.database, 40).once()
    sweep = SweepRound(stand.database, stand.intake, stand.instruments, 29)
    await sweep.delete_old()
    assert await stand.admin.fetchval("SELECT count(*) FROM billing.requests") == 1
    # When rounds go on, and something late is told of the forgotten minute
    await stand.record(ended("job_late", old + timedelta(seconds=1)))
    await MetricsRound(stand.database, 29).once()
    # Then that minute keeps what it had
    rows = await stand.admin.fetch("SELECT minute, requests FROM billing.minute_counts ORDER BY minute")
    assert [tuple(row) for row in rows] == [(old, 2), (new, 1)]
    # And minutes are forgotten in their time, hours later
    await MetricsRound(stand.database, 20).once()
    assert await total(stand, "requests") == 1 and await total(stand, "requests", "hour_counts") == 3


async def test_a_request_marks_every_minute_that_it_had_a_gpu_in(stand: Stand) -> None:
    hour = hour_ago()
    await stand.record(ended("job_a", hour + timedelta(seconds=150), 130_000))
    rows = await stand.admin.fetch("SELECT minute FROM billing.histogram_marks ORDER BY minute")
    assert [row["minute"] - hour for row in rows] == [timedelta(minutes=n) for n in range(3)]


async def test_windows_are_bounded_and_other_teams_resources_unknown(gateway: Gateway, stand: Stand) -> None:
    key = await own_resource(gateway, stand)
    now = hour_ago()
    refused = [
        (span(now, now), "from"),
        (span(now - timedelta(days=2), now), "from"),
        (span(now - timedelta(days=32), now, "hour"), "from"),
        (span(now - timedelta(days=94), now, "day"), "from"),
        (span(now - timedelta(days=31), now - timedelta(days=31) + timedelta(minutes=1)), "from"),
        ("bucket=week", "bucket"),
        ("from=yesterday", "from"),
    ]
    for query, param in refused:
        said = await ask(gateway, key, query)
        assert (said.status, said.json["code"], said.json["param"]) == (400, "invalid_value", param), query
    assert len((await ask(gateway, key, "")).json["data"]) in (60, 61)
    assert len((await ask(gateway, key, span(now - timedelta(days=1), now))).json["data"]) == 1440
    assert len((await ask(gateway, key, "bucket=day")).json["data"]) == 31
    other = await gateway.make_team("other")
    foreign, unknown = await ask(gateway, other, ""), await ask(gateway, other, "", "res_" + "f" * 32)
    answers = [each.json | {"request_id": ""} for each in (foreign, unknown)]
    assert answers[0] == answers[1] and foreign.status == 404
    assert (await ask(gateway, ADMIN_KEY, "team=acme")).status == 200
