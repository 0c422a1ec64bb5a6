"""What credentials for the queue open, and that they open nothing else: made over HTTP, tried on the real broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.error
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import aio_pika
import aio_pika.abc
import asyncpg
import pytest
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AMQPException,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
)
from aiormq.exceptions import ChannelAccessRefused

from infra.local.scratch import call_management
from loadtest.stack import Stack, post, running_stack
from shared.amqp_url import in_vhost, with_user
from shared.topology import TEAM_MAX_CHANNELS, TEAM_MAX_CONNECTIONS
from tests.queue_team import PATH, ask, make, url_of

Channel = aio_pika.abc.AbstractChannel
SYSTEM_EXCHANGES = ("amq.direct", "amq.fanout", "amq.headers", "amq.match", "amq.topic", "amq.rabbitmq.trace")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        running.start_service("batch")
        admin = running._environment["ROUNDHOUSE_ADMIN_KEY"]
        post(f"{running.base_url}/api/teams", admin, {"slug": "other", "name": "Other"})
        yield running


@pytest.fixture(scope="module")
def mine(stack: Stack) -> dict[str, Any]:
    return make(stack, "mine")


@pytest.fixture(scope="module")
def theirs(stack: Stack) -> dict[str, Any]:
    return make(stack, "theirs", "other")


@contextlib.asynccontextmanager
async def channel_of(url: str) -> AsyncIterator[Channel]:
    connection = await aio_pika.connect(url, timeout=5)
    try:
        yield await connection.channel(publisher_confirms=True, on_return_raises=True)
    finally:
        with contextlib.suppress(*CONNECTION_EXCEPTIONS, AMQPException, TimeoutError):
            await asyncio.wait_for(connection.close(), 3)


async def attempt(url: str, act: Callable[[Channel], Awaitable[Any]]) -> Any:
    async with channel_of(url) as channel:
        return await asyncio.wait_for(act(channel), 5)


def publish(exchange: str, key: str = "", **properties: Any) -> Callable[[Channel], Awaitable[Any]]:
    async def act(channel: Channel) -> Any:
        target = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
        return await target.publish(aio_pika.Message(b"{}", **properties), key, mandatory=True)

    return act


def on_queue(name: str, verb: str) -> Callable[[Channel], Awaitable[Any]]:
    async def act(channel: Channel) -> Any:
        queue = await channel.get_queue(name, ensure=False)
        match verb:
            case "get":
                return await queue.get(no_ack=True, fail=False)
            case "consume":
                return await queue.consume(nothing)
            case "purge":
                return await queue.purge()
            case "delete":
                return await channel.queue_delete(name)
            case "declare":
                return await channel.declare_queue(name, durable=True)
            case "look":
                return await channel.declare_queue(name, passive=True)

    return act


async def nothing(message: aio_pika.abc.AbstractIncomingMessage) -> None:
    pass


def exchange_verb(name: str, verb: str) -> Callable[[Channel], Awaitable[Any]]:
    async def act(channel: Channel) -> Any:
        if verb == "declare":
            return await channel.declare_exchange(name, "fanout")
        return await channel.exchange_delete(name)

    return act


# ---- what they are for


async def test_they_publish_to_the_team_s_exchange_and_read_its_replies(mine: dict[str, Any]) -> None:
    assert await attempt(url_of(mine), publish(mine["exchange"], reply_to=mine["reply_queue"]))
    for queue in (mine["reply_queue"], mine["refusals_queue"]):
        assert await attempt(url_of(mine), on_queue(queue, "consume"))


def test_a_secret_is_shown_once(stack: Stack, mine: dict[str, Any]) -> None:
    assert "secret" in mine
    status, page = ask(stack, "GET", PATH)
    assert status == 200
    (row,) = [each for each in page["data"] if each["credential_id"] == mine["credential_id"]]
    assert row == {name: value for name, value in mine.items() if name != "secret"}
    assert ask(stack, "GET", f"{PATH}/{mine['credential_id']}") == (200, row)
    assert mine["secret"] not in json.dumps(page)


# ---- and nothing else


@pytest.mark.parametrize("verb", ["get", "consume", "purge", "delete", "declare"])
async def test_no_queue_but_the_team_s_answers_is_open(
    mine: dict[str, Any], theirs: dict[str, Any], verb: str
) -> None:
    tags = [each["exchange"].rpartition(".")[2] for each in (mine, theirs)]
    closed = [theirs["reply_queue"], theirs["refusals_queue"], *(f"submissions.v2.{tag}" for tag in tags)]
    if verb in ("delete", "declare"):
        closed += [mine["reply_queue"], mine["refusals_queue"], mine["reply_queue"] + "2", "free"]
    for queue in closed:
        with pytest.raises(ChannelAccessRefused):
            await attempt(url_of(mine), on_queue(queue, verb))


async def test_no_exchange_but_the_team_s_own_is_open(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for exchange in ("", theirs["exchange"], mine["exchange"] + "x", "free", *SYSTEM_EXCHANGES):
        for key in (theirs["reply_queue"], mine["reply_queue"]):
            with pytest.raises(ChannelAccessRefused):
                await attempt(url_of(mine), publish(exchange, key))
    for name in (mine["exchange"], mine["exchange"] + "x", "free"):
        with pytest.raises(ChannelAccessRefused):
            await attempt(url_of(mine), exchange_verb(name, "declare"))
        with pytest.raises(ChannelAccessRefused):
            await attempt(url_of(mine), exchange_verb(name, "delete"))
    with pytest.raises(ChannelAccessRefused):  # a queue that the broker names
        await attempt(url_of(mine), lambda channel: channel.declare_queue("", exclusive=True))


async def test_nothing_can_be_bound(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for exchange in (mine["exchange"], theirs["exchange"]):

        async def bind(channel: Channel, exchange: str = exchange) -> Any:
            queue = await channel.get_queue(mine["reply_queue"], ensure=False)
            return await queue.bind(await channel.get_exchange(exchange, ensure=False), "x")

        with pytest.raises(ChannelAccessRefused):
            await attempt(url_of(mine), bind)


async def test_routing_keys_in_headers_lead_nowhere(
    stack: Stack, mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    carbon = {"CC": [theirs["reply_queue"]], "BCC": [theirs["reply_queue"]]}
    await attempt(url_of(mine), publish(mine["exchange"], theirs["reply_queue"], headers=carbon))
    await asyncio.sleep(0.5)
    assert await attempt(url_of(theirs), on_queue(theirs["reply_queue"], "get")) is None


async def test_nobody_speaks_in_another_s_name(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    with pytest.raises(ChannelPreconditionFailed):
        await attempt(url_of(mine), publish(mine["exchange"], user_id=theirs["username"]))


async def test_names_of_other_teams_cannot_be_guessed(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The broker tells how much waits in a queue to whoever knows its name: names hold 96 random bits, and no id."""
    tags = {each["exchange"].rpartition(".")[2] for each in (mine, theirs)}
    assert len(tags) == 2 and all(len(tag) == 24 for tag in tags)
    for name in ("submissions.v2.team", "reply.v2." + "0" * 24 + ".mine"):
        with pytest.raises(ChannelNotFoundEntity):
            await attempt(url_of(mine), on_queue(name, "look"))


async def refused_connection(url: str) -> bool:
    try:
        async with channel_of(url):
            return False
    except (AMQPException, *CONNECTION_EXCEPTIONS):
        return True


async def test_no_other_vhost_opens(stack: Stack, mine: dict[str, Any]) -> None:
    ours = stack.amqp_url.rpartition("/")[2]
    for vhost in (ours, "/", "roundhouse"):
        assert await refused_connection(in_vhost(url_of(mine), vhost)), vhost
    assert not await refused_connection(url_of(mine))


def test_the_broker_s_management_api_is_closed(stack: Stack, mine: dict[str, Any]) -> None:
    address = with_user(stack.management_url, mine["username"], mine["secret"])
    for path in ("whoami", "queues", "overview", f"queues/{mine['vhost']}/{mine['reply_queue']}"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            call_management(address, "GET", path, None)
        assert refused.value.code == 401


async def until_refused(url: str, wanted: bool) -> None:
    """The broker counts connections a little later than they open and close."""
    deadline_s = time.monotonic() + 20
    while await refused_connection(url) is not wanted:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.2)


async def test_connections_and_channels_are_limited(stack: Stack) -> None:
    made = make(stack, "many")
    async with contextlib.AsyncExitStack() as held:
        for _ in range(TEAM_MAX_CONNECTIONS):
            await held.enter_async_context(channel_of(url_of(made)))
        await until_refused(url_of(made), True)
    await until_refused(url_of(made), False)
    connection = await aio_pika.connect(url_of(made))
    with pytest.raises((AMQPException, *CONNECTION_EXCEPTIONS)):
        for _ in range(TEAM_MAX_CHANNELS + 1):
            await connection.channel()
    await connection.close()


async def test_a_message_too_large_for_the_broker_ends_its_channel(
    mine: dict[str, Any],
) -> None:
    async def huge(channel: Channel) -> Any:
        exchange = await channel.get_exchange(mine["exchange"], ensure=False)
        return await exchange.publish(aio_pika.Message(b"x" * (17 * 1024 * 1024)), "")

    with pytest.raises((ChannelPreconditionFailed, *CONNECTION_EXCEPTIONS)):
        await attempt(url_of(mine), huge)
    assert not await refused_connection(url_of(mine))


# ---- their life


async def test_a_revoked_one_is_out_at_once_and_its_queue_is_gone(stack: Stack) -> None:
    made = make(stack, "short")
    async with channel_of(url_of(made)) as channel:
        closed = asyncio.Event()
        channel.close_callbacks.add(lambda *_: closed.set())
        assert ask(stack, "DELETE", f"{PATH}/{made['credential_id']}")[0] == 204
        await asyncio.wait_for(closed.wait(), 10)
    assert await refused_connection(url_of(made))
    assert ask(stack, "DELETE", f"{PATH}/{made['credential_id']}")[0] == 404
    again = make_when_free(stack, "short")
    assert again["username"] != made["username"] and not await refused_connection(url_of(again))


def make_when_free(stack: Stack, name: str) -> dict[str, Any]:
    deadline_s = time.monotonic() + 10
    while True:
        status, made = ask(stack, "POST", PATH, {"name": name})
        if status == 201:
            return dict(made)
        assert made["code"] == "name_taken" and time.monotonic() < deadline_s, made
        time.sleep(0.1)


async def test_a_rotated_secret_replaces_the_one_before(stack: Stack) -> None:
    made = make(stack, "turning")
    status, rotated = ask(stack, "POST", f"{PATH}/{made['credential_id']}/rotate")
    assert status == 201 and rotated["ready"] and rotated["secret"] != made["secret"]
    assert {**rotated, "rotated_at": None, "secret": ""} == {**made, "rotated_at": None, "secret": ""}
    assert await refused_connection(url_of(made))
    assert await attempt(url_of(rotated), on_queue(rotated["reply_queue"], "consume"))


def test_a_name_is_had_once_and_a_team_has_so_many(stack: Stack) -> None:
    admin = stack._environment["ROUNDHOUSE_ADMIN_KEY"]
    post(f"{stack.base_url}/api/teams", admin, {"slug": "greedy", "name": "Greedy"})
    for number in range(10):
        make(stack, f"n{number}", "greedy")
    status, refused = ask(stack, "POST", f"{PATH}?team=greedy", {"name": "n10"}, admin)
    assert (status, refused["code"]) == (409, "too_many_queue_credentials")
    make(stack, "once")
    status, refused = ask(stack, "POST", PATH, {"name": "once"})
    assert (status, refused["code"]) == (409, "name_taken")
    for name in ("", "Upper", "a.b", "a" * 40, "*"):
        assert ask(stack, "POST", PATH, {"name": name})[0] == 400


def test_another_team_s_are_like_such_that_do_not_exist(stack: Stack, theirs: dict[str, Any]) -> None:
    nobody = theirs["credential_id"][:-4] + "0000"
    for credential_id in (theirs["credential_id"], nobody):
        one = f"{PATH}/{credential_id}"
        for method, path in (("GET", one), ("DELETE", one), ("POST", one + "/rotate")):
            status, problem = ask(stack, method, path)
            assert (status, problem["code"]) == (404, "not_found")
    assert theirs["credential_id"] not in json.dumps(ask(stack, "GET", PATH)[1])


# ---- whatever dies


async def test_a_broker_that_lost_its_users_and_queues_gets_them_again(
    stack: Stack, mine: dict[str, Any]
) -> None:
    call_management(stack.management_url, "DELETE", f"vhosts/{mine['vhost']}")
    call_management(stack.management_url, "DELETE", f"users/{mine['username']}")
    assert await refused_connection(url_of(mine))
    deadline_s = time.monotonic() + 60
    while await refused_connection(url_of(mine)):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.5)
    assert await attempt(url_of(mine), publish(mine["exchange"]))
    with pytest.raises(ChannelAccessRefused):
        await attempt(url_of(mine), publish("", mine["reply_queue"]))


async def test_the_secret_is_nowhere_in_the_database(stack: Stack, mine: dict[str, Any]) -> None:
    connection = await asyncpg.connect(stack.database_url)
    try:
        tables = await connection.fetch(
            "SELECT schemaname || '.' || tablename AS name FROM pg_tables"
            " WHERE schemaname IN ('gateway', 'batch', 'scheduler', 'billing')"
        )
        found = [
            row["name"]
            for row in tables
            if await connection.fetchval(
                f"SELECT count(*) FROM {row['name']} AS t WHERE t::text LIKE '%' || $1 || '%'", mine["secret"]
            )
        ]
    finally:
        await connection.close()
    assert len(tables) > 20 and found == []
