"""Both sides of `loadtest.engine` as processes of their own, which live from their first use to their last.

Only the side whose turn it is may run: the others are stopped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from loadtest.child_process import Child, SideError
from loadtest.engine_workloads import Request

Kind = Literal["ours", "huggingface", "continuous", "llamacpp"]

READY_TIMEOUT_S = 300.0
REPLY_TIMEOUT_S = 900.0


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


class Side:
    """One process; see `engine_child`. first_token_s: from the end of its imports to a model's first token."""

    def __init__(self, spec: SideSpec, environment: dict[str, str]) -> None:
        self.spec = spec
        self._child = Child(
            "loadtest.engine_child",
            dataclasses.asdict(spec),
            str(spec),
            environment,
            ready_timeout_s=READY_TIMEOUT_S,
            reply_timeout_s=REPLY_TIMEOUT_S,
        )
        self.first_token_s = float(self._child.hello["first_token_s"])

    def run(self, requests: Sequence[Request], groups: Sequence[Sequence[int]]) -> Timing:
        """Raises SideError, also when an answer has not the length that was asked for."""
        reply = self._child.ask(
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
        logprobs: list[list[float]] = self._child.ask({"do": "score", "windows": windows})["logprobs"]
        if [len(each) + 1 for each in logprobs] != [len(window) for window in windows]:
            raise SideError(f"{self.spec}: not every token was scored")
        return logprobs

    def close(self) -> None:
        self._child.close()


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
