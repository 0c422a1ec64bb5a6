"""Batches that own their resource, with real processes: gateway, batch service, scheduler, node agent, billing, and workers
with a stub engine that the agent starts."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from infra.local.scratch import execute
from loadtest.stack import MODEL_TYPE, Stack, post, running_stack
from tests.integration.test_batch_quotes import call
from tests.integration.test_batch_service import CHAT, chat_lines, query, results, wait_for, wait_for_lines

TOKENS = 20


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        execute(
            running.database_url,
            "UPDATE scheduler.performance_options SET max_batch = 8, hourly_rate_nanousd = 600000000",
        )
        running.start_service("batch")
        running.start_service("billing")
        running.start_fleet(2, "loadtest.stub_worker", {"STUB_STEP_S": "0.05"})
        yield running


@pytest.fixture
def client(stack: Stack) -> OpenAI:
    return OpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.api_key, max_retries=0)


def create(client: OpenAI, content: str, own: dict[str, Any] | None = None, window: str = "24h") -> Batch:
    file = client.files.create(file=("lines.jsonl", io.BytesIO(content.encode())), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window=window,  # type: ignore[arg-type] # the package knows OpenAI's alone
        extra_body={"own_resource": own or {}},
    )


def resource_of(stack: Stack, batch: Batch) -> dict[str, Any] | None:
    rows = query(stack, "SELECT * FROM scheduler.resources WHERE name = $1", batch.id)
    return dict(rows[0]) if rows else None


def wait_until_gone(stack: Stack, batch: Batch, limit_s: float = 60.0) -> None:
    """Nothing of the batch's resource runs or is there any more."""
    deadline_s = time.monotonic() + limit_s
    while True:
        found = resource_of(stack, batch)
        released = query(
            stack, "SELECT 1 FROM batch.own_resources WHERE batch_id = $1 AND state = 'released'", batch.id
        )
        if (found is None or found["deleted_at"] is not None) and released:
            break
        assert time.monotonic() < deadline_s, found
        time.sleep(0.2)
    if found is not None:
        assert not query(stack, "SELECT 1 FROM scheduler.places WHERE resource_id = $1", found["resource_id"])
        assert not query(
            stack,
            "SELECT 1 FROM scheduler.state_intervals WHERE resource_id = $1 AND ended_at IS NULL",
            found["resource_id"],
        )


def test_a_batch_has_a_resource_for_itself_and_leaves_nothing(stack: Stack, client: OpenAI) -> None:
    total = 120
    batch = create(client, chat_lines(stack, total, TOKENS))
    batch = wait_for_lines(client, batch, 10)
    found = resource_of(stack, batch)
    assert found is not None and (found["fixed_count"], found["wanted"], found["takes_traffic"]) == (
        1,
        "on",
        False,
    )
    assert found["on_until"] is not None
    # Nobody else's requests go there: for them the team's own resource is off.
    with pytest.raises(openai.ConflictError) as refused:
        client.chat.completions.create(
            model=stack.model, messages=[{"role": "user", "content": "Hi"}], max_tokens=1
        )
    assert refused.value.code == "resource_off"
    batch = wait_for(client, batch)
    assert batch.status == "completed" and len(results(client, batch.output_file_id)) == total
    wait_until_gone(stack, batch)
    rows = query(stack, "SELECT DISTINCT resource_id FROM batch.lines WHERE batch_id = $1", batch.id)
    assert [row["resource_id"] for row in rows] == [found["resource_id"]]
    deadline_s = time.monotonic() + 90
    while True:
        own = client.batches.retrieve(batch.id).model_extra["roundhouse"]["own_resource"]  # type: ignore[index]
        if own["real"]["minutes"]:
            break
        assert time.monotonic() < deadline_s, own
        time.sleep(1)
    assert (own["state"], own["resource_id"], own["option"], own["gpus"]) == (
        "released", found["resource_id"], "stub", 1
    )  # fmt: skip
    assert own["quoted"]["gpus"] == 1 and own["real"]["finish_s"] > 0
    assert own["real"]["cost_nanousd"] == own["real"]["minutes"] * 10_000_000


def test_the_resource_goes_when_the_batch_is_cancelled_or_expires(stack: Stack, client: OpenAI) -> None:
    batches = [create(client, chat_lines(stack, 400, TOKENS)) for _ in range(2)]
    batches = [wait_for_lines(client, batch, 5) for batch in batches]
    client.batches.cancel(batches[0].id)
    execute(
        stack.database_url, f"UPDATE batch.batches SET expires_at = now() WHERE batch_id = '{batches[1].id}'"
    )
    ended = [wait_for(client, batch) for batch in batches]
    assert [batch.status for batch in ended] == ["cancelled", "expired"]
    for batch in ended:
        wait_until_gone(stack, batch)


def test_a_batch_that_is_cancelled_while_it_is_checked_leaves_nothing(stack: Stack, client: OpenAI) -> None:
    batch = create(client, chat_lines(stack, 4000, 1))
    client.batches.cancel(batch.id)
    batch = wait_for(client, batch)
    assert batch.status == "cancelled"
    execute(
        stack.database_url,
        f"UPDATE batch.own_resources SET held_at = held_at - interval '1 hour' WHERE batch_id = '{batch.id}'",
    )
    deadline_s = time.monotonic() + 30
    while query(
        stack,
        "SELECT 1 FROM scheduler.resources WHERE name = $1 AND deleted_at IS NULL"
        " UNION ALL SELECT 1 FROM batch.own_resources WHERE batch_id = $1 AND state = 'held'",
        batch.id,
    ):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_the_batch_is_finished_and_its_resource_gone_although_the_service_was_killed(
    stack: Stack, client: OpenAI
) -> None:
    total = 200
    batch = create(client, chat_lines(stack, total, TOKENS))
    for count in (0, 20, 100):
        if count:
            batch = wait_for_lines(client, batch, count)
        process = stack.processes.pop("batch")
        process.kill()
        process.wait()
        stack.start_service("batch")
    batch = wait_for(client, batch, limit_s=90)
    assert batch.status == "completed" and len(results(client, batch.output_file_id)) == total
    rows = query(stack, "SELECT 1 FROM scheduler.resources WHERE name = $1", batch.id)
    assert len(rows) == 1
    wait_until_gone(stack, batch)


def test_a_resource_goes_off_by_itself_when_the_service_does_not_come_back(
    stack: Stack, client: OpenAI
) -> None:
    batch = wait_for_lines(client, create(client, chat_lines(stack, 300, TOKENS)), 5)
    process = stack.processes.pop("batch")
    process.kill()
    process.wait()
    found = resource_of(stack, batch)
    assert found is not None
    left_s = query(
        stack,
        "SELECT extract(epoch FROM on_until - now())::float8 AS s FROM scheduler.resources WHERE name = $1",
        batch.id,
    )[0]["s"]
    assert 0 < left_s <= 600
    execute(stack.database_url, f"UPDATE scheduler.resources SET on_until = now() WHERE name = '{batch.id}'")
    deadline_s = time.monotonic() + 30
    while query(stack, "SELECT 1 FROM scheduler.resources WHERE name = $1 AND state <> 'off'", batch.id):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert not query(
        stack,
        "SELECT 1 FROM scheduler.state_intervals WHERE resource_id = $1 AND ended_at IS NULL",
        found["resource_id"],
    )
    # Whoever leads next goes on with the batch.
    stack.start_service("batch")
    batch = wait_for_lines(client, batch, 40)
    client.batches.cancel(batch.id)
    wait_until_gone(stack, wait_for(client, batch))


def set_asleep(stack: Stack, when_asleep: str) -> None:
    """The team's own resource is on, and has no GPU for want of work."""
    body = {"autoscaling": True, "min": 0, "max": 1, "idle_timeout_s": 10, "when_asleep": when_asleep}
    path = f"/api/resources/{stack.resource_id}"
    assert call(stack, f"{path}/scaling", stack.api_key, body, method="PUT")[0] == 200
    assert call(stack, f"{path}/on", stack.api_key, method="POST")[0] == 202
    deadline_s = time.monotonic() + 60
    while call(stack, path, stack.api_key)[1]["state"] != "asleep":
        assert time.monotonic() < deadline_s
        time.sleep(0.5)


def submit_plain(client: OpenAI, content: str) -> Batch:
    file = client.files.create(file=("lines.jsonl", io.BytesIO(content.encode())), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def test_lines_wake_a_resource_that_is_asleep_unless_its_settings_refuse(
    stack: Stack, client: OpenAI
) -> None:
    set_asleep(stack, "refuse")
    waiting = submit_plain(client, chat_lines(stack, 5, 2))
    deadline_s = time.monotonic() + 30
    while True:
        shown = client.batches.retrieve(waiting.id).model_extra
        assert shown is not None
        if shown["roundhouse"]["waiting_for"] == "the team's resource is asleep":
            break
        assert time.monotonic() < deadline_s, shown
        time.sleep(0.2)
    time.sleep(3)
    assert call(stack, f"/api/resources/{stack.resource_id}", stack.api_key)[1]["state"] == "asleep"
    # The same batch goes on when the settings let lines wake it.
    set_asleep(stack, "wake")
    batch = wait_for(client, waiting, limit_s=60)
    assert batch.status == "completed" and batch.request_counts and batch.request_counts.completed == 5
    assert call(stack, f"/api/resources/{stack.resource_id}/off", stack.api_key, method="POST")[0] == 202


def failed_code(client: OpenAI, batch: Batch) -> str | None:
    batch = wait_for(client, batch)
    assert batch.status == "failed" and batch.errors is not None and batch.errors.data
    return batch.errors.data[0].code


def test_what_cannot_be_is_said_and_nothing_is_made(stack: Stack, client: OpenAI) -> None:
    line = chat_lines(stack, 2, 1)
    before = query(stack, "SELECT count(*) AS n FROM scheduler.resources")[0]["n"]
    team = query(stack, "SELECT team_id FROM scheduler.resources WHERE resource_id = $1", stack.resource_id)[
        0
    ]["team_id"]
    for own, code in (
        ({"option": "nonsense"}, "unknown_option"),
        ({"quote_id": "quote_" + "0" * 32}, "quote_not_found"),
    ):
        assert failed_code(client, create(client, line, own)) == code
    for wrong in ({"gpus": 1}, {"max_gpus": 0}, {"max_gpus": 65}):
        with pytest.raises(openai.BadRequestError):
            create(client, line, wrong)

    # Too slow on as many GPUs as there may be, as far as was measured.
    execute(
        stack.database_url,
        f"""
        INSERT INTO scheduler.resources (resource_id, team_id, name, model_type, option_id, fixed_count, state)
            VALUES ('res_past', '{team}', 'past', '{MODEL_TYPE}', 'opt_stub', 1, 'off');
        DELETE FROM billing.hour_busy; DELETE FROM billing.hour_counts;
        INSERT INTO billing.hour_busy VALUES ('res_past', date_trunc('hour', now()) - interval '3 hours', 1000000);
        INSERT INTO billing.hour_counts (resource_id, hour, model_id, work_class, model_name, requests, errors, cancelled,
            prompt_tokens, completion_tokens)
            VALUES ('res_past', date_trunc('hour', now()) - interval '3 hours', 'm', 'batch', 'm', 1, 0, 0, 0, 1);
        """,
    )
    assert failed_code(client, create(client, line, window="30m")) == "deadline_unreachable"
    execute(stack.database_url, "DELETE FROM billing.hour_busy WHERE resource_id = 'res_past'")

    key = post(
        f"{stack.base_url}/api/keys?team=load", stack._environment["ROUNDHOUSE_ADMIN_KEY"],
        {"name": "narrow", "scopes": ["inference"]},
    )["secret"]  # fmt: skip
    narrow = OpenAI(base_url=f"{stack.base_url}/v1", api_key=key, max_retries=0)
    with pytest.raises(openai.PermissionDeniedError):
        create(narrow, line)

    execute(stack.database_url, f"INSERT INTO scheduler.quotas VALUES ('{team}', 0)")
    assert failed_code(client, create(client, line)) == "over_quota"
    execute(stack.database_url, f"DELETE FROM scheduler.quotas WHERE scope = '{team}'")

    admin = stack._environment["ROUNDHOUSE_ADMIN_KEY"]
    status, _ = call_put(stack, "/api/billing/account/terms?team=load", admin, {"pays": "prepaid"})
    assert status == 200
    time.sleep(3)
    with pytest.raises(openai.APIStatusError) as refused:
        create(client, line)
    assert (refused.value.status_code, refused.value.code) == (402, "insufficient_credit")
    call_put(stack, "/api/billing/account/terms?team=load", admin, {"pays": "postpaid"})
    assert query(stack, "SELECT count(*) AS n FROM scheduler.resources")[0]["n"] == before + 1


def call_put(stack: Stack, path: str, key: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return call(stack, path, key, body, method="PUT")
