"""An engine without a model: answers are counted tokens at a set pace. It measures everything around an engine.

Used by the measuring scripts and by tests of the path. Token i of any answer is `FIRST_TOKEN + i`, its text is `t<i> `, so that a client
can see whether each token arrived once and in order. The vector of an input is its token count and its first token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.worker.engine import Delta, ModelInfo, SequenceRequest, StepReport

FIRST_TOKEN = 1000


@dataclass(slots=True)
class _Answer:
    request: SequenceRequest
    next_index: int
    prefilled: bool = False


class StubEngine:
    """step_s: time that one step takes, whatever is in the batch; 0 answers as fast as steps can be taken. load_s: likewise
    of one load.
    """

    def __init__(self, step_s: float = 0.0, tokens_per_step: int = 1, load_s: float = 0.0) -> None:
        self._step_s, self._load_s = step_s, load_s
        self._tokens_per_step = tokens_per_step
        self._answers: dict[str, _Answer] = {}
        self._models: set[str] = set()
        self._bases: dict[str, str] = {}
        """Of loaded adapters."""
        self._lock = threading.Lock()

    @property
    def has_work(self) -> bool:
        return bool(self._answers)

    def load_model(self, handle: str, folder: Path) -> ModelInfo:
        with self._lock:
            if handle in self._models:
                raise ValueError(f"model {handle} is loaded already")
            self._models.add(handle)
        if self._load_s:
            time.sleep(self._load_s)
        return ModelInfo(handle, 1, 65536, 1 << 20, ())

    def load_image(self, handle: str, path: Path, key: str, *, ask_canary: bool) -> ModelInfo:
        return self.load_model(handle, path)

    def load_adapter(self, handle: str, base_handle: str, folder: Path) -> ModelInfo:
        with self._lock:
            if base_handle not in self._models:
                raise ValueError(f"model {base_handle} is not loaded")
            self._bases[handle] = base_handle
        return self.load_model(handle, folder)

    def forget_prefixes(self) -> None:
        """It keeps none."""

    def unload_model(self, handle: str, *, keep_prefixes: bool) -> None:
        if handle in self._bases.values():
            raise ValueError(f"model {handle} has adapters")
        if any(answer.request.model == handle for answer in self._answers.values()):
            raise ValueError(f"model {handle} has sequences")
        with self._lock:
            if handle not in self._models:
                raise ValueError(f"model {handle} is not loaded")
            self._models.remove(handle)
            self._bases.pop(handle, None)

    def add(self, request: SequenceRequest) -> None:
        self._answers[request.sequence_id] = _Answer(request, len(request.prior_tokens))

    def cancel(self, sequence_id: str) -> None:
        self._answers.pop(sequence_id, None)

    def step(self) -> StepReport:
        if self._step_s:
            time.sleep(self._step_s)
        deltas, prefilled, prompt_tokens = [], [], 0
        for sequence_id, answer in list(self._answers.items()):
            if not answer.prefilled:
                answer.prefilled = True
                prefilled.append(sequence_id)
                prompt_tokens += len(answer.request.prompt_tokens)
            deltas.append(self._advance(sequence_id, answer))
        return StepReport(deltas, prompt_tokens, sum(len(delta.tokens) for delta in deltas), prefilled)

    def _advance(self, sequence_id: str, answer: _Answer) -> Delta:
        start = answer.next_index
        end = min(start + self._tokens_per_step, answer.request.max_tokens)
        answer.next_index = end
        finished = end >= answer.request.max_tokens
        prompt = answer.request.prompt_tokens
        if finished:
            del self._answers[sequence_id]
        indices: Sequence[int] = range(start, end)
        return Delta(
            sequence_id=sequence_id,
            token_start=start,
            tokens=tuple(FIRST_TOKEN + index for index in indices),
            text="".join(f"t{index} " for index in indices),
            logprobs=(),
            finish_reason="length" if finished else None,
            embedding=(float(len(prompt)), float(prompt[0])) if answer.request.pooling else (),
        )
