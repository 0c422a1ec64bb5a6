"""Both sides of `loadtest.engine` as processes of their own, which live from their first use to their last.

Only the side whose turn it is may run: the others are stopped (SIGSTOP), so that no waiting thread of theirs takes part.
What a side is asked and answers is one line of JSON each; what it and its libraries print goes to a log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from infra.local.layout import ROOT
from loadtest.engine_workloads import Request

Kind = Literal["ours", "huggingface", "continuous", "llamacpp"]

READY_TIMEOUT_S = 300.0
REPLY_TIMEOUT_S = 900.0
SHOWN_LOG_BYTES = 2000


@dataclass(frozen=True, slots=True)
class SideSpec:
    """model: a model folder, or for llama.cpp a GGUF file. parallel: for llama.cpp, how many sequences it makes room for."""

    kind: Kind
    model: str
    precision: str
    threads: int
    parallel: int = 1


@dataclass(frozen=True, slots=True)
class Timing:
    """seconds: from the first submission to the last end. decode_seconds: of requests that ran alone, without the time to
    the first token; 0 where several ran together."""

    seconds: float
    decode_seconds: float
    answers: list[list[int]]


class SideError(RuntimeError):
    """A side died, did not answer in time, or answered something else than it was asked."""


class Side:
    """One process; see `engine_child`. first_token_s: from the end of its imports to a model's first token."""

    def __init__(self, spec: SideSpec, environment: dict[str, str]) -> None:
        self.spec = spec
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.engine_child", json.dumps(dataclasses.asdict(spec))],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self.first_token_s = float(self._read(READY_TIMEOUT_S)["first_token_s"])
        except SideError:
            self.close()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def run(self, requests: Sequence[Request], groups: Sequence[Sequence[int]]) -> Timing:
        """Raises SideError, also when an answer has not the length that was asked for."""
        reply = self._ask(
            {
                "do": "run",
                "requests": [[request.prompt, request.answer_tokens] for request in requests],
                "groups": groups,
            }
        )
        timing = Timing(reply["seconds"], reply["decode_seconds"], reply["answers"])
        for group in groups:
            for index in group:
                got, wanted = len(timing.answers[index]), requests[index].answer_tokens
                if got != wanted:
                    raise SideError(f"{self.spec}: request {index} got {got} tokens instead of {wanted}")
        return timing

    def score(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural logprobs of each window's tokens after its first."""
        logprobs: list[list[float]] = self._ask({"do": "score", "windows": windows})["logprobs"]
        if [len(each) + 1 for each in logprobs] != [len(window) for window in windows]:
            raise SideError(f"{self.spec}: not every token was scored")
        return logprobs

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._process.send_signal(signal.SIGCONT)
        try:
            pipe: IO[bytes] | None = self._process.stdin
            assert pipe is not None
            pipe.write(json.dumps(question).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError as error:
            raise self._failure("died") from error
        reply = self._read(REPLY_TIMEOUT_S)
        self._process.send_signal(signal.SIGSTOP)
        return reply

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
        return SideError(f"{self.spec} {what}; its last words:\n{said}")


class Sides:
    """Those that are alive. A side is started when it is first asked for."""

    def __init__(self, packages: Path) -> None:
        """packages: a folder of further Python packages for llama.cpp's side."""
        self._packages = packages
        self._alive: dict[SideSpec, Side] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep_only(())

    def get(self, spec: SideSpec) -> Side:
        if spec not in self._alive:
            self._alive[spec] = self.start(spec)
        return self._alive[spec]

    def start(self, spec: SideSpec) -> Side:
        """One more process, not kept here: whoever asks for it closes it."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads), "HF_HUB_OFFLINE": "1"}
        if spec.kind == "llamacpp":
            environment["PYTHONPATH"] = str(self._packages)
        return Side(spec, environment)

    def keep_only(self, wanted: Sequence[SideSpec]) -> None:
        """Ends the others: what they hold in memory is the next one's."""
        for spec in [spec for spec in self._alive if spec not in wanted]:
            self._alive.pop(spec).close()
