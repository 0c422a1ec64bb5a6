"""Quotes over HTTP: a real gateway, batch service, billing, tokenizers and database; a worker with a stub engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from infra.local.scratch import execute
from loadtest.stack import MODEL_TYPE, Stack, post, running_stack
from tests.conftest import ROOT
from tests.integration.test_batch_service import CHAT, chat_line, chat_lines, query, records, submit, wait_for

NOBODY = "0" * 32


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


def call(
    stack: Stack, path: str, key: str, body: dict[str, Any] | None = None, method: str | None = None
) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        stack.base_url + path, data=None if body is None else json.dumps(body).encode(), method=method
    )
    request.add_header("Authorization", f"Bearer {key}")
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            raw = answer.read()
            return answer.status, json.loads(raw) if raw else {}
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def upload(client: OpenAI, content: str) -> str:
    return client.files.create(file=("lines.jsonl", content.encode()), purpose="batch").id


def ask(stack: Stack, file_id: str, **more: Any) -> tuple[int, dict[str, Any]]:
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "1h", **more}
    return call(stack, "/api/batches/quote", stack.api_key, body)


def test_a_quote_counts_prompts_and_says_what_it_does_not_know(stack: Stack, client: OpenAI) -> None:
    lines = [chat_line(stack, f"line-{index}", 50) for index in range(300)]
    lines += [chat_line(stack, "bad", temperature=9)]
    status, made = ask(stack, upload(client, "\n".join(lines)))
    assert status == 200 and made["status"] == "ready", made
    counted = made["quote"]["counted"]
    assert (counted["lines"], counted["refused_lines"], made["quote"]["model"]) == (301, 1, stack.model)
    assert counted["answers"] == {"basis": "limit", "mean_tokens": None, "requests": 0}
    assert counted["completion_tokens"] == counted["completion_tokens_at_most"] == 300 * 50
    assert made["quote"]["tokens"] is None
    (resource,) = made["quote"]["resources"]
    assert (resource["option"], resource["pace_basis"], resource["tokens_per_s"]) == ("stub", "unknown", None)
    assert (resource["gpus"], resource["in_time"], resource["start_basis"]) == (1, None, "assumed")
    assert {offer["cost_nanousd"] for offer in resource["offers"]} == {None}
    assert call(stack, f"/api/batches/quotes/{made['quote_id']}", stack.api_key) == (200, made)
    # The prompts are what the same lines are charged for.
    batch = wait_for(client, submit(client, "\n".join(lines)))
    assert batch.usage is not None and batch.usage.input_tokens == counted["prompt_tokens"]
    records(stack, batch, 300)


def test_a_quote_is_made_of_prices_in_force_and_of_what_was_measured(stack: Stack, client: OpenAI) -> None:
    batch = wait_for(client, submit(client, chat_lines(stack, 20, 8)))
    records(stack, batch, 20)
    team = query(stack, "SELECT team_id FROM scheduler.resources LIMIT 1")[0]["team_id"]
    execute(
        stack.database_url,
        f"""
        INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at) VALUES
            ('price_old', '{MODEL_TYPE}', 'batch', 1, 1, now() - interval '2 days'),
            ('price_now', '{MODEL_TYPE}', 'batch', 20, 60, now() - interval '1 day'),
            ('price_later', '{MODEL_TYPE}', 'batch', 9, 9, now() + interval '1 day'),
            ('price_live', '{MODEL_TYPE}', 'live', 7, 7, now() - interval '1 hour');
        INSERT INTO billing.rates (rate_id, option_id, hourly_rate_nanousd, starts_at, actor) VALUES
            ('rate_now', 'opt_stub', 600000000, now(), 'test'),
            ('rate_later', 'opt_stub', 999, now() + interval '1 day', 'test');
        DELETE FROM billing.hour_counts; DELETE FROM billing.hour_busy;
        INSERT INTO scheduler.resources (resource_id, team_id, name, model_type, option_id, fixed_count, state) VALUES
            ('res_other', 'team_other', 'r', '{MODEL_TYPE}', 'opt_stub', 1, 'off'),
            ('res_mine', '{team}', 'mine', '{MODEL_TYPE}', 'opt_stub', 1, 'off');
        INSERT INTO billing.hour_busy (resource_id, hour, busy_ms) VALUES
            ('res_mine', date_trunc('hour', now()) - interval '5 hours', 100000),
            ('res_mine', date_trunc('hour', now()) - interval '6 hours', 300000),
            ('res_mine', date_trunc('hour', now()) - interval '7 hours', 100000),
            ('res_mine', date_trunc('hour', now()) - interval '30 days', 100000),
            ('res_other', date_trunc('hour', now()) - interval '6 hours', 100000);
        INSERT INTO billing.hour_counts (resource_id, hour, model_id, work_class, model_name, requests, errors, cancelled,
            prompt_tokens, completion_tokens) VALUES
            ('res_mine', date_trunc('hour', now()) - interval '5 hours', 'm', 'batch', 'm', 1, 0, 0, 10000, 19000),
            ('res_mine', date_trunc('hour', now()) - interval '6 hours', 'm', 'batch', 'm', 1, 0, 0, 0, 20000),
            ('res_mine', date_trunc('hour', now()) - interval '7 hours', 'm', 'live', 'm', 1, 0, 0, 0, 90000),
            ('res_mine', date_trunc('hour', now()) - interval '30 days', 'm', 'batch', 'm', 1, 0, 0, 0, 90000),
            ('res_other', date_trunc('hour', now()) - interval '6 hours', 'm', 'batch', 'm', 1, 0, 0, 0, 90000);
        INSERT INTO scheduler.starts (incarnation, resource_id, option_id, granted_at, ended_at, succeeded, reason)
        SELECT 'inc_' || n, 'res_mine', 'opt_stub', now() - interval '1 hour', now() - interval '1 hour'
            + make_interval(secs => n), true, '' FROM generate_series(10, 14) n;
        """,
    )
    status, made = ask(stack, upload(client, chat_lines(stack, 400, 50)), max_gpus=4)
    assert status == 200, made
    counted, (resource,) = made["quote"]["counted"], made["quote"]["resources"]
    # 300 answers of 50 and 20 of 8, by the test before and this one
    assert counted["answers"]["basis"] == "mean" and counted["answers"]["requests"] >= 20
    mean = counted["answers"]["mean_tokens"]
    assert 8 <= mean <= 50
    assert counted["completion_tokens"] == pytest.approx(400 * mean, abs=1)
    assert made["quote"]["tokens"]["price_id"] == "price_now"
    cost = counted["prompt_tokens"] * 20 + counted["completion_tokens"] * 60
    assert made["quote"]["tokens"]["cost_nanousd"] == cost
    assert (resource["pace_basis"], resource["tokens_per_s"]) == ("batches", pytest.approx(100.0))
    assert (resource["start_s"], resource["start_basis"]) == (pytest.approx(12.0), "measured")
    assert resource["hourly_rate_nanousd"] == 600_000_000
    work = counted["completion_tokens"] + 0.1 * counted["prompt_tokens"]
    offers = {offer["gpus"]: offer for offer in resource["offers"]}
    assert sorted(offers) == [1, 2, 4] and resource["gpus"] == 1 and resource["in_time"] is True
    for gpus, offer in offers.items():
        assert offer["finish_s"] == pytest.approx(12 + work / 100 / gpus, abs=1)
        assert offer["cost_nanousd"] == offer["minutes"] * 10_000_000
    # Without batches the best hour of requests counts, of this team's GPUs alone.
    execute(
        stack.database_url,
        "DELETE FROM billing.hour_counts WHERE work_class = 'batch' AND resource_id = 'res_mine'",
    )
    _, made = ask(stack, upload(client, chat_lines(stack, 4)))
    (resource,) = made["quote"]["resources"]
    assert (resource["pace_basis"], resource["tokens_per_s"]) == ("requests", pytest.approx(900.0))


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"input_file_id": "file_" + NOBODY}, 404, "not_found"),
        ({"completion_window": "0h"}, 400, "invalid_value"),
        ({"completion_window": "500h"}, 400, "invalid_value"),
        ({"endpoint": "/v1/responses"}, 400, "invalid_value"),
        ({"endpoint": "/v1/embeddings"}, 400, "url_mismatch"),
        ({"option": "nonsense"}, 400, "unknown_option"),
        ({"max_gpus": 0}, 400, "invalid_value"),
        ({"max_gpus": 65}, 400, "invalid_value"),
        ({"nonsense": 1}, 400, "unknown_parameter"),
    ],
)
def test_a_bad_question_is_refused(
    stack: Stack, client: OpenAI, change: dict[str, Any], status: int, code: str
) -> None:
    file_id = upload(client, chat_line(stack, "a"))
    refused_status, refused = ask(stack, file_id, **change)
    assert (refused_status, refused["code"]) == (status, code)


def test_a_bad_line_is_named(stack: Stack, client: OpenAI) -> None:
    status, refused = ask(stack, upload(client, chat_line(stack, "a") + "\nnonsense"))
    assert (status, refused["code"]) == (400, "invalid_json_line") and "Line 2" in refused["detail"]


def test_another_team_s_quote_and_file_do_not_exist(stack: Stack, client: OpenAI) -> None:
    admin = stack._environment["ROUNDHOUSE_ADMIN_KEY"]
    post(f"{stack.base_url}/api/teams", admin, {"slug": "other", "name": "Other"})
    other = post(f"{stack.base_url}/api/keys?team=other", admin, {"name": "k", "scopes": ["inference"]})[
        "secret"
    ]
    file_id = upload(client, chat_line(stack, "a"))
    _, made = ask(stack, file_id)
    for quote_id in (made["quote_id"], f"quote_{NOBODY}"):
        assert call(stack, f"/api/batches/quotes/{quote_id}", other)[0] == 404
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "1h"}
    assert call(stack, "/api/batches/quote", other, body)[0] == 404
    with pytest.raises(openai.NotFoundError):
        OpenAI(base_url=f"{stack.base_url}/v1", api_key=other, max_retries=0).files.retrieve(file_id)


def test_a_quote_is_counted_when_the_service_was_killed_meanwhile(stack: Stack, client: OpenAI) -> None:
    count = 20_000  # it takes seconds, so that the service is killed in the middle
    file_id = upload(client, chat_lines(stack, count, 8))
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "1h"}
    asking = subprocess.Popen(
        [sys.executable, "-c", _ASK, stack.base_url, stack.api_key, json.dumps(body)], stdout=subprocess.PIPE
    )
    while not query(stack, "SELECT 1 FROM batch.quotes WHERE state = 'counting'"):
        assert asking.poll() is None
    process = stack.processes.pop("batch")
    process.kill()
    process.wait()
    assert query(stack, "SELECT 1 FROM batch.quotes WHERE state = 'counting'")
    stack.start_service("batch")
    output, _ = asking.communicate(timeout=90)
    made = json.loads(output)
    deadline_s = time.monotonic() + 60
    while made["status"] == "counting":
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
        _, made = call(stack, f"/api/batches/quotes/{made['quote_id']}", stack.api_key)
    assert made["quote"]["counted"]["lines"] == count


_ASK = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1] + "/api/batches/quote", data=sys.argv[3].encode())
request.add_header("Authorization", "Bearer " + sys.argv[2])
request.add_header("Content-Type", "application/json")
print(urllib.request.urlopen(request, timeout=90).read().decode())
"""


def test_the_command_shows_a_quote(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text(chat_lines(stack, 20))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROUNDHOUSE_")}
    environment |= {"ROUNDHOUSE_URL": stack.base_url, "ROUNDHOUSE_API_KEY": stack.api_key}

    def quote(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "services.cli",
            "batch",
            "quote",
            str(tmp_path / "lines.jsonl"),
            *arguments,
        ]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    shown = quote("--deadline", "2h")
    assert shown.returncode == 0, shown.stderr
    assert "20 lines" in shown.stdout and "stub" in shown.stdout
    assert json.loads(quote("--json").stdout)["quote"]["counted"]["lines"] == 20
    wrong = quote("--option", "nonsense")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "nonsense" in wrong.stderr
