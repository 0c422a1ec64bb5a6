"""Real servers for tests. A server that is missing is an error, never a skip.

`servers` starts the tests' own RabbitMQ, Redis and PostgreSQL once per run (or uses those that DATABASE_URL, REDIS_URL,
AMQP_URL name). What a test gets is its own: a fresh vhost, a fresh migrated database, an empty Redis database.
Unit tests ask for none of these, and start nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from infra.local.scratch import scratch_database, scratch_vhost, with_path
from infra.local.testservers import running_servers

ROOT = Path(__file__).resolve().parents[1]
# Tests empty this Redis database, so it is never number 0, which someone's own server would keep its things in.
REDIS_TEST_DATABASE = 15


@dataclass(frozen=True, slots=True)
class Servers:
    """Addresses of the three servers. The users in them may make and remove databases and vhosts."""

    amqp_url: str
    amqp_management_url: str
    redis_url: str
    database_url: str


@dataclass(frozen=True, slots=True)
class Vhost:
    """A vhost of one test's (or module's) own; `amqp_url` leads into it."""

    name: str
    amqp_url: str
    amqp_management_url: str


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with running_servers(os.environ) as addresses:
        if addresses.amqp_management_url is None:
            raise RuntimeError(
                "AMQP_URL is set without AMQP_MANAGEMENT_URL, which the tests need to make vhosts"
            )
        yield Servers(
            amqp_url=addresses.amqp_url,
            amqp_management_url=addresses.amqp_management_url,
            redis_url=addresses.redis_url,
            database_url=addresses.database_url,
        )


@pytest.fixture
def vhost(servers: Servers) -> Iterator[Vhost]:
    with _fresh_vhost(servers) as made:
        yield made


@pytest.fixture(scope="module")
def module_vhost(servers: Servers) -> Iterator[Vhost]:
    with _fresh_vhost(servers) as made:
        yield made


@pytest.fixture(scope="session")
def migrated_template(servers: Servers) -> Iterator[str]:
    """The name of a database that all migrations were run on; `database` copies it, which takes a moment only."""
    with scratch_database(servers.database_url, prefix="test_template") as url:
        subprocess.run(
            [sys.executable, "-m", "infra.migrate", "up"],
            cwd=ROOT,
            env={**os.environ, "DATABASE_URL": url},
            check=True,
        )
        yield urllib.parse.urlsplit(url).path.removeprefix("/")


@pytest.fixture
def database(servers: Servers, migrated_template: str) -> Iterator[str]:
    """The URL (with the administrator's user) of a fresh, migrated database."""
    with scratch_database(servers.database_url, f'TEMPLATE "{migrated_template}"', "test") as url:
        yield url


@pytest.fixture(scope="module")
def module_database(servers: Servers, migrated_template: str) -> Iterator[str]:
    with scratch_database(servers.database_url, f'TEMPLATE "{migrated_template}"', "test") as url:
        yield url


@pytest.fixture
def empty_database(servers: Servers) -> Iterator[str]:
    """The URL of a fresh database without anything in it: for tests of the migrations themselves."""
    with scratch_database(servers.database_url, prefix="test") as url:
        yield url


@pytest.fixture
def redis_db(servers: Servers) -> Iterator[str]:
    """The URL of an empty Redis database."""
    url = with_path(servers.redis_url, str(REDIS_TEST_DATABASE))
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


@contextmanager
def _fresh_vhost(servers: Servers) -> Iterator[Vhost]:
    with scratch_vhost(servers.amqp_url, servers.amqp_management_url, "test") as url:
        yield Vhost(urllib.parse.urlsplit(url).path.removeprefix("/"), url, servers.amqp_management_url)
