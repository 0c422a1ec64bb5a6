"""The private servers: two clones side by side, loopback only, data that stay, restarts, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aio_pika
import asyncpg
import pytest
import redis

from infra.local.daemon import build
from infra.local.failures import SetupFailed
from infra.local.layout import Layout
from infra.local.leftovers import find_processes
from infra.local.ports import load_ports
from infra.local.probes import EpmdProbe, HttpProbe
from infra.local.processes import Addresses
from infra.local.state import read_report
from infra.local.supervisor import log_path
from infra.local.up import ensure_running, stop

pytestmark = pytest.mark.timeout(240)

# The servers are our own here even when the environment names others for the rest of the tests.
ENVIRON = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}


@pytest.fixture
def layouts(tmp_path: Path) -> Iterator[list[Layout]]:
    """Two clones in a folder that nobody else may enter, with blanks in its path."""
    closed = tmp_path / "a folder of clones"
    closed.mkdir(mode=0o700)
    layouts = [Layout(closed / name) for name in ("one", "two")]
    yield layouts
    for layout in layouts:
        stop(layout, quiet=True)


def start(layout: Layout) -> Addresses:
    ensure_running(layout, "servers", ENVIRON, quiet=True)
    return build(layout, "servers", ENVIRON)[0]


async def leave_a_trace(addresses: Addresses, word: str) -> None:
    connection = await asyncpg.connect(addresses.database_url)
    await connection.execute("CREATE TABLE trace AS SELECT $1::text AS word", word)
    await connection.close()
    async with await aio_pika.connect(addresses.amqp_url) as broker:
        channel = await broker.channel(publisher_confirms=True, on_return_raises=True)
        await channel.declare_queue("trace", durable=True, arguments={"x-queue-type": "quorum"})
        message = aio_pika.Message(word.encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, routing_key="trace", mandatory=True)


async def read_trace(addresses: Addresses) -> set[str]:
    connection = await asyncpg.connect(addresses.database_url)
    word = await connection.fetchval("SELECT word FROM trace")
    await connection.close()
    async with await aio_pika.connect(addresses.amqp_url) as broker:
        queue = await (await broker.channel()).get_queue("trace")
        message = await queue.get(timeout=10)
        await message.ack()
    return {str(word), message.body.decode()}


def listening_addresses(ports: set[int]) -> dict[int, set[str]]:
    """Local addresses (hexadecimal, as the kernel writes them) of all listeners on the given ports."""
    found: dict[int, set[str]] = {port: set() for port in ports}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, _, port = line.split()[1].partition(":")
            if line.split()[3] == "0A" and int(port, 16) in found:
                found[int(port, 16)].add(address)
    return found


LOOPBACKS = {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1, little-endian words


async def test_two_clones_run_side_by_side_and_keep_their_data(layouts: list[Layout]) -> None:
    # Given two clones that start at the same moment
    with ThreadPoolExecutor() as pool:
        first, second = await asyncio.gather(
            *(asyncio.get_running_loop().run_in_executor(pool, start, layout) for layout in layouts)
        )
    await leave_a_trace(first, "one")
    await leave_a_trace(second, "two")

    # Then every port of theirs is on loopback only, epmd's and Erlang's distribution too
    for layout in layouts:
        ports = load_ports(layout)
        assert ports is not None
        servers = {ports.postgres, ports.redis, ports.epmd, ports.rabbitmq_amqp, ports.rabbitmq_distribution}
        servers |= {ports.rabbitmq_management, ports.rabbitmq_prometheus}
        listening = listening_addresses(servers)
        assert all(listening.values()), listening
        assert set().union(*listening.values()) <= LOOPBACKS

    # When one is stopped, nothing of it is left, and the other is not touched
    stop(layouts[0], quiet=True)
    assert find_processes(layouts[0].marker) == []
    assert await read_trace(second) == {"two"}

    # And when it starts again it has its data
    assert await read_trace(await asyncio.to_thread(start, layouts[0])) == {"one"}


async def test_epmd_is_asked_in_its_own_language(layouts: list[Layout]) -> None:
    await asyncio.to_thread(start, layouts[0])
    ports = load_ports(layouts[0])
    assert ports is not None
    assert await EpmdProbe(ports.epmd)() is None
    assert await EpmdProbe(ports.redis)() == f"port {ports.redis}: no answer"
    # It would complain of every connection that asks nothing, one line each five seconds
    assert log_path(layouts[0], "epmd").read_text() == ""


async def test_servers_refuse_strangers(layouts: list[Layout]) -> None:
    addresses = await asyncio.to_thread(start, layouts[0])
    ports = load_ports(layouts[0])
    assert ports is not None
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(f"postgresql://roundhouse:wrong@127.0.0.1:{ports.postgres}/roundhouse")
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=ports.redis).ping()
    with pytest.raises(aio_pika.exceptions.AMQPConnectionError):
        await aio_pika.connect(f"amqp://guest:guest@127.0.0.1:{ports.rabbitmq_amqp}/")
    management = HttpProbe(f"http://127.0.0.1:{ports.rabbitmq_management}/api/overview", "guest", "guest")
    assert await management() == "answers 401"
    assert redis.Redis.from_url(addresses.redis_url).ping()
    for path in (layouts[0].home, layouts[0].secrets_file):
        assert path.stat().st_mode & 0o077 == 0, path


async def test_a_killed_server_comes_back_with_its_data(layouts: list[Layout]) -> None:
    addresses = await asyncio.to_thread(start, layouts[0])
    await leave_a_trace(addresses, "kept")
    # RabbitMQ 3.10 registers a new quorum queue in a file that it syncs after a few seconds; one declared just before a
    # kill -9 is never usable again. Queues that the services declare at their first start are older than that.
    await asyncio.sleep(8)
    report = read_report(layouts[0])
    assert report is not None
    for process in report.processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while True:
            report = read_report(layouts[0])
            assert report is not None
            if all(each.starts >= 2 and each.state == "ready" for each in report.processes):
                break
            await asyncio.sleep(0.1)
    assert await read_trace(addresses) == {"kept"}
    words = (layouts[0].logs / "supervisor.log").read_text()
    for name in ("postgres", "redis", "rabbitmq", "epmd"):
        assert f"{name}: ended (killed by SIGKILL); starting it again" in words


async def test_after_a_killed_supervisor_the_next_start_sweeps_up_and_finds_the_data(
    layouts: list[Layout],
) -> None:
    await leave_a_trace(await asyncio.to_thread(start, layouts[0]), "kept")
    report = read_report(layouts[0])
    assert report is not None
    os.kill(report.pid, signal.SIGKILL)
    before = {each.pid for each in find_processes(layouts[0].marker)}
    assert {each.name for each in find_processes(layouts[0].marker)} == {
        "postgres",
        "redis",
        "rabbitmq",
        "epmd",
    }
    addresses = await asyncio.to_thread(start, layouts[0])
    assert before.isdisjoint(each.pid for each in find_processes(layouts[0].marker))
    assert await read_trace(addresses) == {"kept"}


def test_a_port_that_was_taken_meanwhile_is_replaced(layouts: list[Layout]) -> None:
    start(layouts[0])
    before = load_ports(layouts[0])
    stop(layouts[0], quiet=True)
    assert before is not None
    with socket.create_server(("127.0.0.1", before.redis)):
        addresses = start(layouts[0])
    assert f":{before.redis}/" not in addresses.redis_url
    assert redis.Redis.from_url(addresses.redis_url).ping()


def test_a_server_that_cannot_start_ends_in_one_line_and_leaves_nothing(layouts: list[Layout]) -> None:
    start(layouts[0])
    stop(layouts[0], quiet=True)
    version = layouts[0].home / "postgres" / "data" / "PG_VERSION"
    version.write_text("3\n")
    with pytest.raises(SetupFailed) as caught:
        start(layouts[0])
    line = str(caught.value)
    assert line.startswith("postgres does not start: ") and "PostgreSQL 3, which is not installed" in line
    assert "\n" not in line
    assert find_processes(layouts[0].marker) == [] and read_report(layouts[0]) is None


def test_a_path_that_rabbitmq_cannot_live_with_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="move the clone elsewhere"):
        ensure_running(Layout(tmp_path / "a clone's folder"), "servers", ENVIRON, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_first_set_up_that_was_killed_half_way_is_mended(layouts: list[Layout]) -> None:
    """As if killed within initdb: a part of the data folder, and passwords already made."""
    part = layouts[0].home / "postgres" / "data.part"
    part.mkdir(parents=True)
    (part / "PG_VERSION").write_text("15\n")
    (layouts[0].home / "postgres" / "data").mkdir()
    (layouts[0].home / "ports.json").write_text('{"redis": ')
    addresses = start(layouts[0])
    assert redis.Redis.from_url(addresses.redis_url).ping()
