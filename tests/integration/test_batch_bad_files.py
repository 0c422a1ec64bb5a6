"""Files at their limits and beyond, from an HTTP client to the batch's end: gateway, batch service and real servers."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Batch

from loadtest.stack import Stack, running_stack

CHAT: Any = "/v1/chat/completions"
MAX_LINES = 50_000
MAX_LINE_BYTES = 1024 * 1024
OVER = ("completed", "failed", "expired", "cancelled")
BOUNDARY = b"cutcutcut"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """No worker: what is bad is found before a line runs."""
    with running_stack() as running:
        running.start_service("batch")
        yield running


@pytest.fixture
def client(stack: Stack) -> OpenAI:
    return OpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.api_key, max_retries=0)


def chat_line(stack: Stack, custom_id: str, text: str = "Hello?") -> bytes:
    body = {"model": stack.model, "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}).encode()


def many_lines(stack: Stack, count: int) -> list[bytes]:
    return [chat_line(stack, f"line-{number}") for number in range(count)]


def line_of(stack: Stack, size_bytes: int) -> bytes:
    """A good line of exactly this size. Words, as the tokenizer takes one word without end for an attack."""
    words = "word " * (size_bytes // 5)
    line = chat_line(stack, "large", words[: size_bytes - len(chat_line(stack, "large", ""))])
    assert len(line) == size_bytes
    return line


def submit(client: OpenAI, content: bytes) -> Batch:
    file = client.files.create(file=("lines.jsonl", io.BytesIO(content)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def wait_for(stack: Stack, client: OpenAI, batch: Batch, states: tuple[str, ...] = OVER) -> Batch:
    deadline_s = time.monotonic() + 100
    while batch.status not in states:
        assert time.monotonic() < deadline_s, (
            batch.status,
            (stack._folder / "batch.log").read_text()[-3000:],
        )
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def problems(batch: Batch) -> list[tuple[str | None, int | None]]:
    assert batch.status == "failed" and batch.errors is not None and batch.errors.data is not None
    assert batch.request_counts is not None and batch.request_counts.total == 0
    return [(error.code, error.line) for error in batch.errors.data]


@pytest.mark.timeout(240)
def test_one_line_more_than_a_batch_has_is_refused_and_the_most_is_taken(
    stack: Stack, client: OpenAI
) -> None:
    lines = many_lines(stack, MAX_LINES + 1)
    assert problems(wait_for(stack, client, submit(client, b"\n".join(lines)))) == [("too_many_tasks", None)]
    batch = wait_for(stack, client, submit(client, b"\n".join(lines[:-1])), ("in_progress", *OVER))
    assert batch.status == "in_progress"
    assert batch.request_counts is not None and batch.request_counts.total == MAX_LINES
    client.batches.cancel(batch.id)
    assert wait_for(stack, client, batch).status == "cancelled"


def test_one_bad_line_of_ten_thousand_is_found_and_nothing_runs(stack: Stack, client: OpenAI) -> None:
    lines = many_lines(stack, 10_000)
    lines[7_653] = lines[7_653][:-1]
    assert problems(wait_for(stack, client, submit(client, b"\n".join(lines)))) == [
        ("invalid_json_line", 7_654)
    ]
    lines[7_653] = lines[0]
    assert problems(wait_for(stack, client, submit(client, b"\n".join(lines)))) == [
        ("duplicate_custom_id", 7_654)
    ]


def test_a_line_of_a_mebibyte_is_taken_and_a_byte_more_is_refused(stack: Stack, client: OpenAI) -> None:
    large = line_of(stack, MAX_LINE_BYTES + 1)
    content = b"\n".join([chat_line(stack, "small"), large, chat_line(stack, "also small")])
    assert problems(wait_for(stack, client, submit(client, content))) == [("line_too_large", 2)]
    batch = wait_for(stack, client, submit(client, line_of(stack, MAX_LINE_BYTES)))
    # It is a good line of a bad request: its prompt does not fit into the model's context, and it fails alone.
    assert batch.status == "completed" and batch.error_file_id is not None
    (failed,) = client.files.content(batch.error_file_id).text.splitlines()
    assert json.loads(failed)["response"]["status_code"] == 400


def stored(stack: Stack) -> set[Path]:
    return {path for path in (stack._folder / "files").rglob("*") if path.is_file()}


@pytest.mark.parametrize("ending", ["closed", "reset", "closed in the last boundary"])
def test_an_upload_cut_off_half_way_leaves_nothing_and_works_the_second_time(
    stack: Stack, client: OpenAI, ending: str
) -> None:
    before, names = stored(stack), {file.id for file in client.files.list()}
    content = b"\n".join(many_lines(stack, 10_000))
    form = b"".join(
        b"--"
        + BOUNDARY
        + b'\r\nContent-Disposition: form-data; name="'
        + name
        + b"\r\n\r\n"
        + value
        + b"\r\n"
        for name, value in ((b'purpose"', b"batch"), (b'file"; filename="lines.jsonl"', content))
    )
    form += b"--" + BOUNDARY + b"--\r\n"
    sent = len(form) - len(BOUNDARY) if "boundary" in ending else len(form) // 2
    address = urllib.parse.urlsplit(stack.base_url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer " + stack.api_key.encode()
            + b"\r\nContent-Type: multipart/form-data; boundary=" + BOUNDARY
            + b"\r\nContent-Length: " + str(len(form)).encode() + b"\r\n\r\n" + form[:sent]
        )  # fmt: skip
        time.sleep(0.5)  # half of it is on the disk
        if ending == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    deadline_s = time.monotonic() + 10
    while stored(stack) != before:
        assert time.monotonic() < deadline_s, "a part of the file stayed"
        time.sleep(0.1)
    assert {file.id for file in client.files.list()} == names
    batch = wait_for(stack, client, submit(client, content), ("in_progress", *OVER))
    assert batch.request_counts is not None and batch.request_counts.total == 10_000
    client.batches.cancel(batch.id)
    wait_for(stack, client, batch)
