"""`roundhouse batch` and the queue, as a newcomer would: make a user, submit a file, watch it, take the results."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from loadtest.stack import Stack, running_stack
from tests.conftest import ROOT
from tests.integration.test_batch_service import chat_line, query

User = Mapping[str, str]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        running._environment["BATCH_QUEUE_LINES_PER_TEAM"] = "500"
        running.start_service("batch")
        running.start_worker("worker", step_s=0.01, max_batch=32)
        yield running


def roundhouse(stack: Stack, *arguments: str, user: User | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("ROUNDHOUSE_", "QUEUE_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "batch", *arguments],
        cwd=ROOT,
        env=environment | {"ROUNDHOUSE_URL": stack.base_url, "ROUNDHOUSE_API_KEY": stack.api_key} | dict(user or {}),
        capture_output=True,
        text=True,
        timeout=90,
    )  # fmt: skip


def make_user(stack: Stack, name: str) -> dict[str, str]:
    """What `queue-user` prints, as a shell reads it."""
    made = roundhouse(stack, "queue-user", name)
    assert made.returncode == 0, made.stderr
    pairs = [shlex.split(line)[1].partition("=") for line in made.stdout.splitlines()]
    return {variable: value for variable, _, value in pairs}


@pytest.fixture(scope="module")
def user(stack: Stack) -> dict[str, str]:
    found = make_user(stack, "shell")
    assert sorted(found) == ["QUEUE_EXCHANGE", "QUEUE_REPLY", "QUEUE_URL"]
    return found


def write(path: Path, stack: Stack, count: int) -> str:
    lines = [chat_line(stack, f"line-{index}", 4) for index in range(count)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    return str(path)


def test_a_file_goes_through_the_queue_and_its_results_come_back(
    stack: Stack, user: User, tmp_path: Path
) -> None:
    """450 lines are three messages; of 500 that may be open."""
    file, out = write(tmp_path / "lines.jsonl", stack, 450), tmp_path / "out.jsonl"
    done = roundhouse(stack, "submit", file, "--queue", "--watch", "--out", str(out), "--json", user=user)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["lines"], made["completed"], made["failed"]) == (450, 450, 0)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(each["custom_id"] for each in results) == sorted(f"line-{n}" for n in range(450))
    assert {each["response"]["status_code"] for each in results} == {200}
    (batch_id,) = made["batches"]
    assert "completed" in roundhouse(stack, "watch", batch_id).stdout
    fetched = roundhouse(stack, "results", batch_id)
    assert [json.loads(line)["custom_id"] for line in fetched.stdout.splitlines()] == [
        f"line-{n}" for n in range(450)
    ]


def test_what_is_over_the_quota_is_published_again_until_it_fits(
    stack: Stack, user: User, tmp_path: Path
) -> None:
    file = write(tmp_path / "lines.jsonl", stack, 1100)
    done = roundhouse(stack, "submit", file, "--queue", "--watch", user=user)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1100


def test_a_file_that_is_submitted_and_left_is_taken_later_and_the_same_id_runs_once(
    stack: Stack, user: User, tmp_path: Path
) -> None:
    file = write(tmp_path / "lines.jsonl", stack, 30)
    for _ in range(2):
        done = roundhouse(stack, "submit", file, "--queue", "--id", "left", "--json", user=user)
        assert done.returncode == 0, done.stderr
    (batch_id,) = json.loads(done.stdout)["batches"]
    assert roundhouse(stack, "watch", batch_id).returncode == 0
    out = tmp_path / "out.jsonl"
    assert roundhouse(stack, "results", "--queue", "--out", str(out), user=user).returncode == 0
    assert sorted(json.loads(line)["custom_id"] for line in out.read_text().splitlines()) == sorted(
        f"line-{n}" for n in range(30)
    )
    assert roundhouse(stack, "results", "--queue", user=user).stdout == "", "they were taken"
    ran = query(stack, "SELECT count(*) FROM batch.queue_lines WHERE submission_id LIKE 'left%'")[0][0]
    assert ran == 30, "its batch may have other submissions' lines, too"


def test_what_lies_there_for_somebody_else_stays(stack: Stack, user: User, tmp_path: Path) -> None:
    left = write(tmp_path / "left.jsonl", stack, 5)
    made = roundhouse(stack, "submit", left, "--queue", "--json", user=user)
    assert roundhouse(stack, "watch", json.loads(made.stdout)["batches"][0]).returncode == 0
    other = write(tmp_path / "other.jsonl", stack, 7)
    watched = roundhouse(stack, "submit", other, "--queue", "--watch", user=user)
    assert len(watched.stdout.splitlines()) == 7, watched.stderr
    assert len(roundhouse(stack, "results", "--queue", user=user).stdout.splitlines()) == 5


def test_what_is_wrong_is_said_in_a_line(stack: Stack, user: User, tmp_path: Path) -> None:
    good = chat_line(stack, "a")
    texts = {
        "nonsense": good + "\nnonsense",
        "twice": good + "\n" + good,
        "model": chat_line(stack, "a", model="nobody/nothing"),
        "empty": "\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    broken = {**user, "QUEUE_URL": user["QUEUE_URL"].replace("qcr_", "qcr_x")}
    for said, arguments, as_user in (
        ("line 2 of", ("submit", str(tmp_path / "nonsense"), "--queue"), user),
        ("duplicate_custom_id", ("submit", str(tmp_path / "twice"), "--queue"), user),
        ("model_not_found", ("submit", str(tmp_path / "model"), "--queue"), user),
        ("has no lines", ("submit", str(tmp_path / "empty"), "--queue"), user),
        ("cannot be read", ("submit", str(tmp_path / "none"), "--queue"), user),
        ("queue-user", ("submit", str(tmp_path / "model"), "--queue"), {}),
        ("the queue:", ("submit", str(tmp_path / "model"), "--queue"), broken),
        ("--own", ("submit", str(tmp_path / "model"), "--queue", "--own"), user),
        ("--queue", ("submit", str(tmp_path / "model"), "--id", "x"), user),
        ("--queue", ("results",), user),
    ):
        wrong = roundhouse(stack, *arguments, user=as_user)
        last = wrong.stderr.strip().splitlines()[-1]
        assert wrong.returncode == 1 and said in last and "Traceback" not in wrong.stderr, wrong


def test_users_are_listed_turned_and_revoked(stack: Stack, tmp_path: Path) -> None:
    first = make_user(stack, "second")
    turned = roundhouse(stack, "queue-rotate", "second").stdout
    assert "export QUEUE_URL=" in turned and first["QUEUE_URL"] not in turned
    assert "second" in roundhouse(stack, "queue-users").stdout
    assert roundhouse(stack, "queue-revoke", "second").returncode == 0
    assert "second" not in roundhouse(stack, "queue-users").stdout
    assert "second" in roundhouse(stack, "queue-revoke", "second").stderr
