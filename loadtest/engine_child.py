"""The process of one side of `loadtest.engine`: reads questions from its standard input, answers on its standard output.

Started by `engine_sides.Side` with one argument, the side's `SideSpec` as JSON. Its first line says that the model is ready.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any, Protocol

from loadtest.engine_sides import SideSpec
from loadtest.engine_workloads import Request

_PR_SET_PDEATHSIG = 1


class Contender(Protocol):
    """A model that is ready. Times are `time.perf_counter()` seconds."""

    def run(
        self, requests: list[Request], groups: list[list[int]]
    ) -> tuple[float, float, dict[int, list[int]]]:
        """Greedy answers of exact length, by the requests' indices; with the seconds and, for groups of one request,
        those between its first and its last token."""
        ...

    def score(self, windows: list[list[int]]) -> list[list[float]]: ...


def make_contender(spec: SideSpec) -> tuple[Contender, float]:
    """Imports first, then the clock: also returns the seconds from there to the model's first token, if it makes one."""
    if spec.kind == "ours":
        from loadtest.engine_ours import Ours

        started_s = time.perf_counter()
        ours = Ours(spec)
        ours.run([Request(tuple(range(16)), 1)], [[0]])
        return ours, time.perf_counter() - started_s
    if spec.kind == "llamacpp":
        from loadtest.engine_llamacpp import LlamaCpp

        return LlamaCpp(spec), 0.0
    from loadtest.engine_huggingface import ContinuousBatching, StaticBatches

    return (StaticBatches(spec) if spec.kind == "huggingface" else ContinuousBatching(spec)), 0.0


def answer(contender: Contender, question: dict[str, Any]) -> dict[str, Any]:
    if question["do"] == "score":
        return {"logprobs": contender.score(question["windows"])}
    requests = [Request(tuple(prompt), answer_tokens) for prompt, answer_tokens in question["requests"]]
    seconds, decode_seconds, answers = contender.run(requests, question["groups"])
    return {
        "seconds": seconds,
        "decode_seconds": decode_seconds,
        "answers": [answers.get(index, []) for index in range(len(requests))],
    }


def main() -> None:
    # A stopped process notices no closed pipe: it has to go with its parent.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries may print what they like: the answers have a descriptor of their own.
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        contender, first_token_s = make_contender(SideSpec(**json.loads(sys.argv[1])))
        print(json.dumps({"first_token_s": first_token_s}), file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(contender, json.loads(line))), file=replies, flush=True)
    # What a library's threads still do must not keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
