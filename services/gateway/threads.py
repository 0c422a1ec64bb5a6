"""Blocking work in threads, waited for also by a task that is cancelled: what it holds must not be taken from under it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def run_to_its_end(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the call's result. A thread cannot be stopped: a cancelled caller gets the cancellation when it has ended."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
