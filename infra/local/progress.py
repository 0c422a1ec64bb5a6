"""Progress lines on standard output: what was done, and how long it took. Standard library only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    print(text, flush=True)


def fail(text: str) -> None:
    """The one line of a failure. On standard error, so that it is seen when output is piped away."""
    print(f"roundhouse: {text}", file=sys.stderr, flush=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Says `title` with its time when the block ends well; says nothing when it raises (the failure line follows)."""
    started_s = time.monotonic()
    yield
    say(done_line(title, time.monotonic() - started_s))


def done_line(title: str, took_s: float) -> str:
    return f"  {title:<66} {took_s:6.1f} s"
