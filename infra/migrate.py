"""Apply database migrations: `python -m infra.migrate up | down | status` with DATABASE_URL.

Files are `infra/migrations/<version>_<name>.sql` in dbmate's format (`-- migrate:up`, `-- migrate:down`; applied
versions in `schema_migrations`), so dbmate itself can be used instead. One migration is one transaction. Two runs at
once wait for each other, and a file that changed after it was applied stops the run.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import asyncpg

FOLDER = Path(__file__).parent / "migrations"
LOCK_KEY = 0x526F756E64  # any number, as long as all runs use the same
_NAME = re.compile(r"^(\d{14})_[a-z0-9_]+\.sql$")


class MigrationError(Exception):
    """One line that says which file and what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    version: str
    path: Path
    up: str
    down: str
    checksum: str


def read_migrations(folder: Path = FOLDER) -> list[Migration]:
    """Return all migrations in order. Raises `MigrationError` for a bad name or a file without its two parts."""
    found = []
    for path in sorted(folder.glob("*.sql")):
        match = _NAME.match(path.name)
        text = path.read_text(encoding="utf-8")
        parts = re.split(r"^-- migrate:(?:up|down)[^\n]*\n", text, flags=re.MULTILINE)
        if match is None or len(parts) != 3:
            raise MigrationError(
                f"{path.name}: expected <14 digits>_<name>.sql with migrate:up and migrate:down"
            )
        found.append(Migration(match[1], path, parts[1], parts[2], hashlib.sha256(text.encode()).hexdigest()))
    if len({m.version for m in found}) != len(found):
        raise MigrationError("two migrations have the same version")
    return found


async def _applied(connection: asyncpg.Connection[asyncpg.Record]) -> dict[str, str | None]:
    await connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations (version varchar(128) PRIMARY KEY)"
    )
    await connection.execute("ALTER TABLE schema_migrations ADD COLUMN IF NOT EXISTS checksum text")
    return {r["version"]: r["checksum"] for r in await connection.fetch("SELECT * FROM schema_migrations")}


async def migrate_up(
    connection: asyncpg.Connection[asyncpg.Record], migrations: list[Migration]
) -> list[str]:
    """Apply what is missing, in order; return the applied versions. Raises `MigrationError` on a changed file."""
    await connection.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
    try:
        applied = await _applied(connection)
        done = []
        for migration in migrations:
            if migration.version in applied:
                if applied[migration.version] not in (None, migration.checksum):
                    raise MigrationError(
                        f"{migration.path.name} was changed after it was applied; add a new one"
                    )
                continue
            async with connection.transaction():
                await connection.execute(migration.up)
                await connection.execute(
                    "INSERT INTO schema_migrations (version, checksum) VALUES ($1, $2)",
                    migration.version,
                    migration.checksum,
                )
            done.append(migration.version)
        return done
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", LOCK_KEY)


async def migrate_down(
    connection: asyncpg.Connection[asyncpg.Record], migrations: list[Migration]
) -> str | None:
    """Undo the newest applied migration; return its version, or None when nothing is applied."""
    await connection.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
    try:
        applied = await _applied(connection)
        newest = next((m for m in reversed(migrations) if m.version in applied), None)
        if newest is None:
            return None
        async with connection.transaction():
            await connection.execute(newest.down)
            await connection.execute("DELETE FROM schema_migrations WHERE version = $1", newest.version)
        return newest.version
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", LOCK_KEY)


async def _main(action: str, url: str) -> None:
    migrations = read_migrations()
    connection = await asyncpg.connect(url, timeout=10)
    try:
        if action == "up":
            done = await migrate_up(connection, migrations)
            print(f"migrations: {len(done)} applied, {len(migrations)} in all")
        elif action == "down":
            print(f"migrations: undone {await migrate_down(connection, migrations)}")
        else:
            applied = await _applied(connection)
            for migration in migrations:
                print(f"{'applied' if migration.version in applied else 'missing'}  {migration.path.name}")
    finally:
        await connection.close()


def main() -> None:
    action = sys.argv[1] if len(sys.argv) == 2 else ""
    url = os.environ.get("DATABASE_URL")
    if action not in ("up", "down", "status") or not url:
        sys.exit("usage: DATABASE_URL=... python -m infra.migrate up|down|status")
    try:
        asyncio.run(_main(action, url))
    except (MigrationError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        sys.exit(f"migrations: {error}")


if __name__ == "__main__":
    main()
