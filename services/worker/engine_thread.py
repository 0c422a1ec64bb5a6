"""The engine on its own thread: commands go in by a queue, step reports come out on the event loop.

An engine that fails in a step, or hangs in one, ends the process: its jobs are delivered again elsewhere, and a job
that does this each time is recognised by its attempts.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog

from services.worker.engine import EngineRefusal, ModelInfo, Sampling, SequenceRequest, StepReport

log = structlog.get_logger()

STEP_LIMIT_S = 120.0
"""A step takes milliseconds, a first one on a new device some seconds; after two minutes the device hangs."""
EXIT_ENGINE = 70


class EnginePort(Protocol):
    """What the worker needs of an engine (`services.worker.engine.Engine` is one)."""

    @property
    def has_work(self) -> bool: ...
    def load_model(self, handle: str, folder: Path) -> ModelInfo: ...
    def load_image(self, handle: str, path: Path, key: str, *, ask_canary: bool) -> ModelInfo: ...
    def load_adapter(self, handle: str, base_handle: str, folder: Path) -> ModelInfo: ...
    def unload_model(self, handle: str, *, keep_prefixes: bool) -> None: ...
    def forget_prefixes(self) -> None: ...
    def add(self, request: SequenceRequest) -> None: ...
    def cancel(self, sequence_id: str) -> None: ...
    def step(self) -> StepReport: ...


class EngineThread:
    """Runs `step` while there is work. All callbacks arrive on the event loop that called `start`."""

    def __init__(
        self,
        engine: EnginePort,
        on_report: Callable[[StepReport], None],
        on_refused: Callable[[str, EngineRefusal], None],
    ) -> None:
        self._engine = engine
        self._on_report = on_report
        self._on_refused = on_refused
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._step_started_s: float | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Let the thread end after its current step, whose report still comes: it needs the event loop until then."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, STEP_LIMIT_S)

    def add(self, request: SequenceRequest) -> None:
        """Give a sequence to the engine; a refusal comes by `on_refused`."""

        def run() -> None:
            try:
                self._engine.add(request)
            except EngineRefusal as refusal:
                self._loop.call_soon_threadsafe(self._on_refused, request.sequence_id, refusal)

        self._commands.put(run)

    def cancel(self, sequence_id: str) -> None:
        """Free the sequence's place before the next step; no delta of it follows that step."""
        self._commands.put(lambda: self._engine.cancel(sequence_id))

    async def load(self, handle: str, folder: Path, base_handle: str | None = None) -> ModelInfo:
        """Load beside the running steps; an adapter, if it has a base. Raises what the engine raises."""
        if base_handle is not None:
            return await asyncio.to_thread(self._engine.load_adapter, handle, base_handle, folder)
        return await asyncio.to_thread(self._engine.load_model, handle, folder)

    async def load_image(self, handle: str, path: Path, key: str, *, ask_canary: bool) -> ModelInfo:
        """As `load`, from an image."""
        return await asyncio.to_thread(self._engine.load_image, handle, path, key, ask_canary=ask_canary)

    def forget_prefixes(self) -> None:
        """Before the next step."""
        self._commands.put(self._engine.forget_prefixes)

    async def unload(self, handle: str) -> None:
        """Free a model between two steps. Raises `ValueError` while a sequence of it lives.

        What was computed for it is kept while nobody needs the room: a handle names a revision, whose weights never change.
        """
        done: asyncio.Future[None] = self._loop.create_future()

        def settle(error: Exception | None) -> None:
            if not done.cancelled():
                done.set_exception(error) if error else done.set_result(None)

        def run() -> None:
            try:
                self._engine.unload_model(handle, keep_prefixes=True)
            except ValueError as error:
                self._loop.call_soon_threadsafe(settle, error)
            else:
                self._loop.call_soon_threadsafe(settle, None)

        self._commands.put(run)
        await done

    async def warm_up(self, handle: str) -> None:
        """Generate two tokens with a loaded model before anybody's job: what a device does only once is done then.

        Nobody sees them, and nothing counts them. Raises `EngineRefusal`, and whatever a step raises.
        """
        done: asyncio.Future[None] = self._loop.create_future()
        request = SequenceRequest(
            "warm-up/0/0", handle, "", (0,), 2, Sampling(temperature=0.0, ignore_eos=True)
        )

        def settle(error: Exception | None) -> None:
            if not done.cancelled():
                done.set_exception(error) if error else done.set_result(None)

        def run() -> None:
            try:
                self._engine.add(request)
                while self._engine.has_work:
                    self._engine.step()
            except Exception as error:  # noqa: BLE001 - it is raised where the caller waits
                self._loop.call_soon_threadsafe(settle, error)
            else:
                self._loop.call_soon_threadsafe(settle, None)

        self._commands.put(run)
        await done

    def watch(self) -> None:
        """End the process when a step hangs. Called once a second from the event loop."""
        started_s = self._step_started_s
        if started_s is not None and time.monotonic() - started_s > STEP_LIMIT_S:
            log.error("engine_step_hangs", limit_s=STEP_LIMIT_S)
            os._exit(EXIT_ENGINE)

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._step_started_s = time.monotonic()
                report = self._engine.step()
                self._step_started_s = None
                self._loop.call_soon_threadsafe(self._on_report, report)
        except BaseException:
            # No partial repair: the device's state is unknown after a failed step.
            log.exception("engine_failed")
            os._exit(EXIT_ENGINE)

    def _take_commands(self) -> bool:
        """Run what was asked; wait for it when there is nothing else to do. False when the thread shall end."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
