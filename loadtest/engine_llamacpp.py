"""llama.cpp, as the PyPI wheel `xllamacpp` carries it, as a side of `loadtest.engine`. Runs in a child process.

Its server without HTTP: requests go in as token ids, one thread for each that runs at once.
"""

from __future__ import annotations

import importlib
import threading
import time
from typing import Any

from loadtest.engine_sides import SideSpec
from loadtest.engine_workloads import Request

CONTEXT_TOKENS = 512


class LlamaCpp:
    def __init__(self, spec: SideSpec) -> None:
        library = importlib.import_module("xllamacpp")
        parameters = library.CommonParams()
        parameters.model.path = spec.model
        parameters.n_parallel = spec.parallel
        parameters.n_ctx = CONTEXT_TOKENS * spec.parallel
        parameters.cpuparams.n_threads = spec.threads
        parameters.cpuparams_batch.n_threads = spec.threads
        parameters.warmup = True
        self._server = library.Server(parameters)

    def run(
        self, requests: list[Request], groups: list[list[int]]
    ) -> tuple[float, float, dict[int, list[int]]]:
        """The answers are counted by the server; their tokens are not told, so each stands as that many zeros."""
        answers: dict[int, list[int]] = {}
        decode_s = 0.0
        started_s = time.perf_counter()
        for group in groups:
            if len(group) == 1:
                index = group[0]
                first_s, count = self._complete(requests[index], stream=True)
                answers[index] = [0] * count
                decode_s += time.perf_counter() - first_s
            else:
                self._complete_together(requests, group, answers)
        return time.perf_counter() - started_s, decode_s, answers

    def _complete_together(
        self, requests: list[Request], group: list[int], answers: dict[int, list[int]]
    ) -> None:
        def one(index: int) -> None:
            answers[index] = [0] * self._complete(requests[index], stream=False)[1]

        threads = [threading.Thread(target=one, args=(index,)) for index in group]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _complete(self, request: Request, *, stream: bool) -> tuple[float, int]:
        """When its first piece came, and how many tokens the answer has."""
        body = {
            "prompt": list(request.prompt),
            "n_predict": request.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": stream,
        }
        first_s, last = 0.0, {}

        def on_piece(piece: Any) -> bool:
            nonlocal first_s, last
            first_s = first_s or time.perf_counter()
            last = piece
            return False

        self._server.handle_completions(body, on_piece)
        if "usage" not in last:
            raise RuntimeError(f"llama.cpp: {last}")
        return first_s, int(last["usage"]["completion_tokens"])

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError("its quality is not measured here")
