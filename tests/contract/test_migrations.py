"""The migrations themselves: up, down, up again; a changed file is refused; two runs at once do not meet."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from infra.migrate import MigrationError, migrate_down, migrate_up, read_migrations

ROOT = Path(__file__).resolve().parents[2]
MIGRATIONS = read_migrations()
VERSIONS = [migration.version for migration in MIGRATIONS]

_EVERYTHING = """
    SELECT 'relation' AS kind, n.nspname || '.' || c.relname || ' ' || coalesce(c.relacl::text, '') AS name
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname !~ '^pg_|^information_schema$' AND c.relname !~ '^schema_migrations'
    UNION ALL
    SELECT 'column', attrelid::regclass || '.' || attname || ' ' || format_type(atttypid, atttypmod) || attnotnull
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname !~ '^pg_|^information_schema$' AND c.relname !~ '^schema_migrations' AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT 'function', n.nspname || '.' || p.proname
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname !~ '^pg_|^information_schema$'
    UNION ALL
    SELECT 'trigger', tgrelid::regclass || '.' || tgname || ' ' || tgtype FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL
    SELECT 'constraint', conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
        FROM pg_constraint WHERE conrelid <> 0 AND conrelid::regclass::text !~ '^schema_migrations'
    UNION ALL
    SELECT 'schema', nspname || ' ' || coalesce(nspacl::text, '') FROM pg_namespace
        WHERE nspname !~ '^pg_|^information_schema$'
    ORDER BY 1, 2
"""


@pytest.fixture
async def connection(empty_database: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    opened = await asyncpg.connect(empty_database)
    yield opened
    await opened.close()


async def _inventory(connection: asyncpg.Connection[asyncpg.Record]) -> list[tuple[str, str]]:
    return [(row["kind"], row["name"]) for row in await connection.fetch(_EVERYTHING)]


async def test_each_migration_can_be_undone_and_done_again(
    connection: asyncpg.Connection[asyncpg.Record],
) -> None:
    before = await _inventory(connection)
    stages = [before]
    for count in range(1, len(MIGRATIONS) + 1):
        assert await migrate_up(connection, MIGRATIONS[:count]) == [VERSIONS[count - 1]]
        stages.append(await _inventory(connection))
        assert stages[-1] != stages[-2], "a migration that does nothing"
    for count in range(len(MIGRATIONS), 0, -1):
        assert await _inventory(connection) == stages[count], (
            f"down of {VERSIONS[count - 1]} leaves something"
        )
        assert await migrate_down(connection, MIGRATIONS) == VERSIONS[count - 1]
    assert await _inventory(connection) == before
    assert await migrate_down(connection, MIGRATIONS) is None
    assert await migrate_up(connection, MIGRATIONS) == VERSIONS
    assert await _inventory(connection) == stages[-1]


async def test_a_second_run_does_nothing(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    await migrate_up(connection, MIGRATIONS)
    assert await migrate_up(connection, MIGRATIONS) == []


async def test_two_runs_at_once_do_the_work_once(empty_database: str) -> None:
    connections = [await asyncpg.connect(empty_database) for _ in range(3)]
    done = await asyncio.gather(*(migrate_up(each, MIGRATIONS) for each in connections))
    assert sorted(version for versions in done for version in versions) == VERSIONS
    for each in connections:
        await each.close()


async def test_a_file_that_changed_after_it_was_applied_stops_the_run(
    connection: asyncpg.Connection[asyncpg.Record],
) -> None:
    await migrate_up(connection, MIGRATIONS[:2])
    changed = [
        dataclasses.replace(MIGRATIONS[0], checksum=hashlib.sha256(b"other").hexdigest()),
        *MIGRATIONS[1:],
    ]
    with pytest.raises(MigrationError, match=r"was changed after it was applied"):
        await migrate_up(connection, changed)
    applied = await connection.fetchval("SELECT count(*) FROM schema_migrations")
    assert applied == 2, "nothing after the changed one was applied"
    assert await migrate_up(connection, MIGRATIONS) == VERSIONS[2:], "and the lock was given back"


async def test_a_migration_that_fails_leaves_nothing_of_itself(
    connection: asyncpg.Connection[asyncpg.Record],
) -> None:
    broken = dataclasses.replace(
        MIGRATIONS[1], up="CREATE TABLE gateway.half_made (id int); SELECT no_such_column;"
    )
    with pytest.raises(asyncpg.UndefinedColumnError):
        await migrate_up(connection, [MIGRATIONS[0], broken])
    assert await connection.fetchval("SELECT to_regclass('gateway.half_made')") is None
    assert await migrate_up(connection, MIGRATIONS) == VERSIONS[1:]


async def test_what_dbmate_applied_is_known_as_applied(
    connection: asyncpg.Connection[asyncpg.Record],
) -> None:
    await migrate_up(connection, MIGRATIONS)
    await connection.execute("ALTER TABLE schema_migrations DROP COLUMN checksum")  # dbmate's own table
    assert await migrate_up(connection, MIGRATIONS) == []


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"1_short.sql": "-- migrate:up\n-- migrate:down\n"}, "expected <14 digits>"),
        ({"20260101000000_no_down.sql": "-- migrate:up\nSELECT 1;\n"}, "migrate:down"),
        (
            {
                "20260101000000_a.sql": "-- migrate:up\n-- migrate:down\n",
                "20260101000000_b.sql": "-- migrate:up\n-- migrate:down\n",
            },
            "same version",
        ),
    ],
)
def test_a_badly_made_file_is_refused(tmp_path: Path, files: dict[str, str], problem: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(MigrationError, match=problem):
        read_migrations(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ([], {"DATABASE_URL": "postgresql://h/"}),
        (["sideways"], {"DATABASE_URL": "postgresql://h/"}),
        (["up"], {}),
        (["up"], {"DATABASE_URL": "postgresql://u:pass-word@127.0.0.1:1/nothing"}),
    ],
)
def test_the_command_fails_with_one_line(arguments: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "infra.migrate", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "pass-word" not in done.stderr
