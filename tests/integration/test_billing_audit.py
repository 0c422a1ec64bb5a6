"""The audit is clean on what billing wrote, and finds each thing that was tampered with."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from loadtest.audit import EXIT_FINDINGS, EXIT_UNUSABLE, main
from services.billing.payments_store import PaymentIntake
from services.billing.rounds import MinutesRound
from tests.integration.billing_stand import Stand, insert_interval, open_stand
from tests.unit.billing.builders import make_payment, make_usage, make_void

ACCEPTED_UNIX_MS = time.time_ns() // 1_000_000 - 60_000


@dataclass
class Scene:
    """A database after some traffic, and what the clients saw of it."""

    stand: Stand
    database_url: str
    folder: Path
    log: list[dict[str, Any]]

    async def audit(self) -> tuple[int, dict[str, int]]:
        """The exit code, and the findings by check."""
        log_file, json_file = self.folder / "clients.jsonl", self.folder / "audit.json"
        log_file.write_text("".join(json.dumps(record) + "\n" for record in self.log))
        arguments = [
            "--client-log",
            str(log_file),
            "--database-url",
            self.database_url,
            "--json",
            str(json_file),
        ]
        code = await asyncio.to_thread(main, arguments)
        rows = json.loads(json_file.read_text()) if code != EXIT_UNUSABLE else []
        return code, {row["name"]: row["ours"] for row in rows if row["floor"] is not None and row["ours"]}

    async def tamper(self, sql: str) -> None:
        """Change rows behind the back of triggers and constraints, as only the database's owner could."""
        await self.stand.admin.execute(
            f"SET session_replication_role = replica; {sql}; RESET session_replication_role"
        )


def seen(request_id: str, outcome: str = "answered", **fields: Any) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "team": "team-a",
        "model": "demo/smollm2",
        "stream": False,
        "started_unix_ms": ACCEPTED_UNIX_MS,
        "ended_unix_ms": ACCEPTED_UNIX_MS + 2_000,
        "status": 200,
        "outcome": outcome,
        "prompt_tokens": 10,
        "completion_tokens": 20,
        "error_code": None,
        **fields,
    }


@pytest.fixture
async def scene(database: str, tmp_path: Path) -> AsyncIterator[Scene]:
    async with open_stand(database) as stand:
        await stand.admin.execute(
            "INSERT INTO gateway.teams (team_id, slug, name) VALUES ('team_a', 'team-a', 'A'), ('team_b', 'team-b', 'B')"
        )

        def job(number: int, **fields: Any) -> dict[str, Any]:
            return {
                "job_id": f"job_{number}",
                "request_id": f"req_{number}",
                "accepted_unix_ms": ACCEPTED_UNIX_MS,
                **fields,
            }

        await stand.record(
            make_usage(**job(1)),
            make_usage(**job(2)),
            make_usage(**job(3, billing="resource")),
            make_usage(**job(4, outcome="failed", error_code="poison")),
            make_usage(**job(5)),
            make_usage(**job(6, outcome="cancelled", completion_tokens=8)),
            make_void(**job(7, reason="never_published", delivered_tokens=0)),
        )
        await stand.record(make_void(**job(5)))
        hour = await stand.admin.fetchval("SELECT date_trunc('hour', now(), 'UTC')") - timedelta(hours=3)
        await insert_interval(stand.admin, "inc_1", hour, hour + timedelta(minutes=90), ended=True)
        await MinutesRound(stand.database, stand.instruments, 48).once()
        log = [
            seen("req_1"),
            seen("req_2", stream=True),
            seen("req_3"),
            seen("req_4", "error", status=500, error_code="poison", completion_tokens=None),
            seen("req_5", "cancelled_by_client", stream=True, prompt_tokens=None, completion_tokens=4),
            seen("req_6", "cut", stream=True, prompt_tokens=None, completion_tokens=8, killed_gateway=True),
            seen(
                "req_7",
                "error",
                status=503,
                prompt_tokens=None,
                completion_tokens=None,
                error_code="unavailable",
            ),
            seen("req_none", "error", status=401, prompt_tokens=None, completion_tokens=None),
        ]
        yield Scene(stand, database, tmp_path, log)


async def test_the_audit_is_clean_on_what_billing_wrote(scene: Scene) -> None:
    assert await scene.audit() == (0, {})


DOUBLE_CHARGE = """
    INSERT INTO billing.transactions (transaction_id, unique_key, kind, team_id, job_id, words)
        VALUES ('txn_x', 'tokens:{job}:again', 'tokens', 'team_a', '{job}', '');
    INSERT INTO billing.entries VALUES ('txn_x', 'team:team_a', -7), ('txn_x', 'revenue:tokens', 7)
"""
NO_CHARGE = """
    DELETE FROM billing.entries USING billing.transactions t WHERE t.transaction_id = entries.transaction_id
        AND t.job_id = 'job_2'
"""
WRONG_TEAM = """
    UPDATE billing.entries SET account_id = 'team:team_b' FROM billing.transactions t
        WHERE t.transaction_id = entries.transaction_id AND t.job_id = 'job_1' AND account_id = 'team:team_a';
    UPDATE billing.transactions SET team_id = 'team_b' WHERE job_id = 'job_1'
"""
SECOND_END = """
    INSERT INTO billing.usage_events (event_id, event_type, job_id, team_id, payload)
        SELECT 'evt_x', event_type, job_id, team_id, payload || '{"event_id": "evt_x", "completion_tokens": 21}'
        FROM billing.usage_events WHERE job_id = 'job_1'
"""
LONGER_INTERVAL = """
    UPDATE scheduler.state_intervals
        SET proved_until = proved_until + interval '1 second', ended_at = ended_at + interval '1 second'
"""


SPENT_LATER = "UPDATE billing.spend_days SET posted_nanousd = posted_nanousd + 1 WHERE scope = 'team'"
LEFT_OVER = """
    INSERT INTO billing.budget_leases (lease_id, budget_id, period_start, gateway_id, granted_nanousd, refused,
        unposted_nanousd, horizon_at)
        VALUES ('lease_x', 'bud_x', '2026-11-01', 'gw_x', 5, '{}', 0, now() - interval '6 minutes')
"""


def request_with(change: str, job_id: str = "job_1") -> str:
    return f"UPDATE billing.requests SET {change} WHERE job_id = '{job_id}'"


@pytest.mark.parametrize(
    ("sql", "check"),
    [
        ("DELETE FROM billing.requests WHERE job_id = 'job_1'", "answered is recorded"),
        ("DELETE FROM billing.requests WHERE job_id = 'job_1'", "request records follow from facts"),
        ("DELETE FROM billing.usage_events WHERE job_id = 'job_1'", "charges have a fact"),
        ("DELETE FROM billing.usage_events WHERE job_id = 'job_1'", "request records follow from facts"),
        (NO_CHARGE, "charges follow from facts"),
        (NO_CHARGE, "answered is charged once"),
        (DOUBLE_CHARGE.format(job="job_1"), "answered is charged once"),
        (DOUBLE_CHARGE.format(job="job_1"), "charges follow from facts"),
        (DOUBLE_CHARGE.format(job="job_3"), "answered is charged once"),
        (DOUBLE_CHARGE.format(job="job_4"), "errors cost nothing"),
        (DOUBLE_CHARGE.format(job="job_unheard_of"), "charges have a fact"),
        (WRONG_TEAM, "charges follow from facts"),
        ("DELETE FROM billing.entries WHERE account_id = 'revenue:tokens'", "ledger balances"),
        ("UPDATE billing.entries SET amount_nanousd = amount_nanousd - 1", "ledger balances"),
        ("UPDATE billing.entries SET amount_nanousd = 2 * amount_nanousd", "charges follow from facts"),
        ("UPDATE billing.entries SET amount_nanousd = 2 * amount_nanousd", "minutes are in the ledger"),
        ("UPDATE billing.prices SET completion_nanousd = 61", "charges follow from facts"),
        (request_with("completion_tokens = 19"), "answered tokens are equal"),
        (request_with("completion_tokens = 6", "job_5"), "partial answers pay what was delivered"),
        (request_with("charged_nanousd = 0"), "charges follow from facts"),
        (request_with("team_id = 'team_b'", "job_3"), "requests belong to the callers team"),
        (SECOND_END, "facts of a job agree"),
        (
            "UPDATE billing.minute_charges SET posted_nanousd = posted_nanousd - 1",
            "minutes follow from intervals",
        ),
        ("DELETE FROM billing.minute_charges WHERE minutes = 30", "minutes are in the ledger"),
        ("DELETE FROM scheduler.state_intervals", "minutes follow from intervals"),
        (LONGER_INTERVAL, "minutes follow from intervals"),
        (SPENT_LATER, "spend by day is the ledger"),
        ("DELETE FROM billing.spend_days WHERE scope = 'resource'", "spend by day is the ledger"),
        (LEFT_OVER, "no slice is left over"),
    ],
)
async def test_the_audit_finds_a_tampered_database(scene: Scene, sql: str, check: str) -> None:
    await scene.tamper(sql)
    code, findings = await scene.audit()
    assert code == EXIT_FINDINGS
    assert check in findings


@pytest.mark.parametrize(
    ("line", "fields", "check"),
    [
        (0, {"completion_tokens": 21}, "answered tokens are equal"),
        (0, {"prompt_tokens": 9}, "answered tokens are equal"),
        (0, {"request_id": "req_unheard_of"}, "answered is recorded"),
        (0, {"request_id": None}, "answered is recorded"),
        (0, {"request_id": "req_2"}, "log names requests once"),
        (0, {"outcome": "error"}, "errors cost nothing"),
        (0, {"team": "team-b"}, "requests belong to the callers team"),
        (3, {"outcome": "answered"}, "answered is recorded"),
        (4, {"completion_tokens": 6}, "partial answers pay what was delivered"),
        (5, {"completion_tokens": 9}, "partial answers pay what was delivered"),
        (7, {"outcome": "cut", "completion_tokens": 1}, "partial answers pay what was delivered"),
    ],
)
async def test_the_audit_finds_a_tampered_client_log(
    scene: Scene, line: int, fields: dict[str, Any], check: str
) -> None:
    scene.log[line] |= fields
    code, findings = await scene.audit()
    assert code == EXIT_FINDINGS
    assert check in findings


async def test_money_in_and_what_was_taken_back_of_it_are_no_findings(scene: Scene) -> None:
    payments = PaymentIntake(scene.stand.database, scene.stand.instruments)
    await payments.record([make_payment("paid")])
    await payments.record([make_payment("refunded", event_id="evt_2", amount_nanousd=1_000_000_000)])
    kinds = await scene.stand.admin.fetch(
        "SELECT DISTINCT kind FROM billing_api.ledger_v1 WHERE job_id IS NULL"
    )
    assert {"payment", "correction"} <= {row["kind"] for row in kinds}
    assert await scene.audit() == (0, {})


async def test_the_audit_refuses_an_empty_or_broken_log(scene: Scene) -> None:
    scene.log.clear()
    assert await scene.audit() == (EXIT_UNUSABLE, {})
    scene.log.append({"request_id": "req_1"})
    assert await scene.audit() == (EXIT_UNUSABLE, {})


async def test_the_audit_waits_for_facts_that_are_still_on_their_way(scene: Scene) -> None:
    log_file = scene.folder / "clients.jsonl"
    scene.log.append(seen("req_8"))
    log_file.write_text("".join(json.dumps(record) + "\n" for record in scene.log))
    arguments = ["--client-log", str(log_file), "--database-url", scene.database_url, "--wait-s", "20"]
    running = asyncio.create_task(asyncio.to_thread(main, arguments))
    await asyncio.sleep(0.5)
    assert not running.done()
    await scene.stand.record(
        make_usage(job_id="job_8", request_id="req_8", accepted_unix_ms=ACCEPTED_UNIX_MS)
    )
    assert await running == 0
