"""Lines through the queue with real processes: kept once, answered, and told to nobody else; whatever is published."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import asyncpg
import jsonschema  # type: ignore[import-untyped]
import pytest
from aio_pika.exceptions import ChannelNotFoundEntity, DeliveryError
from openai import OpenAI

from infra.local.scratch import call_management, execute
from loadtest.stack import Stack, get_json, post, running_stack
from shared import queue_format
from shared.queue_format import MAX_SUBMISSION_BYTES
from tests.conftest import ROOT
from tests.queue_team import PATH, Answers, ask, chat_line, make, session, submission

SCHEMA = json.loads((ROOT / "shared" / "queue_format.v1.schema.json").read_text())
ANSWER = jsonschema.Draft202012Validator({"$defs": SCHEMA["$defs"], "$ref": "#/$defs/answer"})
OPEN_LINES = 600


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        running._environment["BATCH_QUEUE_LINES_PER_TEAM"] = str(OPEN_LINES)
        running.start_service("batch")
        running.start_service("billing")
        running.start_worker("worker", step_s=0.01, max_batch=32)
        admin = running._environment["ROUNDHOUSE_ADMIN_KEY"]
        post(f"{running.base_url}/api/teams", admin, {"slug": "other", "name": "Other"})
        yield running


_names = iter(range(1000))


@pytest.fixture
def mine(stack: Stack) -> Iterator[dict[str, Any]]:
    made = make(stack, f"n{next(_names)}")
    yield made
    assert ask(stack, "DELETE", f"{PATH}/{made['credential_id']}")[0] == 204


@pytest.fixture(scope="module")
def theirs(stack: Stack) -> dict[str, Any]:
    return make(stack, "theirs", "other")


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


async def kept(stack: Stack) -> tuple[int, ...]:
    """How much there is of everything that a submission makes."""
    connection = await asyncpg.connect(stack.database_url)
    try:
        names = ("batches", "lines", "submissions", "queue_batches", "queue_lines")
        return tuple([await connection.fetchval(f"SELECT count(*) FROM batch.{name}") for name in names])
    finally:
        await connection.close()


def has(kind: str, count: int) -> Any:
    def is_there(answers: Answers) -> bool:
        return len(answers.of(kind)) >= count

    return is_there


async def charged(stack: Stack, batch_ids: set[str], count: int) -> list[asyncpg.Record]:
    """What billing knows of the lines of these batches, once it knows of so many and nothing more comes."""
    connection = await asyncpg.connect(stack.database_url)
    try:
        deadline_s = time.monotonic() + 30
        while True:
            rows = await connection.fetch(
                "SELECT r.request_id, r.completion_tokens FROM billing.requests r JOIN batch.lines l USING (request_id)"
                " WHERE l.batch_id = ANY($1) AND r.outcome = 'succeeded'",
                list(batch_ids),
            )
            if len(rows) >= count:
                return list(rows)
            assert time.monotonic() < deadline_s, f"billing knows {len(rows)} of {count}"
            await asyncio.sleep(0.2)
    finally:
        await connection.close()


# ---- the way of a message


async def test_lines_are_accepted_run_and_told_and_are_a_batch_like_any_other(
    stack: Stack, client: OpenAI, mine: dict[str, Any]
) -> None:
    lines = [chat_line(stack, "zero"), chat_line(stack, "bad", temperature=9), chat_line(stack, "zw\u00f6lf")]
    async with session(mine) as team:
        await team.publish(submission("first", lines), correlation_id="mine")
        await team.publish(submission("second", [chat_line(stack, "zero")]))
        answers = await team.read(has("result", 4))
    for each in answers.by_id.values():
        ANSWER.validate(each)
    assert next(iter(answers.by_id.values()))["type"] == "accepted", "it comes before the results"
    accepted = {each["id"]: each for each in answers.of("accepted")}
    assert {name: (each["first_line"], each["lines"]) for name, each in accepted.items()} == {
        "first": (1, 3),
        "second": (4, 1),
    }
    (batch_id,) = {each["batch_id"] for each in answers.by_id.values()}
    told = {(each["id"], each["result"]["custom_id"]): each for each in answers.of("result")}
    assert {key: each["line"] for key, each in told.items()} == {
        ("first", "zero"): 1, ("first", "bad"): 2, ("first", "zw\u00f6lf"): 3, ("second", "zero"): 4,
    }  # fmt: skip
    assert told["first", "bad"]["result"]["response"]["status_code"] == 400
    answer = told["first", "zw\u00f6lf"]["result"]["response"]["body"]
    assert answer["choices"][0]["message"]["content"] == "t0 t1 t2 t3 " and answer["model"] == stack.model
    batch = client.batches.retrieve(batch_id)
    deadline_s = time.monotonic() + 30
    while batch.status not in ("completed", "failed"):
        assert time.monotonic() < deadline_s, batch
        await asyncio.sleep(0.3)
        batch = client.batches.retrieve(batch_id)
    counts = batch.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (4, 3, 1)
    shown: Any = batch  # the client's types do not know a batch without a file
    assert shown.status == "completed" and shown.input_file_id is None and shown.output_file_id is not None
    output = [json.loads(line) for line in client.files.content(shown.output_file_id).text.splitlines()]
    assert output == [
        told[key]["result"] for key in sorted(told, key=lambda key: told[key]["line"]) if key[1] != "bad"
    ]
    rows = await charged(stack, {batch_id}, 3)
    assert len(rows) == 3 and {row["completion_tokens"] for row in rows} == {4}
    async with session(mine) as team:  # what is over takes no more lines
        await team.publish(submission("third", [chat_line(stack, "later")]))
        answers = await team.read(has("result", 1))
    assert answers.of("accepted")[0]["batch_id"] != batch_id


async def test_the_same_id_is_the_same_submission(stack: Stack, mine: dict[str, Any]) -> None:
    body = submission("once", [chat_line(stack, f"line-{number}") for number in range(20)])
    async with session(mine) as team:
        for _ in range(5):
            await team.publish(body)
        answers = await team.read(has("result", 20))
        for _ in range(5):
            await team.publish(body)
        await team.publish(submission("once", [chat_line(stack, "another")]))
        again = await team.read(lambda answers: bool(answers.of("refused") and answers.of("accepted")))
        await asyncio.sleep(1)
    assert [each["code"] for each in again.of("refused")] == ["id_reused"]
    assert set(again.by_id) & set(answers.by_id), "its acceptance is told again"
    assert (
        len(answers.of("accepted") + [e for e in again.of("accepted") if e not in answers.of("accepted")])
        == 1
    )
    assert again.of("result") == []
    (batch_id,) = {each["batch_id"] for each in answers.of("accepted")}
    assert len(await charged(stack, {batch_id}, 20)) == 20
    connection = await asyncpg.connect(stack.database_url)
    assert await connection.fetchval("SELECT total FROM batch.batches WHERE batch_id = $1", batch_id) == 20
    await connection.close()


async def test_each_endpoint_and_window_has_a_batch_of_its_own(stack: Stack, mine: dict[str, Any]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings",
            "body": {"model": stack.model, "input": "text"}}  # fmt: skip
    async with session(mine) as team:
        await team.publish(submission("chat", [chat_line(stack, "a")]))
        await team.publish(submission("short", [chat_line(stack, "a")], completion_window="30m"))
        await team.publish(submission("embedded", [line]))
        answers = await team.read(has("result", 3))
    assert len({each["batch_id"] for each in answers.of("accepted")}) == 3
    assert {each["result"]["response"]["status_code"] for each in answers.of("result")} == {200}


# ---- what is refused


def _large(stack: Stack) -> bytes:
    return submission("large", [chat_line(stack, "a", user="x" * MAX_SUBMISSION_BYTES)])


def _with(change: dict[str, Any]) -> Any:
    def make_it(stack: Stack) -> bytes:
        body = {"version": 1, "id": "m", "lines": [chat_line(stack, "a")]} | change
        return json.dumps({name: value for name, value in body.items() if value is not None}).encode()

    return make_it


def _lines(change: dict[str, Any], *, good: int = 2) -> Any:
    def make_it(stack: Stack) -> bytes:
        lines = [chat_line(stack, f"g{number}") for number in range(good)]
        return submission("m", [*lines, chat_line(stack, "bad") | change])

    return make_it


def _raw(body: bytes) -> Any:
    return lambda stack: body


REFUSED = {
    "not json": (_raw(b"hello"), "invalid_json", []),
    "empty": (_raw(b""), "invalid_json", []),
    "a list": (_raw(b"[]"), "invalid_json", []),
    "not utf-8": (_raw(b'{"version": 1, "id": "\xff"}'), "invalid_json", []),
    "deep": (_raw(b'{"version": 1, "x": ' + b"[" * 100_000), "invalid_json", []),
    "no version": (_with({"version": None}), "unsupported_version", []),
    "another version": (_with({"version": 2}), "unsupported_version", []),
    "a version as text": (_with({"version": "1"}), "unsupported_version", []),
    "true as version": (_with({"version": True}), "unsupported_version", []),
    "no id": (_with({"id": None}), "invalid_message", []),
    "an id with a space": (_with({"id": "a b"}), "invalid_message", []),
    "an id with null": (_with({"id": "a\x00"}), "invalid_message", []),
    "an unknown field": (_with({"model": "x"}), "invalid_message", []),
    "a bad window": (_with({"completion_window": "169h"}), "invalid_message", []),
    "no lines": (_with({"lines": []}), "invalid_message", []),
    "lines that are none": (_with({"lines": "a"}), "invalid_message", []),
    "too many lines": (_with({"lines": [{}] * 201}), "too_many_lines", []),
    "too large": (_large, "message_too_large", []),
    "a line that is none": (_with({"lines": [1]}), "invalid_lines", [("invalid_json_line", 1)]),
    "an id twice": (_lines({"custom_id": "g1"}), "invalid_lines", [("duplicate_custom_id", 3)]),
    "null in an id": (_lines({"custom_id": "\x00"}), "invalid_lines", [("invalid_custom_id", 3)]),
    "two endpoints": (_lines({"url": "/v1/embeddings"}), "invalid_lines", [("url_mismatch", 3)]),
    "no endpoint": (_lines({"url": "/v1/models"}, good=0), "invalid_lines", [("url_mismatch", 1)]),
    "two models": (_lines({"body": {"model": "x"}}), "invalid_lines", [("model_mismatch", 3)]),
    "another method": (_lines({"method": "GET"}), "invalid_lines", [("invalid_method", 3)]),
    "no such model": (_lines({"body": {"model": "x"}}, good=0), "model_not_found", []),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_bad_message_is_refused_with_a_code_and_nothing_of_it_is_kept(
    stack: Stack, mine: dict[str, Any], name: str
) -> None:
    write, code, errors = REFUSED[name]
    before = await kept(stack)
    async with session(mine) as team:
        await team.publish(write(stack), correlation_id="asked")
        answers = await team.read(has("refused", 1))
    (refused,) = answers.by_id.values()
    ANSWER.validate(refused)
    assert refused["code"] == code, refused
    assert [(each["code"], each["line"]) for each in refused["errors"]] == errors
    assert await kept(stack) == before


@pytest.mark.parametrize(
    ("reply_to", "code"),
    [
        (None, "missing_reply_to"),
        ("", "missing_reply_to"),
        ("THEIRS", "foreign_reply_to"),
        ("REFUSALS", "foreign_reply_to"),
        ("nowhere", "foreign_reply_to"),
        ("dead.v1", "foreign_reply_to"),
    ],
)
async def test_a_message_without_a_reply_queue_of_the_team_s_is_refused_where_the_team_alone_finds_it(
    stack: Stack, mine: dict[str, Any], theirs: dict[str, Any], reply_to: str | None, code: str
) -> None:
    names = {"THEIRS": theirs["reply_queue"], "REFUSALS": mine["refusals_queue"]}
    before = await kept(stack)
    async with session(mine) as team:
        body = submission(f"lost-{code}-{reply_to}", [chat_line(stack, "a")])
        await team.publish(body, reply_to=names.get(reply_to or "", reply_to))
        answers = await team.read(has("refused", 1), queue=mine["refusals_queue"])
    (refused,) = answers.by_id.values()
    assert (refused["code"], refused["id"]) == (code, f"lost-{code}-{reply_to}")
    assert await kept(stack) == before
    async with session(theirs) as others:
        for queue in (theirs["reply_queue"], theirs["refusals_queue"]):
            nothing = await others.read(lambda _: True, queue=queue)
            source = await others._channel.get_queue(queue, ensure=False)
            assert nothing.by_id == {} and await source.get(fail=False) is None


async def test_a_credential_may_be_answered_on_another_one_s_queue_of_the_same_team(
    stack: Stack, mine: dict[str, Any]
) -> None:
    second = make(stack, "second")
    async with session(mine) as team, session(second) as reader:
        await team.publish(submission("across", [chat_line(stack, "a")]), reply_to=second["reply_queue"])
        answers = await reader.read(has("result", 1))
    assert answers.of("result")[0]["id"] == "across"
    ask(stack, "DELETE", f"{PATH}/{second['credential_id']}")


async def test_another_team_s_models_are_like_such_that_do_not_exist(
    stack: Stack, theirs: dict[str, Any]
) -> None:
    async with session(theirs) as team:
        await team.publish(submission("a", [chat_line(stack, "a")]))
        await team.publish(submission("b", [chat_line(stack, "a") | {"body": {"model": "load/none"}}]))
        answers = await team.read(has("refused", 2))
    first, second = answers.of("refused")
    assert first["code"] == "model_not_found" and first | {"id": ""} == second | {"id": ""}


async def test_over_the_quota_a_message_is_refused_and_what_was_kept_runs(
    stack: Stack, mine: dict[str, Any]
) -> None:
    stack.stop("worker")
    try:
        async with session(mine) as team:
            for number in range(4):
                lines = [chat_line(stack, f"line-{each}", 1) for each in range(200)]
                await team.publish(submission(f"part-{number}", lines))
            answers = await team.read(has("refused", 1))
            assert [(each["id"], each["code"]) for each in answers.of("refused")] == [
                ("part-3", "over_quota")
            ]
    finally:
        stack.start_worker("worker", step_s=0.01, max_batch=32)
    async with session(mine) as team:
        answers = await team.read(has("result", 600))
        assert Counter(each["id"] for each in answers.of("result")) == dict.fromkeys(
            ("part-0", "part-1", "part-2"), 200
        )
        await team.publish(submission("part-3", [chat_line(stack, "now")]))  # the id is still free
        assert (await team.read(has("result", 1))).of("accepted")[0]["id"] == "part-3"


# ---- whatever dies


async def test_a_full_queue_says_no_to_the_publisher_and_keeps_what_it_has(
    stack: Stack, mine: dict[str, Any]
) -> None:
    process = stack.processes.pop("batch")
    process.kill()
    process.wait()
    taken = 0
    async with session(mine) as team:
        await team.publish(submission("before", [chat_line(stack, "a")]))
        with pytest.raises(DeliveryError):
            for number in range(60):
                lines = [chat_line(stack, name, user="x" * 900_000) for name in "ab"]
                await team.publish(submission(f"full-{number}", lines))
                taken += 1
        assert 20 < taken < 60
        stack.start_service("batch")
        answers = await team.read(has("result", 2 * taken + 1), limit_s=90)
    assert len(answers.of("accepted")) == taken + 1 and answers.of("refused") == []


async def restart_broker(stack: Stack) -> None:
    """kill -9 of the broker's node; its supervisor starts it again."""
    url = f"{stack.management_url.rstrip('/')}/api/nodes"
    pid = int(get_json(url)[0]["os_pid"])
    os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 90
    while True:
        try:
            if int(get_json(url)[0]["os_pid"]) != pid:
                return
        except (OSError, KeyError, IndexError, ValueError):
            pass
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.5)


@pytest.mark.timeout(480)
async def test_each_line_is_done_and_told_once_whatever_is_killed(stack: Stack, mine: dict[str, Any]) -> None:
    """Published in small messages, some of them twice, while the batch service and the broker are killed."""
    total, size = 500, 10
    waiting = list(range(total // size))

    async def publish_some() -> None:
        """What is not confirmed is published again, as a client has to."""
        while waiting:
            number = waiting[0]
            lines = [chat_line(stack, f"line-{number * size + each}", 20) for each in range(size)]
            try:
                async with session(mine) as team:
                    for _ in range(1 + number % 2):
                        await team.publish(submission(f"killed-{number}", lines))
                waiting.pop(0)
            except Exception as error:  # noqa: BLE001 - whatever a broken connection raises
                print("published again after", type(error).__name__)
                await asyncio.sleep(0.5)
            await asyncio.sleep(0.05)

    async def kill_some() -> None:
        for victim in ("batch", "broker", "batch"):
            await asyncio.sleep(4)
            if victim == "broker":
                await restart_broker(stack)
                continue
            process = stack.processes.pop("batch")
            process.kill()
            process.wait()
            await asyncio.to_thread(stack.start_service, "batch")

    async with asyncio.timeout(240), asyncio.TaskGroup() as group:
        for work in (publish_some, kill_some):
            group.create_task(work())
    # A line that was lost on its way to a worker, with the broker, is published again after a minute and a half.
    async with session(mine) as team:
        answers = await team.read(has("result", total), limit_s=200)
    assert answers.of("refused") == []
    results = answers.of("result")
    assert len(results) == total
    assert Counter(each["id"] for each in results) == {
        f"killed-{number}": size for number in range(total // size)
    }
    assert {each["result"]["custom_id"] for each in results} == {f"line-{number}" for number in range(total)}
    assert {each["result"]["response"]["status_code"] for each in results} == {200}
    assert {each["result"]["response"]["body"]["usage"]["completion_tokens"] for each in results} == {20}
    rows = await charged(stack, {each["batch_id"] for each in results}, total)
    assert Counter(row["request_id"] for row in rows).most_common(1)[0][1] == 1
    assert {row["request_id"] for row in rows} == {
        each["result"]["response"]["request_id"] for each in results
    }


async def test_results_wait_for_a_reply_queue_that_is_gone(stack: Stack, mine: dict[str, Any]) -> None:
    """A reply queue deleted by hand, and with it what was told: the results that come after wait until it is there again."""
    call_management(stack.management_url, "DELETE", f"queues/{mine['vhost']}/{mine['reply_queue']}")
    async with session(mine) as team:
        await team.publish(submission("patient", [chat_line(stack, "a")]))
    deadline_s = time.monotonic() + 30
    while True:
        try:
            async with session(mine) as team:
                answers = await team.read(has("result", 1), limit_s=10)
            break
        except ChannelNotFoundEntity:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.5)
    assert [each["type"] for each in answers.by_id.values()] == ["accepted", "result"]


async def test_a_revoked_credential_s_lines_end_and_are_found_over_http(stack: Stack, client: OpenAI) -> None:
    gone = make(stack, "gone")
    async with session(gone) as team:
        await team.publish(submission("last", [chat_line(stack, "a", 50)]))
        (accepted,) = (await team.read(has("accepted", 1))).of("accepted")
    assert ask(stack, "DELETE", f"{PATH}/{gone['credential_id']}")[0] == 204
    deadline_s = time.monotonic() + 30
    while client.batches.retrieve(accepted["batch_id"]).status != "completed":
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.3)
    text = client.get(
        f"/batches/{accepted['batch_id']}/results", cast_to=str, options={"headers": {"Accept": "*/*"}}
    )
    assert json.loads(text)["response"]["status_code"] == 200


def move_resource(stack: Stack, wanted: str, *states: str) -> None:
    for state in states:
        change = f"wanted = '{wanted}', state = '{state}'"
        execute(
            stack.database_url,
            f"UPDATE scheduler.resources SET {change} WHERE resource_id = '{stack.resource_id}'",
        )


async def test_a_batch_whose_lines_have_ended_ends_after_a_restart_though_nothing_runs(
    stack: Stack, mine: dict[str, Any], client: OpenAI
) -> None:
    async with session(mine) as team:
        await team.publish(submission("ends-alone", [chat_line(stack, "a")]))
        (accepted,) = (await team.read(has("result", 1))).of("accepted")
    process = stack.processes.pop("batch")
    process.kill()
    process.wait()
    await asyncio.to_thread(move_resource, stack, "off", "draining", "off")
    try:
        await asyncio.to_thread(stack.start_service, "batch")
        deadline_s = time.monotonic() + 60
        while client.batches.retrieve(accepted["batch_id"]).status != "completed":
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.3)
    finally:
        await asyncio.to_thread(move_resource, stack, "on", "starting", "live")


def test_the_format_s_limits_are_the_schema_s() -> None:
    assert SCHEMA["properties"]["lines"]["maxItems"] == queue_format.MAX_LINES
    assert SCHEMA["properties"]["completion_window"]["default"] == queue_format.DEFAULT_WINDOW
