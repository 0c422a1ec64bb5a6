"""transformers as a side of `loadtest.hotswap`: a model at a time, `from_pretrained` at each switch. Runs in a child process."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from loadtest.engine_huggingface import PAD_TOKEN
from loadtest.hotswap_sides import MAX_BATCH, ModelPaths
from loadtest.hotswap_traffic import PATIENCE_S, Arrival

_PROMPT = tuple(range(100, 116))


class TokenTimes(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing: notes when each token of a batch came, so that a short answer need not wait for a long one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.seconds.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class HuggingFace:
    def __init__(self, models: list[ModelPaths], threads: int) -> None:
        torch.set_num_threads(threads)
        self._models = models
        self._model: Any = None
        self._loaded: int | None = None
        self.first_token_s(0, in_full=True)  # what the library imports late

    def first_token_s(self, model: int, *, in_full: bool = False) -> float:
        self._let_go()
        started_s = time.perf_counter()
        if in_full:
            AutoTokenizer.from_pretrained(self._models[model].folder, local_files_only=True)
        self._load(model)
        self._generate([_PROMPT], 1)
        seconds = time.perf_counter() - started_s
        self._let_go()
        return seconds

    def replay(self, trace: list[Arrival], slots: int) -> list[float | None]:
        """One model at a time, whatever `slots`: what a script around the library does. Requests of one model that wait one
        behind the other go as one padded batch.
        """
        latencies: list[float | None] = [None] * len(trace)
        waiting: deque[int] = deque()
        self._load(0)
        started_s, coming = time.perf_counter(), 0
        while coming < len(trace) or waiting:
            now_s = time.perf_counter() - started_s
            while coming < len(trace) and trace[coming].at_s <= now_s:
                waiting.append(coming)
                coming += 1
            while waiting and now_s - trace[waiting[0]].at_s > PATIENCE_S:
                waiting.popleft()
            if not waiting:
                if coming < len(trace):
                    time.sleep(max(0.0, trace[coming].at_s - now_s))
                continue
            batch = _take_batch(waiting, trace)
            if self._loaded != trace[batch[0]].model:
                self._let_go()
                self._load(trace[batch[0]].model)
            most_tokens = max(trace[index].answer_tokens for index in batch)
            times = self._generate([trace[index].prompt for index in batch], most_tokens)
            for index in batch:
                answered_s = times[trace[index].answer_tokens - 1] - started_s
                latencies[index] = answered_s - trace[index].at_s
        self._let_go()
        return latencies

    def answer(self, model: int, prompt: list[int], tokens: int) -> list[int]:
        raise NotImplementedError("not asked of this side")

    def decode(self, seconds: float, *, beside_loads: bool, streams: int) -> tuple[float, int]:
        raise NotImplementedError("not asked of this side")

    def _load(self, model: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            self._models[model].folder, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=PAD_TOKEN)
        self._loaded = model

    def _let_go(self) -> None:
        self._model, self._loaded = None, None

    def _generate(self, prompts: list[tuple[int, ...]], tokens: int) -> list[float]:
        """When each token was there; no end-of-sequence token is set, so answers have the asked length."""
        width = max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]
        ids = torch.tensor(
            [[PAD_TOKEN] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        )
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        times = TokenTimes()
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                stopping_criteria=StoppingCriteriaList([times]),
            )
        if output.shape[1] - width != tokens or len(times.seconds) != tokens:
            raise RuntimeError(f"{output.shape[1] - width} tokens instead of {tokens}")
        return times.seconds


def _take_batch(waiting: deque[int], trace: list[Arrival]) -> list[int]:
    model = trace[waiting[0]].model
    batch: list[int] = []
    while waiting and trace[waiting[0]].model == model and len(batch) < MAX_BATCH:
        batch.append(waiting.popleft())
    return batch
