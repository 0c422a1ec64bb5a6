"""Whose lines run when, on a shared pool with real processes: teams by tokens, models one after the other, kin together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Batch

from infra.local.demo_model import BASE_NAME
from infra.local.scratch import execute
from loadtest.stack import MODEL_TYPE, Stack, post, running_stack
from tests.integration.test_batch_service import OVER, chat_line, query, submit, wait_for

IN_FLIGHT = 8
TEAMS = ("long", "short")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        execute(
            running.database_url,
            f"""
            UPDATE scheduler.resources SET pool = true,
                team_id = (SELECT team_id FROM gateway.teams WHERE is_platform);
            INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at)
            VALUES ('price_b', '{MODEL_TYPE}', 'batch', 1, 1, '1970-01-01T00:00:00Z');
            """,
        )
        running._environment["BATCH_IN_FLIGHT"] = str(IN_FLIGHT)
        running.start_service("billing")
        running.start_service("batch")
        running.start_worker("worker", step_s=0.01, max_batch=IN_FLIGHT)
        yield running


def client_of(stack: Stack, team: str, models: tuple[str, ...] = (BASE_NAME,)) -> OpenAI:
    """A new team with models of its own."""
    admin = stack._environment["ROUNDHOUSE_ADMIN_KEY"]
    post(f"{stack.base_url}/api/teams", admin, {"slug": team, "name": team})
    for name in models:
        body = {"name": name, "path": BASE_NAME, "model_type": MODEL_TYPE}
        post(f"{stack.base_url}/api/models?team={team}", admin, body)
    key = post(f"{stack.base_url}/api/keys?team={team}", admin, {"name": team, "scopes": ["inference"]})
    return OpenAI(base_url=f"{stack.base_url}/v1", api_key=key["secret"], max_retries=0)


def lines(stack: Stack, model: str, count: int, max_tokens: int, **body: Any) -> str:
    return "\n".join(chat_line(stack, f"line-{n}", max_tokens, model=model, **body) for n in range(count))


def tokens_done(stack: Stack, batch: Batch) -> int:
    (row,) = query(
        stack, "SELECT prompt_tokens + completion_tokens FROM batch.batches WHERE batch_id = $1", batch.id
    )
    return int(row[0])


def sent_order(stack: Stack, *batches: Batch) -> list[tuple[int, str, str]]:
    """When each line went out, of which batch it is, and its id. Lines that went out together are in no order."""
    rows = query(
        stack,
        "SELECT accepted_unix_ms, batch_id, custom_id FROM batch.lines WHERE batch_id = ANY($1) ORDER BY 1, 2, line",
        [batch.id for batch in batches],
    )
    return [(row[0], row[1], row[2]) for row in rows]


@pytest.mark.timeout(300)
def test_two_teams_share_a_pool_by_tokens_whoever_came_first_and_however_long_the_lines_are(
    stack: Stack,
) -> None:
    long, short = (client_of(stack, team) for team in TEAMS)
    # 14,400 tokens and 8,000: the first has all of the pool before the second comes, and is not over by then.
    first = submit(long, lines(stack, f"long/{BASE_NAME}", 160, 80))
    wait_until(lambda: tokens_done(stack, first) > 0)
    second = submit(short, lines(stack, f"short/{BASE_NAME}", 400, 10))
    wait_until(lambda: tokens_done(stack, second) > 0)
    since = [tokens_done(stack, batch) for batch in (first, second)]
    wait_until(lambda: tokens_done(stack, second) > since[1] + 5000)
    done = [tokens_done(stack, batch) - before for batch, before in zip((first, second), since, strict=True)]
    assert long.batches.retrieve(first.id).status not in OVER, "it was over before the other had its share"
    # What is out, and a quantum, may be ahead of the other: 8 lines of 90 tokens, and 1,024.
    assert abs(done[0] - done[1]) < 2000, done
    for client, batch in ((long, first), (short, second)):
        counts = wait_for(client, batch, limit_s=120).request_counts
        assert counts is not None and counts.completed == counts.total


def wait_until(holds: Any, limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_team_s_models_run_one_after_the_other(stack: Stack) -> None:
    client = client_of(stack, "two", ("a", "b"))
    batches = [submit(client, lines(stack, "two/a", 120, 20))]
    wait_until(lambda: any(sent for sent, _, _ in sent_order(stack, *batches)))
    # Which of two that are new is checked first is nobody's promise.
    batches.append(submit(client, lines(stack, "two/b", 60, 8)))
    for batch in batches:
        assert wait_for(client, batch).status == "completed"
    order = [batch_id for _, batch_id, _ in sent_order(stack, *batches)]
    assert [batch_id for batch_id, _ in groupby(order)] == [batch.id for batch in batches]


def test_lines_that_begin_alike_go_out_together(stack: Stack) -> None:
    client = client_of(stack, "kin")
    begin = {name: f"{name} " * 80 for name in ("red", "green", "blue")}
    texts = [
        chat_line(stack, f"{name}-{n}", 8, model=f"kin/{BASE_NAME}",
                  messages=[{"role": "user", "content": f"{begin[name]} {n}?"}])
        for n in range(20) for name in begin
    ]  # fmt: skip
    batch = submit(client, "\n".join(texts))
    assert wait_for(client, batch).status == "completed"
    groups = [
        {custom_id.partition("-")[0] for _, _, custom_id in together}
        for _, together in groupby(sent_order(stack, batch), key=lambda row: row[0])
    ]
    seen = [name for names in groups for name in sorted(names)]
    assert len(groups) > 5, "they went out in small groups"
    assert sum(len(names) > 1 for names in groups) <= 2, groups
    assert len([name for name, _ in groupby(seen)]) <= 5, groups
