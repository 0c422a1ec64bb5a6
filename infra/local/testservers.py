"""The tests' own RabbitMQ, Redis and PostgreSQL, under `.local/test/`: a running `make up` is not disturbed.

`python -m infra.local.testservers COMMAND...` runs a command with them; `tests/conftest.py` uses them as well. A server
that the environment names (DATABASE_URL, REDIS_URL, AMQP_URL) is used instead; one that does not start is an error.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from infra.local.daemon import build
from infra.local.failures import SetupFailed
from infra.local.layout import Layout, test_layout
from infra.local.processes import Addresses
from infra.local.progress import fail
from infra.local.up import ensure_running, stop


@contextmanager
def running_servers(environ: Mapping[str, str], layout: Layout | None = None) -> Iterator[Addresses]:
    """The servers' addresses while the block runs. Several test runs may share them; the last one out stops them.

    Each user holds a shared lock, which the kernel drops even if the user is killed; starting and stopping happen one
    at a time. What only killed users had stays until the next user leaves, or `make clean`.
    """
    layout = layout or test_layout()
    layout.make_folders()
    with _opened(layout.run / "users.lock") as users, _opened(layout.run / "gate.lock") as gate:
        with _locked(gate):
            ensure_running(layout, "servers", environ, quiet=True)
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield build(layout, "servers", environ)[0]
        finally:
            with _locked(gate):
                fcntl.flock(users, fcntl.LOCK_UN)
                if _nobody_holds(users):
                    stop(layout, quiet=True)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _nobody_holds(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main(command: list[str]) -> int:
    try:
        with running_servers(os.environ):
            return subprocess.run(command).returncode
    except SetupFailed as failure:
        fail(f"the tests' servers: {failure}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
