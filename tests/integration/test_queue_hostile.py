"""What a team's user can send or break that no decent client would: it costs that team its message, and nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import asyncpg
import pika  # type: ignore[import-untyped]
import pytest

from infra.local.scratch import call_management
from loadtest.stack import Stack, post, running_stack
from services.batch.submission.replies import GROUP
from tests.queue_team import PATH, Answers, ask, chat_line, make, session, submission, url_of


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        running.start_service("batch")
        running.start_worker("worker", step_s=0.01, max_batch=32)
        admin = running._environment["ROUNDHOUSE_ADMIN_KEY"]
        post(f"{running.base_url}/api/teams", admin, {"slug": "other", "name": "Other"})
        yield running


@pytest.fixture(scope="module")
def mine(stack: Stack) -> dict[str, Any]:
    return make(stack, "mine")


@pytest.fixture(scope="module")
def theirs(stack: Stack) -> dict[str, Any]:
    return make(stack, "theirs", "other")


def has(kind: str, count: int = 1) -> Any:
    def is_there(answers: Answers) -> bool:
        return len(answers.of(kind)) >= count

    return is_there


class Raw(pika.BasicProperties):  # type: ignore[misc]
    """Properties as they are put on the wire, whatever they are."""

    def __init__(self, flags: int, data: bytes) -> None:
        super().__init__()
        self._flags_and_data = flags.to_bytes(2, "big") + data

    def encode(self) -> list[bytes]:
        return [self._flags_and_data]


HEADERS, CORRELATION, REPLY_TO, TIMESTAMP = 1 << 13, 1 << 10, 1 << 9, 1 << 6


def short(value: bytes) -> bytes:
    return bytes([len(value)]) + value


def table(entries: bytes) -> bytes:
    return len(entries).to_bytes(4, "big") + entries


def nested(depth: int) -> bytes:
    entries = b""
    for _ in range(depth):
        entries = short(b"") + b"F" + table(entries)
    return table(entries)


def hostile(reply_to: bytes) -> dict[str, tuple[int, bytes, bytes]]:
    """Flags and data of properties, and a routing key; each names the reply queue if it can."""
    named = short(reply_to)
    many = b"".join(short(b"k") + b"V" for _ in range(40_000))
    return {
        "a date after all calendars": (REPLY_TO | TIMESTAMP, named + b"\xff" * 8, b""),
        "a correlation id that is no text": (CORRELATION | REPLY_TO, short(b"\xff" * 255) + named, b""),
        "a routing key that is no text": (REPLY_TO, named, b"\xff\xfe" * 100),
        "a header's name that is no text": (HEADERS | REPLY_TO, table(short(b"\xff") + b"V") + named, b""),
        "a header's date after all calendars": (HEADERS | REPLY_TO, table(short(b"a") + b"T" + b"\xff" * 8) + named, b""),
        "headers in headers": (HEADERS | REPLY_TO, nested(3000) + named, b""),
        "headers in headers in headers": (HEADERS | REPLY_TO, nested(15_000) + named, b""),
        "forty thousand headers": (HEADERS | REPLY_TO, table(many) + named, b""),
    }  # fmt: skip


def publish(
    credential: dict[str, Any], body: bytes, properties: pika.BasicProperties, key: bytes = b""
) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(url_of(credential)))
    with contextlib.closing(connection):
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish(credential["exchange"], key, body, properties)


@pytest.mark.parametrize("name", hostile(b""))
async def test_properties_that_cannot_be_read_harm_nobody(
    stack: Stack, mine: dict[str, Any], theirs: dict[str, Any], name: str
) -> None:
    flags, data, key = hostile(mine["reply_queue"].encode())[name]
    body = submission(f"hostile/{name.replace(' ', '-')}", [chat_line(stack, "a")])
    await asyncio.to_thread(publish, mine, body, Raw(flags, data), key)
    async with session(theirs) as others:
        await others.publish(b"hello")
        assert (await others.read(has("refused"))).copies == 0
    async with session(mine) as team:
        answers = await team.read(has("result"))
    assert answers.of("result")[0]["id"].endswith(name.replace(" ", "-"))


async def test_a_reply_queue_that_is_no_text_is_none(stack: Stack, mine: dict[str, Any]) -> None:
    await asyncio.to_thread(publish, mine, b"{}", Raw(REPLY_TO, short(b"\xff\xfe")))
    async with session(mine) as team:
        answers = await team.read(has("refused"), queue=mine["refusals_queue"])
    assert answers.of("refused")[0]["code"] in ("missing_reply_to", "foreign_reply_to")


@pytest.mark.parametrize("model", ["m\x00", "x" * 500_000, "a/b/c/d", "%", "load/\x00"])
async def test_a_model_s_name_is_whatever_it_is(stack: Stack, mine: dict[str, Any], model: str) -> None:
    async with session(mine) as team:
        line = chat_line(stack, "a")
        line["body"]["model"] = model
        await team.publish(submission("model", [line]))
        answers = await team.read(has("refused"))
    assert answers.of("refused")[0]["code"] == "model_not_found"


async def test_what_expires_in_the_queue_is_found_by_the_team_alone(
    stack: Stack, mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """It is dead-lettered as it was published; routing keys in its headers do not lead it elsewhere then, either."""
    stack.stop("batch")
    try:
        carbon = {"CC": [theirs["reply_queue"]], "BCC": [theirs["reply_queue"]]}
        async with session(mine) as team:
            await team.publish(b"late", expiration=0.2, headers=carbon)
            queue = await team._channel.get_queue(mine["refusals_queue"], ensure=False)
            deadline_s = time.monotonic() + 20
            while (raw := await queue.get(fail=False)) is None:
                assert time.monotonic() < deadline_s
                await asyncio.sleep(0.1)
            assert raw.body == b"late"
            await raw.ack()
        await asyncio.sleep(1)
        async with session(theirs) as others:
            for name in (theirs["reply_queue"], theirs["refusals_queue"]):
                queue = await others._channel.get_queue(name, ensure=False)
                assert await queue.get(fail=False) is None
    finally:
        stack.start_service("batch")


async def test_the_direct_way_of_the_broker_is_no_reply_queue(stack: Stack, mine: dict[str, Any]) -> None:
    async with session(mine) as team:
        direct = await team._channel.get_queue("amq.rabbitmq.reply-to", ensure=False)
        heard: asyncio.Queue[Any] = asyncio.Queue()
        await direct.consume(heard.put, no_ack=True)
        await team.publish(submission("direct", [chat_line(stack, "a")]), reply_to="amq.rabbitmq.reply-to")
        answers = await team.read(has("refused"), queue=mine["refusals_queue"])
        assert answers.of("refused")[0]["code"] == "foreign_reply_to" and heard.empty()


async def test_a_suspended_team_is_refused(stack: Stack, theirs: dict[str, Any]) -> None:
    connection = await asyncpg.connect(stack.database_url)
    set_it = "UPDATE gateway.teams SET suspended = $1 WHERE slug = 'other'"
    try:
        await connection.execute(set_it, True)
        async with session(theirs) as team:
            line = chat_line(stack, "a")
            await team.publish(submission("suspended", [line]))
            answers = await team.read(has("refused"))
        assert answers.of("refused")[0]["code"] == "team_suspended"
    finally:
        await connection.execute(set_it, False)
        await connection.close()


async def test_what_was_accepted_for_a_revoked_credential_is_told_to_another_one_that_asks(
    stack: Stack,
) -> None:
    first, second = make(stack, "first"), make(stack, "second")
    body = submission("inherited", [chat_line(stack, "a", 800)])  # eight seconds
    async with session(first) as team:
        await team.publish(body)
        await team.read(has("accepted"))
    assert ask(stack, "DELETE", f"{PATH}/{first['credential_id']}")[0] == 204
    async with session(second) as team:
        await team.publish(body)
        answers = await team.read(has("result"))
    assert [each["type"] for each in answers.by_id.values()] == ["accepted", "result"]
    assert ask(stack, "DELETE", f"{PATH}/{second['credential_id']}")[0] == 204


async def until_done(stack: Stack, submissions: str, count: int) -> None:
    """So many lines of submissions whose ids begin so have ended: what is said of them is due, or told."""
    connection = await asyncpg.connect(stack.database_url)
    try:
        async with asyncio.timeout(60):
            while count != await connection.fetchval(
                "SELECT count(*) FROM batch.queue_lines WHERE starts_with(submission_id, $1) AND reply <> 'none'",
                submissions,
            ):
                await asyncio.sleep(0.1)
    finally:
        await connection.close()


async def test_a_reply_queue_that_nobody_reads_holds_up_nobody_else_and_loses_nothing(
    stack: Stack, mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Its bound is lowered by a policy here: results wait in the database, and come when there is room."""
    lazy = make(stack, "lazy")
    bound = {"pattern": f"^{lazy['reply_queue']}$", "definition": {"max-length": 5}, "apply-to": "queues"}
    path = f"policies/{lazy['vhost']}/lazy"
    call_management(stack.management_url, "PUT", path, json.dumps(bound).encode())
    async with session(lazy) as team, session(mine) as others:
        for part in range(3):
            lines = [chat_line(stack, f"line-{part}-{n}") for n in range(100)]
            await team.publish(submission(f"lazy-{part}", lines))
        await until_done(stack, "lazy-", 300)
        await asyncio.sleep(5)  # what finds room in the queue has come by then
        began_s = time.monotonic()
        await others.publish(submission("awake", [chat_line(stack, "a")]))
        assert_answered(await others.read(has("result"), limit_s=10))
        assert time.monotonic() - began_s < 5
        queue = await team._channel.declare_queue(lazy["reply_queue"], passive=True)
        assert queue.declaration_result.message_count is not None
        # Those of one group are on their way before the first is refused.
        assert queue.declaration_result.message_count < 5 + 2 * GROUP, "it is full, and most results wait"
        call_management(stack.management_url, "DELETE", path)
        answers = await team.read(has("result", 300), limit_s=90)
    assert sorted(each["line"] for each in answers.of("result")) == list(range(1, 301))
    assert ask(stack, "DELETE", f"{PATH}/{lazy['credential_id']}")[0] == 204


# ---- what an operator breaks


async def answered(stack: Stack, credential: dict[str, Any], name: str, limit_s: float) -> None:
    """Publish until it is answered: what vanished with a queue is published again, as a client does that hears nothing."""
    deadline_s = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(Exception):
            async with session(credential) as team:
                await team.publish(submission(name, [chat_line(stack, "a")]))
                return assert_answered(await team.read(has("result"), limit_s=5))
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.5)


def assert_answered(answers: Answers) -> None:
    assert {each["type"] for each in answers.by_id.values()} == {"accepted", "result"}


@pytest.mark.parametrize("kind", ["submissions", "refused", "reply"])
async def test_queues_that_somebody_deleted_come_back_and_are_served(
    stack: Stack, mine: dict[str, Any], kind: str
) -> None:
    tag = mine["exchange"].rpartition(".")[2]
    names = {
        "submissions": f"submissions.v2.{tag}", "refused": mine["refusals_queue"], "reply": mine["reply_queue"],
    }  # fmt: skip
    call_management(stack.management_url, "DELETE", f"queues/{mine['vhost']}/{names[kind]}")
    await answered(stack, mine, f"deleted/{kind}", 60)
    deadline_s = time.monotonic() + 60
    while True:
        with contextlib.suppress(Exception):
            async with session(mine) as team:
                await team.publish(b"hello", reply_to=None)
                await team.read(has("refused"), queue=mine["refusals_queue"], limit_s=5)
                return
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.5)


async def test_a_client_that_dies_with_its_answers_finds_them_again(
    stack: Stack, mine: dict[str, Any]
) -> None:
    async with session(mine) as team:
        await team.publish(submission("dies", [chat_line(stack, f"line-{n}") for n in range(10)]))
        deadline_s = time.monotonic() + 40
        while True:  # until all its answers are there
            found = await team._channel.declare_queue(mine["reply_queue"], passive=True)
            if (found.declaration_result.message_count or 0) >= 11:
                break
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.2)
    for _ in range(25):
        async with session(mine) as team:
            queue = await team._channel.get_queue(mine["reply_queue"], ensure=False)
            assert await queue.get(timeout=5) is not None  # and it is not acked
    async with session(mine) as team:
        answers = await team.read(has("result", 10))
    assert len(answers.of("result")) == 10


async def test_a_broker_that_lost_the_vhost_serves_the_team_again(stack: Stack, mine: dict[str, Any]) -> None:
    call_management(stack.management_url, "DELETE", f"vhosts/{mine['vhost']}")
    await answered(stack, mine, "lost/vhost", 60)


def test_refusals_are_bounded_in_bytes_too(stack: Stack, mine: dict[str, Any]) -> None:
    found = json.loads(
        call_management(stack.management_url, "GET", f"queues/{mine['vhost']}/{mine['refusals_queue']}", None)
    )
    assert found["arguments"]["x-max-length-bytes"] <= 64 * 1024 * 1024
