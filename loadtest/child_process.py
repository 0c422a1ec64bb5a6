"""A child process that is asked and answers by one line of JSON each; what it and its libraries print goes to a log.

It runs only while it is asked: between two questions it is stopped (SIGSTOP), so that no waiting thread of it takes part.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from infra.local.layout import ROOT

SHOWN_LOG_BYTES = 2000
_PR_SET_PDEATHSIG = 1

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class SideError(RuntimeError):
    """A side died, did not answer in time, or answered something else than it was asked."""


class Child:
    """hello: what the child said when it was ready."""

    def __init__(
        self,
        module: str,
        argument: Mapping[str, Any],
        label: str,
        environment: dict[str, str],
        *,
        ready_timeout_s: float,
        reply_timeout_s: float,
    ) -> None:
        """Raises SideError."""
        self._label, self._reply_timeout_s = label, reply_timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(argument)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self.hello = self._read(ready_timeout_s)
        except SideError:
            self.close()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Raises SideError."""
        self._process.send_signal(signal.SIGCONT)
        try:
            pipe: IO[bytes] | None = self._process.stdin
            assert pipe is not None
            pipe.write(json.dumps(question).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError as error:
            raise self._failure("died") from error
        reply = self._read(self._reply_timeout_s)
        self._process.send_signal(signal.SIGSTOP)
        return reply

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None
        deadline_s = time.monotonic() + timeout_s
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    raise self._failure(f"gave no answer within {timeout_s:.0f} s")
                piece = os.read(pipe.fileno(), 1 << 20)
                if not piece:
                    # Its pipe closes before it has said why.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(10)
                    raise self._failure("died")
                line += piece
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _failure(self, what: str) -> SideError:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - SHOWN_LOG_BYTES))
        said = self._log.read().decode(errors="replace").strip()
        return SideError(f"{self._label} {what}; its last words:\n{said}")


def serve_parent(make: Callable[[dict[str, Any]], tuple[dict[str, Any], Answer]]) -> None:
    """The child's side: `make` gets the argument and returns what to say when ready, and who answers. Does not return."""
    # A stopped process notices no closed pipe: it has to go with its parent.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries may print what they like: the answers have a descriptor of their own.
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        hello, answer = make(json.loads(sys.argv[1]))
        print(json.dumps(hello), file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=replies, flush=True)
    # What a library's threads still do must not keep the process.
    os._exit(0)
