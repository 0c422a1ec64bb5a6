"""Files and batches with real processes: gateway, batch service, billing, a worker with a stub engine, real servers."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from infra.local.demo_model import BASE_NAME
from infra.local.scratch import execute
from loadtest.stack import Stack, post, running_stack
from tests.conftest import ROOT

CHAT: Any = "/v1/chat/completions"
TOKENS = 4
OVER = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        running.start_service("batch")
        running.start_service("billing")
        running.start_worker("worker", step_s=0.01, max_batch=32)
        yield running


@pytest.fixture
def client(stack: Stack) -> OpenAI:
    return OpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.api_key, max_retries=0)


def query(stack: Stack, sql: str, *args: Any) -> list[asyncpg.Record]:
    async def run() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(stack.database_url)
        try:
            return list(await connection.fetch(sql, *args))
        finally:
            await connection.close()

    return asyncio.run(run())


def chat_line(stack: Stack, custom_id: str, max_tokens: int = TOKENS, **body: Any) -> str:
    messages = [{"role": "user", "content": f"Question {custom_id}?"}]
    body = {"model": stack.model, "messages": messages, "max_tokens": max_tokens, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body})


def chat_lines(stack: Stack, count: int, max_tokens: int = TOKENS) -> str:
    return "\n".join(chat_line(stack, f"line-{index}", max_tokens) for index in range(count))


def submit(client: OpenAI, content: str | bytes, endpoint: Any = CHAT, **more: Any) -> Batch:
    raw = content.encode() if isinstance(content, str) else content
    file = client.files.create(file=("lines.jsonl", io.BytesIO(raw)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def wait_for(client: OpenAI, batch: Batch, states: tuple[str, ...] = OVER, limit_s: float = 60.0) -> Batch:
    deadline_s = time.monotonic() + limit_s
    while batch.status not in states:
        assert time.monotonic() < deadline_s, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def wait_for_lines(client: OpenAI, batch: Batch, count: int) -> Batch:
    deadline_s = time.monotonic() + 60
    while batch.request_counts is None or batch.request_counts.completed < count:
        assert time.monotonic() < deadline_s and batch.status not in OVER, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def results(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def records(stack: Stack, batch: Batch, count: int, outcome: str = "succeeded") -> list[asyncpg.Record]:
    """What billing knows of the batch's lines by the requests in its files, once it knows of so many."""
    deadline_s = time.monotonic() + 30
    while True:
        found = query(
            stack,
            "SELECT r.* FROM billing.requests r JOIN batch.lines l USING (request_id)"
            " WHERE l.batch_id = $1 AND r.outcome = $2",
            batch.id,
            outcome,
        )
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline_s, f"billing knows {len(found)} of {count}"
        time.sleep(0.2)


# ---- the cycle


def test_the_openai_client_runs_a_whole_cycle(stack: Stack, client: OpenAI) -> None:
    content = "\n".join(
        [chat_line(stack, "zero"), chat_line(stack, "bad", temperature=9), "", chat_line(stack, "zw\u00f6lf"),
         chat_line(stack, "logs", logprobs=True), chat_line(stack, "streamed", stream=True)]
    )  # fmt: skip
    batch = submit(client, content, metadata={"night": "run"})
    assert batch.object == "batch" and batch.status == "validating" and batch.metadata == {"night": "run"}

    batch = wait_for(client, batch)

    assert batch.status == "completed"
    counts = batch.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (5, 3, 2)
    assert batch.created_at and batch.in_progress_at and batch.finalizing_at and batch.completed_at
    assert batch.expires_at == pytest.approx(batch.created_at + 24 * 3600, abs=2)
    answered = results(client, batch.output_file_id)
    assert [line["custom_id"] for line in answered] == ["zero", "zw\u00f6lf", "logs"]
    for line in answered:
        assert line["error"] is None and line["response"]["status_code"] == 200
        body = line["response"]["body"]
        assert body["object"] == "chat.completion" and body["model"] == stack.model
        assert body["choices"][0]["message"]["content"] == "t0 t1 t2 t3 "
        assert body["usage"]["completion_tokens"] == TOKENS
    assert len({line["id"] for line in answered}) == 3
    refused = {line["custom_id"]: line["response"] for line in results(client, batch.error_file_id)}
    assert {name: answer["status_code"] for name, answer in refused.items()} == {"bad": 400, "streamed": 400}
    assert refused["bad"]["body"]["error"]["param"] == "temperature"
    assert refused["streamed"]["body"]["error"]["code"] == "unsupported_parameter"
    charged = records(stack, batch, 3)
    assert {row["work_class"] for row in charged} == {"batch"}
    usage = batch.usage
    assert usage is not None
    assert usage.output_tokens == 3 * TOKENS == sum(row["completion_tokens"] for row in charged)
    assert usage.input_tokens == sum(row["prompt_tokens"] for row in charged)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": ["One", "Two"], "max_tokens": 2, "n": 2}),
        ("/v1/completions", {"prompt": "Echoed", "max_tokens": 2, "echo": True, "logprobs": 1}),
        ("/v1/embeddings", {"input": [f"text {index}" for index in range(70)], "encoding_format": "float"}),
    ],
)
def test_each_endpoint_gives_the_answer_that_it_gives_by_itself(
    stack: Stack, client: OpenAI, endpoint: str, body: dict[str, Any]
) -> None:
    body = {"model": stack.model, **body}
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    batch = wait_for(client, submit(client, json.dumps(line), endpoint=endpoint))
    assert batch.status == "completed", results(client, batch.error_file_id)
    (answered,) = results(client, batch.output_file_id)
    direct = post(stack.base_url + endpoint, stack.api_key, body)
    shown = answered["response"]["body"]
    for each in (shown, direct):
        for changing in ("id", "created"):
            each.pop(changing, None)
        each["usage"].pop("roundhouse")
    assert shown == direct


def test_lists_go_page_by_page_and_files_are_deleted(stack: Stack, client: OpenAI) -> None:
    made = [wait_for(client, submit(client, chat_line(stack, "a"))) for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == [batch.id for batch in made[::-1]]
    page = client.batches.list(limit=2)
    assert page.has_more and [batch.id for batch in page.data] == [made[2].id, made[1].id]
    names = {file.id for file in client.files.list(limit=1)}
    for batch in made:
        assert batch.output_file_id in names and batch.input_file_id in names
    assert {file.purpose for file in client.files.list(purpose="batch_output")} == {"batch_output"}
    for file_id in (made[0].input_file_id, made[0].output_file_id):
        assert file_id is not None
        assert client.files.retrieve(file_id).id == file_id
        assert client.files.delete(file_id).deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file_id)


def test_the_same_key_gives_the_same_batch_and_looking_costs_nothing(stack: Stack, client: OpenAI) -> None:
    raw = chat_lines(stack, 5).encode()
    file = client.files.create(file=("lines.jsonl", io.BytesIO(raw)), purpose="batch")
    made = {
        client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h",
            extra_headers={"Idempotency-Key": f"once-{file.id}"},
        ).id
        for _ in range(3)
    }  # fmt: skip
    (batch_id,) = made
    batch = wait_for(client, client.batches.retrieve(batch_id))
    for _ in range(50):
        client.batches.retrieve(batch_id)
    records(stack, batch, 5)
    time.sleep(1)
    assert len(records(stack, batch, 5)) == 5
    assert client.files.delete(file.id).deleted


# ---- what is refused


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"", "empty_file", None),
        (b"GOOD\nnot json\n", "invalid_json_line", 2),
        (b"GOOD\nGOOD", "duplicate_custom_id", 2),
        (b'{"custom_id": "\xff"}', "invalid_json_line", 1),
        (b'{"custom_id":"a","method":"POST","url":"/v1/embeddings","body":{"model":"m"}}', "url_mismatch", 1),
        (b'GOOD\n{"custom_id":"b","method":"POST","url":"URL","body":{"model":"m"}}', "model_mismatch", 2),
        (b'{"custom_id":"b","method":"POST","url":"URL","body":{"model":"m"}}', "model_not_found", None),
    ],
)
def test_a_bad_file_makes_a_batch_that_says_what_is_wrong(
    stack: Stack, client: OpenAI, content: bytes, code: str, line: int | None
) -> None:
    raw = content.replace(b"GOOD", chat_line(stack, "a").encode()).replace(b"URL", CHAT.encode())
    batch = wait_for(client, submit(client, raw))
    assert batch.status == "failed" and batch.failed_at
    assert batch.errors is not None and batch.errors.data is not None
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, line)]
    assert query(stack, "SELECT 1 FROM batch.lines WHERE batch_id = $1", batch.id) == []


def test_windows_line_ends_and_a_byte_order_mark_are_taken(stack: Stack, client: OpenAI) -> None:
    raw = b"\xef\xbb\xbf" + "\r\n".join(chat_line(stack, name) for name in "abc").encode() + b"\r\n"
    batch = wait_for(client, submit(client, raw))
    assert [line["custom_id"] for line in results(client, batch.output_file_id)] == ["a", "b", "c"]


@pytest.fixture(scope="module")
def other(stack: Stack) -> OpenAI:
    admin = stack._environment["ROUNDHOUSE_ADMIN_KEY"]
    post(f"{stack.base_url}/api/teams", admin, {"slug": "other", "name": "Other"})
    key = post(f"{stack.base_url}/api/keys?team=other", admin, {"name": "k", "scopes": ["inference"]})
    return OpenAI(base_url=f"{stack.base_url}/v1", api_key=key["secret"], max_retries=0)


def test_another_team_s_things_are_like_things_that_do_not_exist(
    stack: Stack, client: OpenAI, other: OpenAI
) -> None:
    batch = wait_for(client, submit(client, chat_line(stack, "a")))
    assert batch.output_file_id is not None
    nobody = batch.id[:-4] + "0000"
    answers = []
    for batch_id in (batch.id, nobody):
        with pytest.raises(openai.NotFoundError) as refused:
            other.batches.retrieve(batch_id)
        answers.append(refused.value.response.content)
        with pytest.raises(openai.NotFoundError):
            other.batches.cancel(batch_id)
        with pytest.raises(openai.NotFoundError):
            other.get(f"/batches/{batch_id}/results", cast_to=object)
    assert answers[0] == answers[1]
    for file_id in (batch.input_file_id, batch.output_file_id):
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file_id)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    assert list(other.batches.list()) == [] and list(other.files.list()) == []
    assert client.files.retrieve(batch.output_file_id).id == batch.output_file_id


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"endpoint": "/v1/responses"}, "invalid_value"),
        ({"completion_window": "24"}, "invalid_value"),
        ({"completion_window": "0h"}, "invalid_value"),
        ({"completion_window": "169h"}, "invalid_value"),
        ({"metadata": {"a": 1}}, "invalid_metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "invalid_value"),
        ({"nonsense": 1}, "unknown_parameter"),
        ({"input_file_id": None}, "missing_parameter"),
    ],
)
def test_a_bad_body_is_refused(client: OpenAI, change: dict[str, Any], code: str) -> None:
    body = {"input_file_id": "file_1", "endpoint": CHAT, "completion_window": "24h"} | change
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/batches", body=body, cast_to=object)
    assert refused.value.code == code


def stored(stack: Stack) -> set[Path]:
    return {path for path in (stack._folder / "files").rglob("*") if path.is_file()}


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_an_upload_that_is_cut_off_leaves_nothing(stack: Stack, client: OpenAI) -> None:
    before, names = stored(stack), {file.id for file in client.files.list()}
    address = urllib.parse.urlsplit(stack.base_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer " + stack.api_key.encode()
            + b"\r\nContent-Type: multipart/form-data; boundary=B\r\nContent-Length: 9000000\r\n\r\n"
            b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"x" * 8_900_000
        )  # fmt: skip
        wait_until(lambda: stored(stack) != before)
    wait_until(lambda: stored(stack) == before)
    time.sleep(0.5)
    assert stored(stack) == before and {file.id for file in client.files.list()} == names


@pytest.mark.parametrize("purpose", ["fine-tune", "assistants", ""])
def test_an_upload_for_another_purpose_leaves_nothing(stack: Stack, client: OpenAI, purpose: Any) -> None:
    before = stored(stack)
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("f", io.BytesIO(b"x")), purpose=purpose)
    assert refused.value.param == "purpose"
    assert stored(stack) == before


def test_an_upload_that_says_it_is_too_large_is_refused_before_it_is_read(stack: Stack) -> None:
    address = urllib.parse.urlsplit(stack.base_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer " + stack.api_key.encode()
            + b"\r\nContent-Type: multipart/form-data; boundary=B\r\nContent-Length: 300000000\r\n\r\n"
        )  # fmt: skip
        connection.settimeout(10)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_file_that_a_batch_reads_is_not_deleted(stack: Stack, client: OpenAI) -> None:
    batch = submit(client, chat_lines(stack, 50, 1000))
    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(batch.input_file_id)
    assert refused.value.code == "file_in_use"
    client.batches.cancel(batch.id)
    wait_for(client, batch)
    assert client.files.delete(batch.input_file_id).deleted


# ---- ends before its time


def check_ended_early(stack: Stack, client: OpenAI, batch: Batch, total: int, code: str) -> None:
    """What was done is kept and charged, and nothing else."""
    counts = batch.request_counts
    assert counts is not None and counts.total == total and 0 < counts.completed < total
    done, left = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert len(done) == counts.completed and len(done) + len(left) == total
    assert {line["custom_id"] for line in done + left} == {f"line-{index}" for index in range(total)}
    assert {line["error"]["code"] for line in left} == {code}
    charged = records(stack, batch, len(done))
    time.sleep(2)  # what cancelled lines' workers said, and what voids it, has arrived
    charged = records(stack, batch, len(done))
    assert len(charged) == len(done)
    assert {row["request_id"] for row in charged} == {line["response"]["request_id"] for line in done}
    check_nothing_else_is_owed(stack)


def check_nothing_else_is_owed(stack: Stack) -> None:
    """A job that was stopped would be charged for what its worker did of it; one that is voided costs nothing."""
    outcomes = query(stack, "SELECT DISTINCT outcome FROM billing.requests WHERE work_class = 'batch'")
    assert {row["outcome"] for row in outcomes} <= {"succeeded", "failed", "expired"}


def test_a_cancelled_batch_keeps_what_is_done(stack: Stack, client: OpenAI) -> None:
    batch = wait_for_lines(client, submit(client, chat_lines(stack, 300, 100)), 40)
    partial = client.get(f"/batches/{batch.id}/results", cast_to=str, options={"headers": {"Accept": "*/*"}})
    assert len(partial.splitlines()) >= 40
    batch = client.batches.cancel(batch.id)
    assert batch.status == "cancelling" and batch.cancelling_at
    batch = wait_for(client, batch)
    assert batch.status == "cancelled" and batch.cancelled_at
    check_ended_early(stack, client, batch, 300, "batch_cancelled")
    assert client.batches.cancel(batch.id).status == "cancelled"


def test_an_expired_batch_keeps_what_is_done(stack: Stack, client: OpenAI) -> None:
    batch = wait_for_lines(client, submit(client, chat_lines(stack, 300, 100)), 40)
    execute(stack.database_url, f"UPDATE batch.batches SET expires_at = now() WHERE batch_id = '{batch.id}'")
    batch = wait_for(client, batch)
    assert batch.status == "expired" and batch.expired_at
    check_ended_early(stack, client, batch, 300, "batch_expired")


def test_a_batch_that_is_over_is_not_cancelled(stack: Stack, client: OpenAI) -> None:
    batch = wait_for(client, submit(client, chat_line(stack, "a")))
    with pytest.raises(openai.ConflictError) as refused:
        client.batches.cancel(batch.id)
    assert refused.value.code == "batch_over"


def test_lines_of_a_model_that_was_deleted_fail_at_once(stack: Stack, client: OpenAI) -> None:
    model = post(
        f"{stack.base_url}/api/models", stack.api_key, {"name": "short-lived", "path": BASE_NAME}
    )  # fmt: skip
    lines = chat_lines(stack, 800, 40).replace(stack.model, model["name"])
    batch = wait_for_lines(client, submit(client, lines), 20)
    request = urllib.request.Request(f"{stack.base_url}/api/models/{model['model_id']}", method="DELETE")
    request.add_header("Authorization", f"Bearer {stack.api_key}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 204
    batch = wait_for(client, batch)
    assert batch.status == "completed" and batch.request_counts is not None
    counts = batch.request_counts
    assert counts.failed > 0 and counts.completed + counts.failed == 800
    failed = results(client, batch.error_file_id)
    assert len(failed) == counts.failed == len({line["id"] for line in failed})
    assert {line["response"]["status_code"] for line in failed} == {404}
    assert {line["response"]["body"]["error"]["code"] for line in failed} == {"model_not_found"}


# ---- restarts


@pytest.mark.parametrize("victim", ["batch", "worker"])
def test_each_line_is_done_once_when_a_process_is_killed(stack: Stack, client: OpenAI, victim: str) -> None:
    total = 400
    batch = submit(client, chat_lines(stack, total, 20))
    for share in (0.15, 0.4):
        batch = wait_for_lines(client, batch, int(total * share))
        process = stack.processes.pop(victim)
        process.kill()
        process.wait()
        if victim == "batch":
            stack.start_service("batch")
        else:
            stack.start_worker("worker", step_s=0.01, max_batch=32)
    batch = wait_for(client, batch, limit_s=90)
    assert batch.status == "completed"
    done = results(client, batch.output_file_id)
    assert [line["custom_id"] for line in done] == [f"line-{index}" for index in range(total)]
    assert {line["response"]["body"]["usage"]["completion_tokens"] for line in done} == {20}
    charged = records(stack, batch, total)
    assert Counter(row["request_id"] for row in charged).most_common(1)[0][1] == 1
    assert {row["request_id"] for row in charged} == {line["response"]["request_id"] for line in done}
    time.sleep(2)  # the same for what a dead process left
    check_nothing_else_is_owed(stack)


# ---- the command


def roundhouse(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ROUNDHOUSE_")}
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "batch", *arguments],
        cwd=ROOT,
        env=environment | {"ROUNDHOUSE_URL": stack.base_url, "ROUNDHOUSE_API_KEY": stack.api_key},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_submits_watches_and_fetches(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / 'sp"ace.jsonl').write_text(chat_lines(stack, 20))
    done = roundhouse(stack, "submit", str(tmp_path / 'sp"ace.jsonl'), "--watch", "--json")
    assert done.returncode == 0, done.stderr
    batch = json.loads(done.stdout)
    assert batch["status"] == "completed" and batch["request_counts"]["completed"] == 20
    watched = roundhouse(stack, "watch", batch["id"])
    assert watched.returncode == 0 and "completed" in watched.stdout
    fetched = roundhouse(stack, "results", batch["id"], "--out", str(tmp_path / "out.jsonl"))
    assert fetched.returncode == 0, fetched.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"line-{index}" for index in range(20)]
    assert roundhouse(stack, "results", batch["id"]).stdout == (tmp_path / "out.jsonl").read_text()
    assert batch["id"] in roundhouse(stack, "list").stdout


def test_the_command_says_what_is_wrong_in_a_line(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(chat_line(stack, "a") + "\nnonsense")
    refused = roundhouse(stack, "submit", str(tmp_path / "bad.jsonl"), "--watch")
    assert "failed" in refused.stdout and "line 2" in refused.stdout and "invalid_json_line" in refused.stdout
    for arguments in (("submit", str(tmp_path / "none")), ("results", "batch_" + "0" * 32), ("cancel", "x")):
        wrong = roundhouse(stack, *arguments)
        assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1, wrong
