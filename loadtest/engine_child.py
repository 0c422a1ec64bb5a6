"""The process of one side of `loadtest.engine`: see `child_process`.

Started by `engine_sides.Side` with one argument, the side's `SideSpec` as JSON. Its first line says that the model is ready.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from loadtest.child_process import Answer, serve_parent
from loadtest.engine_sides import SideSpec
from loadtest.engine_workloads import Request


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


def _make(argument: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    contender, first_token_s = make_contender(SideSpec(**argument))
    return {"first_token_s": first_token_s}, lambda question: answer(contender, question)


if __name__ == "__main__":
    serve_parent(_make)
