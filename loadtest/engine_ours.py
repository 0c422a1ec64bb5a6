"""Our engine as a side of `loadtest.engine`, by its public calls only. Runs in a child process."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from loadtest.engine_sides import SideSpec
from loadtest.engine_workloads import Request
from services.worker.engine import Engine, EngineConfig, Sampling, SequenceRequest

MAX_BATCH = 16
CONTEXT_TOKENS = 1024


class Ours:
    def __init__(self, spec: SideSpec) -> None:
        self._engine = Engine(
            EngineConfig(
                precision=spec.precision,
                threads=spec.threads,
                max_batch=MAX_BATCH,
                max_context_tokens=CONTEXT_TOKENS,
                kv_tokens=MAX_BATCH * CONTEXT_TOKENS,
            )
        )
        self._engine.load_model("model", Path(spec.model))
        self._ids = itertools.count()

    def run(
        self, requests: list[Request], groups: list[list[int]]
    ) -> tuple[float, float, dict[int, list[int]]]:
        answers: dict[int, list[int]] = {}
        decode_s = 0.0
        started_s = time.perf_counter()
        for group in groups:
            names = {str(next(self._ids)): index for index in group}
            for name, index in names.items():
                self._engine.add(_sequence(name, requests[index].prompt, requests[index].answer_tokens))
            first_s = 0.0
            while self._engine.has_work:
                deltas = self._engine.step().deltas
                for delta in deltas:
                    if delta.error is not None:
                        raise RuntimeError(delta.error)
                    answers.setdefault(names[delta.sequence_id], []).extend(delta.tokens)
                if deltas and not first_s:
                    first_s = time.perf_counter()
            if len(group) == 1:
                decode_s += time.perf_counter() - first_s
        return time.perf_counter() - started_s, decode_s, answers

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        scores = []
        for window in windows:
            self._engine.add(_sequence(str(next(self._ids)), window, 1, echo_logprobs=True))
            logprobs: list[float] = []
            while self._engine.has_work:
                for delta in self._engine.step().deltas:
                    if delta.error is not None:
                        raise RuntimeError(delta.error)
                    logprobs += [each.logprob for each in delta.prompt_logprobs]
            scores.append(logprobs)
        return scores


def _sequence(
    name: str, prompt: list[int] | tuple[int, ...], max_tokens: int, *, echo_logprobs: bool = False
) -> SequenceRequest:
    return SequenceRequest(
        sequence_id=name,
        model="model",
        isolation_key="loadtest",
        prompt_tokens=prompt,
        max_tokens=max_tokens,
        sampling=Sampling(temperature=0.0, ignore_eos=True),
        echo_logprobs=echo_logprobs,
    )
