"""`shared.database` on a real PostgreSQL: a frozen server freezes nobody, and the pool mends itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import asyncpg
import pytest

from shared.database import Connection, Database
from shared.outcomes import Unavailable
from tests.tcp_proxy import TcpProxy

ROLE = "roundhouse_gateway"
POOL_SIZE = 2


@pytest.fixture
async def proxy(module_database: str) -> AsyncIterator[TcpProxy]:
    async with TcpProxy.before(module_database) as opened:
        yield opened


@pytest.fixture
async def pool(module_database: str, proxy: TcpProxy) -> AsyncIterator[Database]:
    async with AsyncExitStack() as stack:
        yield await Database.open(proxy.url(module_database), ROLE, stack, size=POOL_SIZE)
        await proxy.pass_on()


async def _sleep(connection: Connection) -> None:
    await connection.execute("SELECT pg_sleep(30)")


def _healthy(database: Database) -> bool:
    return database.healthy


async def _answers(database: Database) -> bool:
    try:
        await database.fetch("SELECT 1", timeout_s=0.5)
    except Unavailable:
        return False
    return True


async def _fill(database: Database) -> None:
    """Have every connection of the pool open and idle."""
    async with AsyncExitStack() as stack:
        for _ in range(POOL_SIZE):
            await stack.enter_async_context(database.pool.acquire())


# ---- sessions


async def test_a_session_runs_as_its_role_with_limits(pool: Database) -> None:
    row = await pool.fetchrow(
        "SELECT current_user, current_setting('statement_timeout') AS statement, "
        "current_setting('lock_timeout') AS lock, "
        "current_setting('idle_in_transaction_session_timeout') AS idle, "
        "current_setting('application_name') AS name"
    )
    assert row is not None
    assert dict(row) == {
        "current_user": ROLE,
        "statement": "8s",
        "lock": "3s",
        "idle": "15s",
        "name": ROLE,
    }


async def test_fetch_returns_rows_and_fetchrow_the_first_or_none(pool: Database) -> None:
    assert [r["n"] for r in await pool.fetch("SELECT n FROM generate_series(1, $1) n", 3)] == [1, 2, 3]
    row = await pool.fetchrow("SELECT 7 AS n")
    assert row is not None
    assert row["n"] == 7
    assert await pool.fetchrow("SELECT 1 WHERE false") is None


async def test_a_transaction_is_all_or_nothing(pool: Database) -> None:
    insert = "INSERT INTO gateway.teams (team_id, slug, name) VALUES ($1, $2, 'A team')"
    async with pool.transaction() as connection:
        await connection.execute(insert, "team_1", "whole")
    with pytest.raises(RuntimeError, match="half-way"):
        async with pool.transaction() as connection:
            await connection.execute(insert, "team_2", "half")
            raise RuntimeError("half-way")
    assert [r["slug"] for r in await pool.fetch("SELECT slug FROM gateway.teams")] == ["whole"]


# ---- a server that is away, frozen or busy


async def test_a_server_that_is_not_there_is_unavailable_in_time(
    module_database: str, proxy: TcpProxy
) -> None:
    proxy.refuse()
    began_s = time.monotonic()
    async with AsyncExitStack() as stack:
        with pytest.raises(Unavailable, match="cannot reach the database"):
            await Database.open(proxy.url(module_database), ROLE, stack, timeout_s=0.6)
    assert time.monotonic() - began_s < 3


async def test_a_server_that_comes_late_is_waited_for(module_database: str, proxy: TcpProxy) -> None:
    proxy.refuse()
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(Database.open(proxy.url(module_database), ROLE, stack))
        await asyncio.sleep(0.2)
        await proxy.pass_on()
        opened = await opening
        assert await opened.fetchrow("SELECT 1") is not None


async def test_a_frozen_server_holds_up_nobody_and_the_pool_recovers(pool: Database, proxy: TcpProxy) -> None:
    await _fill(pool)
    assert _healthy(pool)
    proxy.blackhole()
    # More than the pool has: some wait for a connection, and are answered in time as well.
    for _ in range(POOL_SIZE + 2):
        began_s = time.monotonic()
        with pytest.raises(Unavailable, match=r"within 0\.3 s"):
            await pool.fetch("SELECT 1", timeout_s=0.3)
        assert time.monotonic() - began_s < 1
    assert not _healthy(pool)

    await proxy.pass_on()
    async with asyncio.timeout(8):
        while not await _answers(pool):
            await asyncio.sleep(0.05)
    assert _healthy(pool)
    await asyncio.gather(*(pool.fetch("SELECT pg_sleep(0.05)") for _ in range(3 * POOL_SIZE)))


async def test_frozen_sessions_are_cut_so_that_fresh_ones_take_their_place(
    pool: Database, proxy: TcpProxy
) -> None:
    await _fill(pool)
    for link in proxy.links:
        link.blackhole()  # these for good, as after a failover; new ones would work
    for _ in range(POOL_SIZE):
        with pytest.raises(Unavailable):
            await pool.fetch("SELECT 1", timeout_s=0.2)
    for _ in range(POOL_SIZE):
        assert await pool.fetchrow("SELECT 1", timeout_s=5) is not None


async def test_many_at_once_on_a_frozen_server_all_return_in_time(pool: Database, proxy: TcpProxy) -> None:
    proxy.blackhole()
    began_s = time.monotonic()
    ends = await asyncio.gather(
        *(pool.fetch("SELECT 1", timeout_s=0.3) for _ in range(20)), return_exceptions=True
    )
    assert time.monotonic() - began_s < 1
    assert {type(end) for end in ends} == {Unavailable}


async def test_a_cancelled_query_ends_at_once_on_a_frozen_server(pool: Database, proxy: TcpProxy) -> None:
    await _fill(pool)
    proxy.blackhole()
    asking = asyncio.create_task(pool.fetch("SELECT 1", timeout_s=30))
    await asyncio.sleep(0.05)
    began_s = time.monotonic()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert time.monotonic() - began_s < 0.5


async def test_a_slow_query_is_given_up_and_its_session_is_not_used_again(pool: Database) -> None:
    began_s = time.monotonic()
    with pytest.raises(Unavailable, match=r"within 0\.2 s"):
        await pool.bounded(_sleep, 0.2)
    assert time.monotonic() - began_s < 1
    answers = await asyncio.gather(*(pool.fetchrow("SELECT $1::int AS n", n) for n in range(20)))
    assert [row["n"] for row in answers if row is not None] == list(range(20)), "nobody gets another's answer"


async def test_a_cut_connection_is_unavailable_once_and_then_replaced(
    pool: Database, proxy: TcpProxy
) -> None:
    asking = asyncio.create_task(pool.bounded(_sleep, 5))
    await asyncio.sleep(0.1)
    proxy.reset()
    with pytest.raises(Unavailable):
        await asking
    assert not _healthy(pool)
    assert await pool.fetchrow("SELECT 1") is not None
    assert _healthy(pool)


async def test_a_cut_transaction_is_unavailable_and_leaves_nothing(pool: Database, proxy: TcpProxy) -> None:
    with pytest.raises(Unavailable):
        async with pool.transaction() as connection:
            await connection.execute("INSERT INTO gateway.teams VALUES ('cut_1', 'one', 'A team')")
            proxy.reset()
            await connection.execute("INSERT INTO gateway.teams VALUES ('cut_2', 'two', 'A team')")
    assert await pool.fetch("SELECT 1 FROM gateway.teams WHERE team_id LIKE 'cut%'") == []


@pytest.mark.parametrize(
    "sql",
    [
        "SET LOCAL statement_timeout = '50ms'; SELECT pg_sleep(5)",  # QueryCanceledError
        "DO $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = '40001'; END $$",  # SerializationError
        "DO $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = '40P01'; END $$",  # DeadlockDetectedError
        "DO $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = '53300'; END $$",  # TooManyConnectionsError
        "DO $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = '53100'; END $$",  # DiskFullError
        "DO $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = '57P01'; END $$",  # AdminShutdownError
        "DO $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = '57P03'; END $$",  # CannotConnectNowError
        "DO $$ BEGIN RAISE EXCEPTION '' USING ERRCODE = '55P03'; END $$",  # LockNotAvailableError
    ],
)
async def test_what_another_try_may_mend_is_unavailable(pool: Database, sql: str) -> None:
    with pytest.raises(Unavailable):
        async with pool.transaction() as connection:
            await connection.execute(sql)
    with pytest.raises(Unavailable):
        await pool.bounded(lambda connection: connection.execute(f"BEGIN; {sql}"), 3)


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        ("SELECT 1 FROM scheduler.places", asyncpg.InsufficientPrivilegeError),
        ("SELECT no_such_column", asyncpg.UndefinedColumnError),
        ("INSERT INTO gateway.teams VALUES ('t', 'Not a slug', 'n')", asyncpg.CheckViolationError),
        ("INSERT INTO gateway.teams (team_id) VALUES ('t')", asyncpg.NotNullViolationError),
    ],
)
async def test_a_refused_row_or_a_bug_is_no_absence(pool: Database, sql: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        async with pool.transaction() as connection:
            await connection.execute(sql)
    with pytest.raises(error):
        await pool.fetch(sql)
    assert pool.healthy, "the database is there: restarting it would mend nothing"
