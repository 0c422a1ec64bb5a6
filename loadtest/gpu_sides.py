"""The sides of `loadtest.gpu_engine`: each answers requests of exact lengths, greedily, and says how long it took."""

from __future__ import annotations

import gc
import inspect
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.worker.engine import Engine, Sampling, SequenceRequest

# No end-of-sequence token exists in these models; lengths are exact.
GREEDY = Sampling(temperature=0.0, ignore_eos=True)
_PROBE_STEPS = 12
_POLL_S = 5.0
_PAGE_TOKENS, _BATCH_TOKENS = 32, 2048

# Requests are told apart, and prompts begin with them, so that no side finds a prefix of an earlier run.
_runs = itertools.count()


@dataclass(frozen=True, slots=True)
class Request:
    """The answer runs to exactly `answer_tokens`."""

    prompt: tuple[int, ...]
    answer_tokens: int


def make_requests(lengths: Sequence[tuple[int, int]], vocab_size: int) -> list[Request]:
    """lengths: (prompt, answer) tokens. Every call makes new prompts."""
    generator = torch.Generator().manual_seed(next(_runs))
    return [
        Request(tuple(torch.randint(10, vocab_size, (prompt,), generator=generator).tolist()), answer)
        for prompt, answer in lengths
    ]


def output_tokens(requests: Sequence[Request]) -> int:
    return sum(request.answer_tokens for request in requests)


class OurEngine:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, requests: Sequence[Request]) -> float:
        """Seconds from the first request's arrival to the last token's."""
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        self.enqueue(requests)
        tokens = self.finish()
        taken_s = time.perf_counter() - started_s
        if tokens != output_tokens(requests):
            raise RuntimeError(f"{tokens} tokens instead of {output_tokens(requests)}")
        return taken_s

    def enqueue(self, requests: Sequence[Request]) -> None:
        run = next(_runs)
        for index, request in enumerate(requests):
            self._engine.add(
                SequenceRequest(
                    sequence_id=f"{run}-{index}",
                    model="m",
                    isolation_key=str(run),
                    prompt_tokens=request.prompt,
                    max_tokens=request.answer_tokens,
                    sampling=GREEDY,
                )
            )

    def finish(self) -> int:
        """Steps until nothing is left; how many tokens came."""
        tokens = 0
        while self._engine.has_work:
            for delta in self._engine.step().deltas:
                if delta.error is not None:
                    raise RuntimeError(delta.error)
                tokens += len(delta.tokens)
        return tokens


class StaticBatches:
    """`generate` on batches in order of arrival, padded on the left, each until its longest answer ends."""

    def __init__(self, module: Any, device: torch.device, batch: int) -> None:
        self._module, self._device, self.batch = module, device, batch

    def run(self, requests: Sequence[Request]) -> float:
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        for first in range(0, len(requests), self.batch):
            self._generate(requests[first : first + self.batch])
        torch.cuda.synchronize()
        return time.perf_counter() - started_s

    def _generate(self, batch: Sequence[Request]) -> None:
        width = max(len(request.prompt) for request in batch)
        prompts = torch.zeros((len(batch), width), dtype=torch.long)
        mask = torch.zeros_like(prompts)
        for row, request in enumerate(batch):
            prompts[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        longest = max(request.answer_tokens for request in batch)
        with torch.inference_mode():
            output = self._module.generate(
                prompts.to(self._device), attention_mask=mask.to(self._device), max_new_tokens=longest
            )
        if output.shape[1] != width + longest:
            raise RuntimeError(f"generate made {output.shape[1] - width} tokens instead of {longest}")


def best_static_batch(
    module: Any, device: torch.device, lengths: Sequence[tuple[int, int]], vocab_size: int, deadline_s: float
) -> int:
    """The batch whose decoding gives most tokens per second, by a few steps on full prompts, if a whole batch fits."""
    longest = max(prompt + answer for prompt, answer in lengths)
    best, best_rate = 1, 0.0
    for batch in (16, 32, 64, 128, 256):
        if batch > len(lengths) or time.monotonic() > deadline_s:
            break
        try:
            # Once at the longest a batch may grow, for its memory; then as long as the middle of an answer.
            side = StaticBatches(module, device, batch)
            side.run(make_requests([(longest - 1, 2)] * batch, vocab_size))
            few, more = (
                side.run(make_requests([(longest // 2, steps)] * batch, vocab_size))
                for steps in (2, _PROBE_STEPS)
            )
        except torch.OutOfMemoryError:
            break
        finally:
            release_memory()
        rate = batch * (_PROBE_STEPS - 2) / max(more - few, 1e-6)
        if rate > best_rate:
            best, best_rate = batch, rate
    return best


class ContinuousBatching:
    """transformers' own continuous batching, its manager kept from run to run."""

    def __init__(self, module: Any, kv_tokens: int, batch: int) -> None:
        from transformers.generation import ContinuousBatchingConfig, GenerationConfig

        wanted = {
            "page_size": _PAGE_TOKENS,
            "block_size": _PAGE_TOKENS,
            "num_blocks": max(1, kv_tokens // _PAGE_TOKENS),
            "max_batch_tokens": _BATCH_TOKENS,
            "max_requests_per_batch": batch,
            "allow_block_sharing": False,
        }
        known = inspect.signature(ContinuousBatchingConfig).parameters
        if "page_size" in known:
            del wanted["block_size"]  # its older name
        config = ContinuousBatchingConfig(**{name: value for name, value in wanted.items() if name in known})
        generation = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1)
        self._manager = module.init_continuous_batching(
            generation_config=generation, continuous_batching_config=config
        )
        self._manager.start()

    def run(self, requests: Sequence[Request]) -> float:
        run = next(_runs)
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        waiting = set()
        for index, request in enumerate(requests):
            name = f"{run}-{index}"
            waiting.add(name)
            self._manager.add_request(
                list(request.prompt), request_id=name, max_new_tokens=request.answer_tokens
            )
        while waiting:
            result = self._manager.get_result(timeout=_POLL_S)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("continuous batching stopped")
            elif result.error is not None:
                raise RuntimeError(result.error)
            elif result.is_finished():
                waiting.discard(result.request_id)
        return time.perf_counter() - started_s

    def stop(self) -> None:
        self._manager.stop(block=True)


def release_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
