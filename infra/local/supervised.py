"""One supervised process: starts it, waits until it is ready, starts it again when it dies, stops it when asked.

Owns the process's state and alone changes it; tells every change through `on_change`. Knows no other process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from infra.local.failures import SetupFailed, explain_os_error
from infra.local.layout import CLONE_VARIABLE, PROCESS_VARIABLE, ROOT
from infra.local.process_spec import (
    ProcessSpec,
    ProcessState,
    exit_words,
    failures_after_exit,
    restart_delay_s,
)
from infra.local.state import ProcessReport

STARTING_PROBE_EVERY_S = 0.15
READY_PROBE_EVERY_S = 5.0


class SupervisedProcess:
    """Runs one `ProcessSpec` until `stop`. `is_up` is set from when it was ready (a one-shot: done) until it ends."""

    def __init__(
        self,
        spec: ProcessSpec,
        *,
        marker: str,
        log_file: Path,
        say: Callable[[str], None],
        on_change: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.is_up = asyncio.Event()
        self._env = {**spec.env, CLONE_VARIABLE: marker, PROCESS_VARIABLE: spec.name}
        self._log_file = log_file
        self._say = say
        self._on_change = on_change
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._state = ProcessState.WAITING
        self._since_s = time.time()
        self._detail = ""
        self._starts = 0
        self._ever_ready = False
        self._failures_in_a_row = 0

    def report(self) -> ProcessReport:
        process = self._process
        return ProcessReport(
            name=self.spec.name,
            state=self._state.value,
            since_s=self._since_s,
            pid=process.pid if process is not None and process.returncode is None else None,
            starts=self._starts,
            failures_in_a_row=self._failures_in_a_row,
            ever_ready=self._ever_ready,
            one_shot=self.spec.one_shot,
            detail=self._detail,
        )

    async def run(self, dependencies: list[asyncio.Event]) -> None:
        """Until it is stopped, or, for a one-shot, done. Raises nothing for what the process does."""
        try:
            while not self._stopping.is_set():
                # After a death too: if what it needs died with it, it would only die again.
                for dependency in dependencies:
                    await self._unless_stopping(dependency.wait())
                if self._stopping.is_set():
                    return
                was_ready_s = await self._run_once()
                if self._state is ProcessState.DONE or self._stopping.is_set():
                    return
                self._failures_in_a_row = failures_after_exit(self._failures_in_a_row, was_ready_s)
                delay_s = restart_delay_s(self._failures_in_a_row)
                self._say(f"{self.spec.name}: {self._detail}; starting it again in {delay_s:g} s")
                self._move(ProcessState.BACKING_OFF, self._detail)
                await self._unless_stopping(asyncio.sleep(delay_s))
        finally:
            if self._state is not ProcessState.DONE:
                self._move(ProcessState.STOPPED, self._detail)
            self._ended.set()

    async def stop(self) -> None:
        """Signal it, wait for its end up to its deadline, then kill its process group. Returns when it is gone."""
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            await self._terminate(self._process)
        await self._ended.wait()

    def kill(self) -> None:
        """SIGKILL for the whole process group, now."""
        process = self._process
        if process is not None and process.returncode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # gone already

    async def _terminate(self, process: asyncio.subprocess.Process) -> None:
        self._move(ProcessState.STOPPING)
        try:
            process.send_signal(self.spec.stop_signal)
        except ProcessLookupError:
            pass  # it died just now
        try:
            async with asyncio.timeout(self.spec.stop_deadline_s):
                await process.wait()
        except TimeoutError:
            self._say(
                f"{self.spec.name}: still there {self.spec.stop_deadline_s:g} s after the signal; killing it"
            )
            self.kill()

    async def _run_once(self) -> float:
        """One life of the process, from preparation to exit. Returns for how long it had been ready, in seconds."""
        self._move(ProcessState.PREPARING, self._detail)
        try:
            if self.spec.prepare is not None:
                await asyncio.to_thread(self.spec.prepare)
            if self._stopping.is_set():
                return 0.0
            process = await self._start()
        except SetupFailed as failure:
            self._detail = str(failure)
            return 0.0
        except OSError as error:
            self._detail = explain_os_error(error, step=f"starting {self.spec.name}")
            return 0.0
        if self._stopping.is_set():  # `stop` came while it was being started, and found nothing to signal
            await self._terminate(process)
        ready_at_s: float | None = None
        exited = asyncio.ensure_future(process.wait())
        try:
            if not self.spec.one_shot and await self._wait_until_ready(exited):
                ready_at_s = time.monotonic()
                await self._watch(exited)
            await exited
        finally:
            exited.cancel()
        return self._after_exit(process.returncode or 0, ready_at_s)

    async def _start(self) -> asyncio.subprocess.Process:
        """The process writes its log itself, so that it goes on if the supervisor is killed."""
        with open(self._log_file, "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                env=self._env,
                cwd=ROOT,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._starts += 1
        self._move(ProcessState.STARTING)
        return self._process

    async def _wait_until_ready(self, exited: asyncio.Future[int]) -> bool:
        """False if it ended first, is being stopped, or took too long (then it is killed)."""
        started_s = time.monotonic()
        reason: str | None = None
        while not exited.done() and not self._stopping.is_set():
            reason = await self.spec.ready() if self.spec.ready is not None else None
            if reason is None and not exited.done():
                self._move_up(ProcessState.READY)
                return True
            if time.monotonic() - started_s > self.spec.ready_timeout_s:
                self._say(
                    f"{self.spec.name}: not ready after {self.spec.ready_timeout_s:g} s ({reason}); killing it"
                )
                self.kill()
                return False
            if reason != self._detail:
                self._move(ProcessState.STARTING, reason or "")
            await asyncio.wait({exited}, timeout=STARTING_PROBE_EVERY_S)
        return False

    async def _watch(self, exited: asyncio.Future[int]) -> None:
        """Ask again from time to time, to show it; only its end has consequences."""
        while not (await asyncio.wait({exited}, timeout=READY_PROBE_EVERY_S))[0]:
            if self._stopping.is_set() or self.spec.ready is None:
                continue
            reason = await self.spec.ready()
            state = ProcessState.READY if reason is None else ProcessState.UNREADY
            if not self._stopping.is_set() and (state, reason or "") != (self._state, self._detail):
                self._move(state, reason or "")

    def _after_exit(self, return_code: int, ready_at_s: float | None) -> float:
        self.is_up.clear()
        if self._stopping.is_set():
            self._detail = ""
        elif self.spec.one_shot and return_code == 0:
            self._move_up(ProcessState.DONE)
        else:
            words = exit_words(return_code)
            last_line = last_line_of(self._log_file)
            self._detail = f"ended ({words})" + (f": {last_line}" if return_code > 0 and last_line else "")
        return 0.0 if ready_at_s is None else time.monotonic() - ready_at_s

    async def _unless_stopping(self, waited_for: Coroutine[Any, Any, object]) -> None:
        """Wait for it, but no longer than until `stop`."""
        task = asyncio.ensure_future(waited_for)
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
            stopping.cancel()

    def _move_up(self, state: ProcessState) -> None:
        self._ever_ready = True
        self.is_up.set()
        self._move(state)

    def _move(self, state: ProcessState, detail: str = "") -> None:
        if state is not self._state:
            self._since_s = time.time()
        self._state, self._detail = state, detail
        self._on_change()


def last_line_of(path: Path, *, tail_bytes: int = 8192) -> str:
    """The last line with text in a log, cut to 300 characters; empty if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - tail_bytes))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
