"""Start, run and stop a service: settings, signals, one root TaskGroup, the ops port, an ordered end.

A service's `__main__` builds its objects in an async `serve(life)` and gives it to `run`. `serve` starts its long
tasks in `life.group`, says when it is ready, waits for `life.stopping`, drains, and returns. Any long task that dies
takes the service down loudly. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeVar

import structlog
import uvloop
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from shared import settings as settings_module
from shared import telemetry
from shared.settings import CommonSettings, SettingsError

log = structlog.get_logger()
S = TypeVar("S", bound=CommonSettings)

EXIT_SETTINGS = 78
EXIT_FORCED = 70
CANCEL_AGAIN_S = 10.0
"""Longer than what a task does to end well."""


class Lifetime:
    """What a running service knows of its own life."""

    def __init__(self, group: asyncio.TaskGroup, stack: AsyncExitStack) -> None:
        self.group = group
        self.stack = stack
        """Closed after `serve` returned and all long tasks ended, in reverse order."""
        self.stopping = asyncio.Event()
        self._checks: dict[str, Callable[[], bool]] = {}
        self._started = False

    def check(self, name: str, is_ready: Callable[[], bool]) -> None:
        """Add a readiness check; `/readyz` answers 200 only when all are true."""
        self._checks[name] = is_ready

    def started(self) -> None:
        """Everything is built and runs: from now on the checks decide about readiness."""
        self._started = True

    def not_ready(self) -> list[str]:
        """Names of what keeps the service from being ready; empty when it is."""
        if not self._started:
            return ["starting"]
        if self.stopping.is_set():
            return ["stopping"]
        return [name for name, is_ready in self._checks.items() if not is_ready()]


def run(service: str, kind: type[S], serve: Callable[[S, Lifetime], Awaitable[None]]) -> None:
    """Run a service to its end; the process exits 0 after a clean stop, 78 for bad settings, 1 for a failure.

    `--check-settings` only reads and checks the settings.
    """
    try:
        loaded = settings_module.load(kind)
    except SettingsError as error:
        for line in str(error).splitlines():
            print(f"{service}: {line}", file=sys.stderr)
        sys.exit(EXIT_SETTINGS)
    if "--check-settings" in sys.argv[1:]:
        print(f"{service}: settings are good")
        return
    telemetry.setup(service, log_level=loaded.log_level)
    try:
        uvloop.run(_main(loaded, serve))
    except* Exception as failures:
        for failure in failures.exceptions:
            log.error("service_failed", exc_info=failure)
        telemetry.shutdown()
        sys.exit(1)
    telemetry.shutdown()


async def _main(loaded: S, serve: Callable[[S, Lifetime], Awaitable[None]]) -> None:
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        life = Lifetime(group, stack)
        _handle_signals(life)
        await _serve_ops(life, loaded)
        log.info("service_starting", pid=os.getpid())
        await serve(loaded, life)
        log.info("service_stopping")
        life.stopping.set()
        await _cancel_all(group)
    log.info("service_stopped")


async def _cancel_all(group: asyncio.TaskGroup) -> None:
    """Cancel what still runs, again and again: a library may lose a cancellation (a `wait_for` of Python 3.11 that ends at
    that moment does), and the service would never stop."""
    while tasks := group._tasks.copy():
        for task in tasks:
            task.cancel()
        _, left = await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)
        if left:
            log.warning("tasks_cancelled_again", tasks=sorted(repr(task.get_coro()) for task in left))


def _handle_signals(life: Lifetime) -> None:
    signalled = False

    def on_signal(name: str) -> None:
        # Only a second signal forces: a service that was told to stop by a message and then gets its first SIGTERM
        # (a worker that drains) goes on finishing its work.
        nonlocal signalled
        if signalled:
            log.warning("service_forced_to_stop", signal=name)
            os._exit(EXIT_FORCED)
        signalled = True
        log.info("signal_received", signal=name)
        life.stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number.name)


async def _serve_ops(life: Lifetime, common: CommonSettings) -> None:
    async def livez(_request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def readyz(_request: web.Request) -> web.Response:
        missing = life.not_ready()
        return web.json_response(
            {"ready": not missing, "waiting_for": missing}, status=503 if missing else 200
        )

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    life.stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, common.ops_host, common.ops_port).start()
