"""The test servers' fixtures give each test what is its own."""

from __future__ import annotations

import urllib.parse

import aio_pika
import asyncpg
import redis

from tests.conftest import Vhost


async def test_a_vhost_takes_a_confirmed_message_and_gives_it_back(vhost: Vhost) -> None:
    async with await aio_pika.connect(vhost.amqp_url) as connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        queue = await channel.declare_queue("work", durable=True, arguments={"x-queue-type": "quorum"})
        await channel.default_exchange.publish(aio_pika.Message(b"hello"), routing_key="work", mandatory=True)
        message = await queue.get(timeout=5)
        assert message.body == b"hello"
        await message.ack()


async def test_a_vhost_is_new_for_each_test(vhost: Vhost) -> None:
    async with await aio_pika.connect(vhost.amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("work", durable=True, arguments={"x-queue-type": "quorum"})
        assert queue.declaration_result.message_count == 0
    assert urllib.parse.urlsplit(vhost.amqp_url).path == f"/{vhost.name}"


async def test_an_empty_database_has_no_tables_of_ours(empty_database: str) -> None:
    connection = await asyncpg.connect(empty_database)
    try:
        await connection.execute("CREATE TABLE mine (id int)")
        count = await connection.fetchval(
            "SELECT count(*) FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        )
    finally:
        await connection.close()
    assert count == 1


def test_redis_is_empty_and_not_database_zero(redis_db: str) -> None:
    with redis.Redis.from_url(redis_db) as client:
        assert client.dbsize() == 0
        client.set("left-behind", "by this test")
    assert redis_db.endswith("/15")


def test_redis_is_empty_again(redis_db: str) -> None:
    with redis.Redis.from_url(redis_db) as client:
        assert client.dbsize() == 0
