"""Recurring batches: a real gateway, two batch services of which one leads, database and broker."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from infra.local.scratch import execute
from loadtest.stack import Stack, post, running_stack
from tests.integration.test_batch_quotes import call, upload
from tests.integration.test_batch_service import CHAT, chat_lines, query, roundhouse, submit, wait_for

PATH = "/api/batches/schedules"
NOBODY = "sched_" + "0" * 32


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        running.start_service("batch")
        running.start_service("billing")
        running.start_worker("worker", step_s=0.001, max_batch=32)
        yield running


@pytest.fixture
def client(stack: Stack) -> OpenAI:
    return OpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.api_key, max_retries=0)


def make(stack: Stack, client: OpenAI, name: str, **more: Any) -> tuple[int, dict[str, Any]]:
    batch = {"input_file_id": upload(client, chat_lines(stack, 3, 2)), "endpoint": CHAT, "completion_window": "1h",
             "metadata": {"of": name}}  # fmt: skip
    body = {"name": name, "cron": "0 3 * * *", "batch": batch} | more
    return call(stack, PATH, stack.api_key, body)


def set_due(stack: Stack, schedule_id: str, minutes_ago: int = 0, cron: str = "0 3 * * *") -> None:
    """As if the schedule had been made for this time."""
    execute(
        stack.database_url,
        f"UPDATE batch.schedules SET cron = '{cron}', next_at = date_trunc('minute', now())"
        f" - interval '{minutes_ago} minutes' WHERE schedule_id = '{schedule_id}'",
    )


def runs(stack: Stack, schedule_id: str, count: int = 1, limit_s: float = 20.0) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + limit_s
    while True:
        _, shown = call(stack, f"{PATH}/{schedule_id}", stack.api_key)
        if len(shown["runs"]) >= count:
            return list(shown["runs"])
        assert time.monotonic() < deadline_s, shown
        time.sleep(0.1)


def pause(stack: Stack, schedule_id: str, paused: bool = True) -> dict[str, Any]:
    status, shown = call(stack, f"{PATH}/{schedule_id}", stack.api_key, {"paused": paused}, method="PATCH")
    assert status == 200, shown
    return shown


def test_a_time_that_comes_makes_one_batch_that_runs(stack: Stack, client: OpenAI) -> None:
    status, made = make(stack, client, "nightly", time_zone="Europe/Berlin")
    assert status == 201 and made["runs"] == [] and made["time_zone"] == "Europe/Berlin"
    assert made["next_at"][14:16] == "00" and made["next_at"][11:13] in ("01", "02")
    set_due(stack, made["schedule_id"])
    (run, *_) = runs(stack, made["schedule_id"])
    pause(stack, made["schedule_id"])
    batch = wait_for(client, client.batches.retrieve(run["batch_id"]))
    assert batch.status == "completed" and batch.metadata == {"of": "nightly"} and run["problem"] is None
    page = call(stack, f"{PATH}?limit=1", stack.api_key)[1]
    assert [each["name"] for each in page["data"]] == ["nightly"]
    # Its file is in use.
    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(batch.input_file_id)
    assert refused.value.code == "file_in_use"
    assert call(stack, f"{PATH}/{made['schedule_id']}", stack.api_key, method="DELETE")[0] == 204
    assert call(stack, f"{PATH}/{made['schedule_id']}", stack.api_key)[0] == 404
    assert client.files.delete(batch.input_file_id).deleted


def test_several_times_were_missed_and_one_batch_is_made_by_whoever_leads(
    stack: Stack, client: OpenAI
) -> None:
    """The leader is killed again and again around the time; a second service stands by."""
    _, made = make(stack, client, "restarts")
    process = stack.processes.pop("batch")
    process.kill()
    process.wait()
    set_due(stack, made["schedule_id"], minutes_ago=30, cron="*/10 * * * *")
    for name in ("batch", "standby"):
        stack._start(name, "services.batch", {"OPS_PORT": "0"})
    for _ in range(3):
        time.sleep(1.5)
        for name in ("batch", "standby"):
            process = stack.processes.pop(name)
            process.kill()
            process.wait()
            stack._start(name, "services.batch", {"OPS_PORT": "0"})
    found = runs(stack, made["schedule_id"], limit_s=60)
    pause(stack, made["schedule_id"])
    due = [run["due_at"] for run in found]
    assert len(due) == len(set(due)) <= 2  # two only if a new time came meanwhile
    batches = query(
        stack, "SELECT batch_id FROM batch.batches WHERE metadata->>'of' = 'restarts' ORDER BY batch_id"
    )
    assert [row["batch_id"] for row in batches] == sorted(run["batch_id"] for run in found)
    stack.stop("standby")


def test_nobody_pays_and_nothing_is_made(stack: Stack, client: OpenAI) -> None:
    _, made = make(stack, client, "unpaid")
    team = query(stack, "SELECT team_id FROM batch.schedules WHERE schedule_id = $1", made["schedule_id"])[0][
        "team_id"
    ]
    admin = stack._environment["ROUNDHOUSE_ADMIN_KEY"]
    call(stack, "/api/billing/account/terms?team=load", admin, {"pays": "prepaid"}, method="PUT")
    set_due(stack, made["schedule_id"])
    assert runs(stack, made["schedule_id"])[0]["problem"] == "insufficient_credit"
    call(stack, "/api/billing/account/terms?team=load", admin, {"pays": "postpaid"}, method="PUT")
    execute(
        stack.database_url,
        "INSERT INTO billing.budgets (budget_id, team_id, scope, scope_id, period, limit_nanousd, alert_percents, actions)"
        f" VALUES ('bud_1', '{team}', 'team', '{team}', 'day', 0, '{{}}', '{{stop_batches}}')",
    )
    execute(
        stack.database_url, f"DELETE FROM batch.schedule_runs WHERE schedule_id = '{made['schedule_id']}'"
    )
    set_due(stack, made["schedule_id"])
    assert runs(stack, made["schedule_id"])[0]["problem"] == "budget_exceeded"
    execute(stack.database_url, "UPDATE billing.budgets SET deleted_at = now() WHERE budget_id = 'bud_1'")
    pause(stack, made["schedule_id"])
    assert not query(stack, "SELECT 1 FROM batch.batches WHERE metadata->>'of' = 'unpaid'")


def test_a_paused_schedule_makes_nothing_and_goes_on_with_the_next_time(stack: Stack, client: OpenAI) -> None:
    _, made = make(stack, client, "paused")
    shown = pause(stack, made["schedule_id"])
    assert shown["paused"] is True and shown["next_at"] is None
    set_due(stack, made["schedule_id"])
    time.sleep(2.5)
    shown = pause(stack, made["schedule_id"], paused=False)
    time.sleep(1.5)
    assert shown["paused"] is False and shown["next_at"] > made["created_at"]
    assert call(stack, f"{PATH}/{made['schedule_id']}", stack.api_key)[1]["runs"] == []


def test_a_file_that_is_gone_is_said(stack: Stack, client: OpenAI) -> None:
    _, made = make(stack, client, "no-file")
    execute(
        stack.database_url,
        f"UPDATE gateway.files SET deleted_at = now() WHERE file_id = '{made['batch']['input_file_id']}'",
    )
    set_due(stack, made["schedule_id"])
    assert runs(stack, made["schedule_id"])[0]["problem"] == "file_not_found"
    pause(stack, made["schedule_id"])


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"cron": "0 3 * *"}, 400, "invalid_value"),
        ({"cron": "99 3 * * *"}, 400, "invalid_schedule"),
        ({"cron": "0 0 31 2 *"}, 400, "invalid_schedule"),
        ({"time_zone": "Mars/Phobos"}, 400, "invalid_schedule"),
        ({"batch": {}}, 400, "missing_parameter"),
        (
            {"batch": {"input_file_id": "f", "endpoint": CHAT, "completion_window": "9h", "x": 1}},
            400,
            "unknown_parameter",
        ),
        ({"nonsense": 1}, 400, "unknown_parameter"),
        ({"name": "taken"}, 409, "name_taken"),
    ],
)
def test_what_is_no_schedule_is_refused(
    stack: Stack, client: OpenAI, change: dict[str, Any], status: int, code: str
) -> None:
    make(stack, client, "taken")
    found, refused = make(stack, client, **({"name": "bad"} | change))
    assert (found, refused["code"]) == (status, code)
    assert not query(stack, "SELECT 1 FROM batch.schedules WHERE name = 'bad'")


def test_another_team_s_schedule_does_not_exist(stack: Stack, client: OpenAI) -> None:
    _, made = make(stack, client, "mine")
    admin = stack._environment["ROUNDHOUSE_ADMIN_KEY"]
    post(f"{stack.base_url}/api/teams", admin, {"slug": "other", "name": "Other"})
    other = post(f"{stack.base_url}/api/keys?team=other", admin, {"name": "k", "scopes": ["inference"]})[
        "secret"
    ]
    for schedule_id in (made["schedule_id"], NOBODY):
        for method, body in (("GET", None), ("PATCH", {"paused": True}), ("DELETE", None)):
            assert call(stack, f"{PATH}/{schedule_id}", other, body, method=method)[0] == 404
    assert call(stack, PATH, other)[1]["data"] == []
    assert call(stack, f"{PATH}/{made['schedule_id']}", stack.api_key)[1]["paused"] is False


def test_the_command_makes_pauses_and_ends_schedules(stack: Stack, tmp_path: Any) -> None:
    (tmp_path / "lines.jsonl").write_text(chat_lines(stack, 2))
    made = roundhouse(stack, "schedule", "weekly", str(tmp_path / "lines.jsonl"), "0 4 * * mon", "--json")
    assert made.returncode == 0, made.stderr
    schedule_id = json.loads(made.stdout)["schedule_id"]
    assert "weekly" in roundhouse(stack, "schedules").stdout
    assert json.loads(roundhouse(stack, "pause", schedule_id, "--json").stdout)["paused"] is True
    assert json.loads(roundhouse(stack, "resume", schedule_id, "--json").stdout)["paused"] is False
    assert roundhouse(stack, "unschedule", schedule_id).returncode == 0
    wrong = roundhouse(stack, "pause", schedule_id)
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1


def test_each_state_is_told_once_and_in_order(stack: Stack, client: OpenAI) -> None:
    batch = wait_for(client, submit(client, chat_lines(stack, 3, 2)))
    failed = wait_for(client, submit(client, "nonsense"))
    expected = {
        batch.id: ["validating", "in_progress", "finalizing", "completed"],
        failed.id: ["validating", "failed"],
    }
    for batch_id, states in expected.items():
        told = call(stack, f"/api/batches/{batch_id}/events", stack.api_key)[1]["data"]
        assert [event["state"] for event in told] == states
    found: dict[str, list[str]] = {}
    cursor, deadline_s = "", time.monotonic() + 30
    while not expected.items() <= found.items():
        assert time.monotonic() < deadline_s, found
        status, page = call(stack, f"/api/batches/events?limit=3{cursor}", stack.api_key)
        assert status == 200 and len(page["data"]) <= 3
        for event in page["data"]:
            found.setdefault(event["batch_id"], []).append(event["state"])
        cursor = f"&cursor={page['next_cursor']}" if page["next_cursor"] else ""
        time.sleep(0 if page["data"] else 0.5)
    admin = stack._environment["ROUNDHOUSE_ADMIN_KEY"]
    assert call(stack, "/api/batches/events", admin)[1]["data"] == []
    assert call(stack, f"/api/batches/{batch.id}/events", admin)[0] == 404
    assert call(stack, "/api/batches/events?cursor=eA", stack.api_key)[0] == 400
