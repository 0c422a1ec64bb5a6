"""Batches on shared GPUs under hard caps, with real processes: nothing that a line may cost is left out of its caps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Batch

from infra.local.management_api import ManagementApi
from infra.local.scratch import execute
from loadtest.stack import MODEL_TYPE, Stack, running_stack
from tests.integration.test_batch_service import chat_lines, query, results, submit, wait_for

PROMPT_NANOUSD, COMPLETION_NANOUSD = 1_000_000, 3_000_000
LINE_TOKENS = 4


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        execute(
            running.database_url,
            f"""
            UPDATE scheduler.resources SET pool = true,
                team_id = (SELECT team_id FROM gateway.teams WHERE is_platform);
            INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at)
            VALUES ('price_b', '{MODEL_TYPE}', 'batch', {PROMPT_NANOUSD}, {COMPLETION_NANOUSD}, '1970-01-01T00:00:00Z');
            """,
        )
        running.start_service("billing")
        yield running


@pytest.fixture
def client(stack: Stack) -> OpenAI:
    return OpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.api_key, max_retries=0)


def cap(stack: Stack, limit_nanousd: int, action: str = "refuse_ppt") -> str:
    """Make a cap of the team's day; return its id. It holds with the next look at the table, half a second later."""
    body = {
        "scope": "team",
        "period": "day",
        "limit_usd": usd(limit_nanousd),
        "actions": [action],
    }
    made = ManagementApi(stack.base_url, stack.api_key).post("/api/budgets", body)
    time.sleep(2)
    return str(made["budget_id"])


def usd(nanousd: int) -> str:
    return f"{nanousd // 10**9}.{nanousd % 10**9:09}"


def raise_to(stack: Stack, budget_id: str, limit_nanousd: int) -> None:
    path = f"/api/budgets/{budget_id}"
    ManagementApi(stack.base_url, stack.api_key).patch(path, {"limit_usd": usd(limit_nanousd)})


def standing(stack: Stack) -> tuple[int, int]:
    """What is posted and what is reserved, of the only cap."""
    [row] = query(stack, "SELECT posted_nanousd, reserved_nanousd FROM billing_api.budgets_v1")
    return int(row[0]), int(row[1])


def line_nanousd(stack: Stack, client: OpenAI) -> int:
    """What one of `chat_lines` of the same length costs: measured without a cap, by a line of its own."""
    batch = wait_for(client, submit(client, chat_lines(stack, 1, LINE_TOKENS)))
    assert batch.usage is not None
    return batch.usage.input_tokens * PROMPT_NANOUSD + LINE_TOKENS * COMPLETION_NANOUSD


def extra(batch: Batch) -> dict[str, Any]:
    assert batch.model_extra is not None
    return dict(batch.model_extra["roundhouse"])


def wait_until_stuck(stack: Stack, client: OpenAI, batch: Batch, limit: int) -> tuple[Batch, int]:
    """Until the batch waits for a budget and nothing of it runs. Looks all the time that the cap holds."""
    deadline_s = time.monotonic() + 60
    while True:
        posted, reserved = standing(stack)
        assert posted <= limit and posted + reserved <= limit, (posted, reserved, limit)
        batch = client.batches.retrieve(batch.id)
        out = query(stack, "SELECT 1 FROM batch.lines WHERE state = 'running'")
        if not out and reserved == 0 and "budget" in (extra(batch)["waiting_for"] or ""):
            return batch, posted
        assert time.monotonic() < deadline_s, (batch, posted, reserved, len(out))
        time.sleep(0.05)


def done_lines(batch: Batch) -> int:
    assert batch.request_counts is not None
    return batch.request_counts.completed


@pytest.mark.parametrize("action", ["refuse_ppt", "stop_batches"])
def test_a_batch_spends_a_cap_to_its_last_line_and_never_more(
    stack: Stack, client: OpenAI, action: str
) -> None:
    stack.start_service("batch")
    stack.start_worker("worker", step_s=0.01, max_batch=32)
    each = line_nanousd(stack, client)
    limit = 11 * each + each // 2  # the line that was measured, ten more, and half of one
    budget_id = cap(stack, limit, action)

    batch, posted = wait_until_stuck(stack, client, submit(client, chat_lines(stack, 60, LINE_TOKENS)), limit)

    assert batch.status == "in_progress" and done_lines(batch) >= 9
    assert limit - posted < each + PROMPT_NANOUSD, "a line that fits is not let wait"
    time.sleep(2)
    assert standing(stack)[0] == posted, "nothing goes out at a spent cap"

    raise_to(stack, budget_id, 100 * each)
    batch = wait_for(client, batch)
    assert batch.status == "completed" and done_lines(batch) == 60
    deadline_s = time.monotonic() + 30
    while standing(stack)[1] and time.monotonic() < deadline_s:
        time.sleep(0.2)
    charged, held = standing(stack)
    assert held == 0, "no slice is left over"
    assert batch.usage is not None
    owed = batch.usage.input_tokens * PROMPT_NANOUSD + batch.usage.output_tokens * COMPLETION_NANOUSD
    assert charged == each + owed


@pytest.mark.timeout(300)
def test_a_cap_holds_when_the_batch_service_is_killed_with_lines_out(stack: Stack, client: OpenAI) -> None:
    stack.start_service("batch")
    # Slow enough that what the cap allows is not done before the third kill
    stack.start_worker("worker", step_s=0.25, max_batch=16)
    each = line_nanousd(stack, client)
    limit = 150 * each
    cap(stack, limit)
    batch = submit(client, chat_lines(stack, 400, LINE_TOKENS))
    killed = 0
    for _ in range(3):
        before = done_lines(client.batches.retrieve(batch.id))
        deadline_s = time.monotonic() + 60
        while done_lines(client.batches.retrieve(batch.id)) < before + 15:
            posted, reserved = standing(stack)
            assert posted <= limit and posted + reserved <= limit
            assert time.monotonic() < deadline_s, (before, posted, reserved)
            time.sleep(0.05)
        process = stack.processes.pop("batch")
        process.kill()
        process.wait()
        killed += 1
        # What it held of the cap is known by the lines' rows and by its leases alone: none of it is free yet.
        posted, reserved = standing(stack)
        assert reserved > 0 and posted + reserved <= limit
        stack.start_service("batch")
    # Slices that died with it stay reserved, what its lines held of them does not: the rows say what that was.
    deadline_s = time.monotonic() + 120
    while query(stack, "SELECT 1 FROM batch.lines WHERE state = 'running'") or not extra(
        client.batches.retrieve(batch.id)
    ).get("waiting_for"):
        posted, reserved = standing(stack)
        assert posted <= limit and posted + reserved <= limit
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    time.sleep(2)
    posted, reserved = standing(stack)
    done = done_lines(client.batches.retrieve(batch.id))
    assert killed == 3 and posted <= limit
    assert posted >= done * (each - 10 * PROMPT_NANOUSD)
    [row] = query(
        stack,
        "SELECT count(DISTINCT request_id) AS lines, count(*) AS jobs FROM billing.requests WHERE charged_nanousd > 0",
    )
    [lost] = query(
        stack,
        "SELECT count(*) AS jobs, count(*) FILTER (WHERE (payload->>'reserved_nanousd')::bigint > 0) AS freed"
        " FROM batch.outbox WHERE payload->>'error_code' = 'owner_lost'",
    )
    assert lost["jobs"] == lost["freed"] > 0, "whoever takes over frees what lost lines held"
    assert row["lines"] == row["jobs"] == done + 1, "each line that is done is charged once, and nothing else"


def test_a_line_that_was_out_too_long_frees_its_part_and_goes_out_again(stack: Stack, client: OpenAI) -> None:
    stack._environment["BATCH_CAPPED_LINE_S"] = "3"
    stack.start_service("batch")
    limit = 10**12
    cap(stack, limit)
    batch = submit(client, chat_lines(stack, 3, LINE_TOKENS))
    jobs: set[str] = set()
    deadline_s = time.monotonic() + 30
    while len(jobs) < 6 and time.monotonic() < deadline_s:  # each of three lines twice
        jobs |= {row[0] for row in query(stack, "SELECT job_id FROM batch.lines WHERE state = 'running'")}
        time.sleep(0.1)
    assert len(jobs) >= 6 and client.batches.retrieve(batch.id).status == "in_progress"
    stack.start_worker("worker", step_s=0.0, max_batch=32)
    batch = wait_for(client, batch)
    assert batch.status == "completed" and len(results(client, batch.output_file_id)) == 3
    deadline_s = time.monotonic() + 30
    while standing(stack)[1] and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert batch.usage is not None
    owed = batch.usage.input_tokens * PROMPT_NANOUSD + batch.usage.output_tokens * COMPLETION_NANOUSD
    assert standing(stack) == (owed, 0)
