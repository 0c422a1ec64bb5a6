"""Statements from real facts and intervals: they sum to the ledger, open to what is behind them, and can be recomputed."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.billing import recompute
from services.billing.credit import grant_credit
from services.billing.rounds import MinutesRound, SweepRound
from shared.calendar_month import read_month
from shared.messages import GrantCredit
from tests.conftest import ROOT, Vhost
from tests.gateway_harness import Gateway, running_gateway
from tests.integration.billing_stand import Stand, insert_interval, open_stand
from tests.unit.billing.builders import make_usage, make_void

RESOURCE = "res_" + "a" * 32
DOLLAR = 10**9
JOB_NANOUSD = 10 * 20 + 20 * 60


@dataclass(frozen=True)
class World:
    """A team with a month behind it: all of it in one month, whatever the day is."""

    stand: Stand
    gateway: Gateway
    database_url: str
    key: str
    hour: datetime

    @property
    def month(self) -> str:
        return f"{self.hour:%Y-%m}"

    async def get(self, path: str, key: str | None = None) -> Any:
        reply = await self.gateway.call("GET", f"/api/billing/statements/{path}", key=key or self.key)
        assert reply.status == 200, reply.body
        return reply.json

    async def statement(self) -> Any:
        return await self.get(self.month)

    async def behind(self, line_id: str, limit: int = 100) -> list[Any]:
        rows: list[Any] = []
        cursor: str | None = ""
        while cursor is not None:
            page = await self.get(f"{self.month}/lines/{line_id}?limit={limit}{cursor}")
            rows += page["data"]
            cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"
        return rows

    async def balance(self) -> int:
        amount = await self.stand.admin.fetchval(
            "SELECT coalesce(sum(amount_nanousd), 0)::bigint FROM billing.entries WHERE account_id = 'team:team_a'"
        )
        return int(amount)

    async def recompute(self, month: str | None = None, team: str = "acme") -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.billing.recompute", "--team", team, "--month", month or self.month,
            cwd=ROOT, env=os.environ | {"DATABASE_URL": self.database_url},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()


@pytest.fixture
async def world(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[World]:
    async with open_stand(database) as stand, running_gateway(database, vhost.amqp_url, tmp_path) as gateway:
        key = await gateway.make_team("acme")
        # The stand's facts are all of team_a: that is what this team is called, before its key is used
        await gateway.sql.execute("ALTER TABLE gateway.api_keys DROP CONSTRAINT api_keys_team_id_fkey")
        await gateway.sql.execute("UPDATE gateway.teams SET team_id = 'team_a' WHERE slug = 'acme'")
        await gateway.sql.execute(
            "UPDATE gateway.api_keys SET team_id = 'team_a' WHERE team_id NOT IN (SELECT team_id FROM gateway.teams)"
        )
        now: datetime = await stand.admin.fetchval("SELECT date_trunc('hour', now(), 'UTC')")
        earlier = now - timedelta(hours=2)
        yield World(stand, gateway, database, key, earlier if earlier.month == now.month else now)


async def fill(world: World) -> None:
    """Two answered jobs and one that was corrected after its charge; a free one; minutes; credit."""
    at_ms = int(world.hour.timestamp() * 1000)

    def usage(job: str, at: int, **fields: Any) -> Any:
        return make_usage(job_id=job, request_id=f"req_{job}", accepted_unix_ms=at_ms + at, **fields)

    await world.stand.record(usage("job_1", 0), usage("job_2", 1), usage("job_3", 2))
    await world.stand.record(
        usage("job_4", 3, outcome="failed"),
        make_void(job_id="job_3", request_id="req_job_3", accepted_unix_ms=at_ms + 2, delivered_tokens=5),
    )
    for place in (0, 1):
        await insert_interval(
            world.stand.admin, f"inc_{place}", world.hour + timedelta(minutes=50), world.hour + timedelta(minutes=65),
            resource_id=RESOURCE, place=place,
        )  # fmt: skip
    await MinutesRound(world.stand.database, world.stand.instruments, 48).once()
    async with world.stand.database.transaction() as connection:
        result = await grant_credit(
            connection,
            GrantCredit(
                command_id="cmd_1", deadline_unix_ms=4_000_000_000_000, reply_queue="replies.v1.test", actor="key_admin",
                team_id="team_a", amount_nanousd=5 * DOLLAR, reason="=welcome",
            ),
        )  # fmt: skip
        assert result.ok, result


async def test_a_month_sums_to_the_ledger_to_the_nano_dollar(world: World) -> None:
    await fill(world)
    statement = await world.statement()
    token = "live:smollm2-135m:price_1"
    assert {line["line_id"]: (line["quantity"], line["amount_nanousd"]) for line in statement["lines"]} == {
        f"tokens:{token}": (3, 3 * JOB_NANOUSD),
        f"token_corrections:{token}": (1, -15 * 60),
        f"minutes:{RESOURCE}:60000000000": (30, 30 * DOLLAR),
        "credit": (1, -5 * DOLLAR),
    }
    assert statement["received_usd"] == "5.00" and statement["ended"] is False
    assert statement["total_nanousd"] == statement["charged_nanousd"] - 5 * DOLLAR == -await world.balance()
    # A month before and after it is empty, and nobody else sees it
    for month in ("2020-02", "2999-12"):
        assert (await world.get(month))["lines"] == []
    other = await world.gateway.make_team("other")
    assert (await world.get(world.month, other))["lines"] == []
    assert (await world.get(f"{world.month}/lines/tokens:{token}", other))["data"] == []
    assert (await world.get(f"{world.month}/lines/minutes:{RESOURCE}:60000000000", other))["data"] == []
    assert (await world.get(f"{world.month}/lines/credit", other))["data"] == []


async def test_each_line_opens_to_what_it_is_the_sum_of(world: World) -> None:
    await fill(world)
    for line in (await world.statement())["lines"]:
        whole = await world.behind(line["line_id"])
        assert await world.behind(line["line_id"], limit=1) == whole
        assert sum(row["amount_nanousd"] for row in whole) == line["amount_nanousd"]
        if line["kind"] in ("tokens", "token_corrections"):
            assert len(whole) == line["quantity"]
            assert sum(row["completion_tokens"] for row in whole) == line["completion_tokens"]
    jobs = await world.behind("tokens:live:smollm2-135m:price_1")
    assert [row["request_id"] for row in jobs] == ["req_job_1", "req_job_2", "req_job_3"]
    (corrected,) = await world.behind("token_corrections:live:smollm2-135m:price_1")
    assert (corrected["job_id"], corrected["completion_tokens"], corrected["prompt_tokens"]) == (
        "job_3",
        -15,
        0,
    )
    hours = await world.behind(f"minutes:{RESOURCE}:60000000000")
    assert [(row["place"], row["minutes"]) for row in hours] == [(0, 10), (1, 10), (0, 5), (1, 5)]
    started = f"{world.hour + timedelta(minutes=50):%Y-%m-%dT%H:%M}:00.000Z"
    assert all([each["started_at"] for each in row["intervals"]] == [started] for row in hours)
    (credit,) = await world.behind("credit")
    assert credit["amount_usd"] == "-5.00" and "=welcome" in credit["text"]


async def test_the_csv_says_the_same_and_starts_no_formula(world: World) -> None:
    await fill(world)
    await world.gateway.sql.execute(
        "UPDATE scheduler.resources SET name = '=cmd|x, \"y\"' WHERE resource_id = $1", RESOURCE
    )
    async with world.gateway.session.get(
        f"{world.gateway.base}/api/billing/statements/{world.month}?format=csv",
        headers={"Authorization": f"Bearer {world.key}"},
    ) as reply:
        text = (await reply.read()).decode("utf-8")
        assert reply.status == 200 and reply.headers["Content-Type"].startswith("text/csv")
        assert f"statement-acme-{world.month}.csv" in reply.headers["Content-Disposition"]
    _, *records = csv.reader(io.StringIO(text, newline=""), strict=True)
    statement = await world.statement()
    assert [(r[0], int(r[-1])) for r in records] == [
        *((line["line_id"], line["amount_nanousd"]) for line in statement["lines"]),
        ("total", statement["total_nanousd"]),
    ]
    assert records[2][2].startswith('\'=cmd|x, "y" at 60.00')


async def test_the_month_is_recomputed_from_facts_and_intervals_alone(world: World) -> None:
    await fill(world)
    code, out, err = await world.recompute()
    charged = (await world.statement())["charged_nanousd"]
    assert code == 0 and f"acme {world.month}: {charged} nano-USD from 3 charged jobs" in out, out + err
    assert (await world.recompute("2020-02"))[0] == 0
    assert (await world.recompute(team="nobody"))[0] == 2
    assert (await world.recompute(month="2026-13"))[0] == 2


@pytest.mark.parametrize(
    ("tampered", "said"),
    [
        (
            "UPDATE billing.job_charges SET amount_nanousd = amount_nanousd + 1 WHERE job_id = 'job_2'",
            "job job_2",
        ),
        ("UPDATE billing.job_charges SET prompt_tokens = 11 WHERE job_id = 'job_2'", "tokens, "),
        ("DELETE FROM billing.job_charges WHERE job_id = 'job_2'", "job job_2"),
        (
            "UPDATE billing.job_charges SET accepted_at = accepted_at - interval '40 days' WHERE job_id = 'job_2'",
            "job job_2",
        ),
        ("UPDATE billing.minute_charges SET posted_nanousd = posted_nanousd - 1 WHERE place = 1", "place 1"),
        ("DELETE FROM billing.minute_charges", "place 0"),
        (
            "UPDATE billing.entries SET amount_nanousd = amount_nanousd - sign(amount_nanousd)",
            "in the ledger",
        ),
        (
            """WITH forged AS (
                   INSERT INTO billing.transactions (transaction_id, unique_key, kind, team_id, job_id, words)
                   SELECT 'txn_f', 'tokens:job_f', kind, team_id, 'job_f', words FROM billing.transactions
                   WHERE job_id = 'job_2' AND kind = 'tokens' RETURNING team_id)
               INSERT INTO billing.entries SELECT 'txn_f', a, n
               FROM forged, LATERAL (VALUES ('team:' || team_id, -7), ('revenue:tokens', 7)) x (a, n)""",
            "job job_f: 0 nano-USD from its facts, 7 in the ledger",
        ),
        ("DELETE FROM scheduler.state_intervals WHERE place = 1", "place 1"),
        ("DELETE FROM billing.usage_events WHERE job_id = 'job_1'", "job job_1: 0 nano-USD from its facts"),
        (
            "UPDATE billing.usage_events SET payload = payload || '{\"completion_tokens\": 21}' WHERE job_id = 'job_1'",
            "job job_1: 1460 nano-USD from its facts, 1400",
        ),
    ],
)
async def test_a_changed_row_anywhere_is_found(world: World, tampered: str, said: str) -> None:
    await fill(world)
    # No trigger and no constraint watches: somebody with the server's own rights did this
    await world.stand.admin.execute("SET session_replication_role = replica")
    await world.stand.admin.execute(tampered)
    month = read_month(world.month)
    assert month is not None
    compared = await recompute.compare(world.database_url, "acme", month)
    assert any(said in line for line in compared.found), compared.found


async def test_a_difference_ends_the_command_with_1(world: World) -> None:
    await fill(world)
    await world.stand.admin.execute(
        "UPDATE billing.job_charges SET amount_nanousd = 0 WHERE job_id = 'job_2'"
    )
    code, out, _ = await world.recompute()
    assert code == 1 and "job job_2: 1400 nano-USD from its facts, 0 in the statement" in out


async def test_jobs_charged_before_the_record_was_kept_are_filled_in(world: World) -> None:
    await fill(world)
    kept = "SELECT * FROM billing.job_charges ORDER BY job_id"
    before = await world.stand.admin.fetch(kept)
    await world.stand.admin.execute("DELETE FROM billing.job_charges WHERE job_id <> 'job_2'")
    sweep = SweepRound(world.stand.database, world.stand.intake, world.stand.instruments, 30)
    await sweep.once()
    await sweep.once()
    after = await world.stand.admin.fetch(kept)
    # Of a job that was corrected before, what it comes to is all that is told
    told = [dict(row) | {"first_completion_tokens": 0, "first_nanousd": 0} for row in before]
    assert [dict(row) | {"first_completion_tokens": 0, "first_nanousd": 0} for row in after] == told
    assert (await world.recompute())[0] == 0


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("2026-13", 400, "invalid_value"),
        ("now", 400, "invalid_value"),
        ("2026-11?format=pdf", 400, "invalid_value"),
        ("2026-11?bucket=day", 400, "unknown_parameter"),
        ("2026-11/lines/nothing", 404, "not_found"),
        ("2026-11/lines/credit?cursor=!", 400, "invalid_cursor"),
        (f"2026-11/lines/minutes:{RESOURCE}:1?cursor=eA", 400, "invalid_cursor"),
        ("2026-11/lines/tokens:live:x:price_1?cursor=eA", 400, "invalid_cursor"),
        ("2026-13/lines/credit", 400, "invalid_value"),
    ],
)
async def test_bad_questions_are_refused_by_name(world: World, path: str, status: int, code: str) -> None:
    reply = await world.gateway.call("GET", f"/api/billing/statements/{path}", key=world.key)
    assert (reply.status, reply.code) == (status, code)
