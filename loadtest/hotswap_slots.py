"""What a worker answers while more and more models share its memory: it may get slower, but in no sudden fall."""

from __future__ import annotations

import asyncio
import itertools
import random
import time

from loadtest.hotswap_sides import MAX_BATCH
from loadtest.hotswap_traffic import ANSWER_TOKENS, PROMPT_TOKENS
from loadtest.hotswap_worker import WorkerSide
from loadtest.report import Row

MOST_MODELS = 8
WINDOW_S, SETTLE_S = 5.0, 2.0
LONG_PATIENCE_S = 120.0
LEAST_OF_THE_STEP_BEFORE = 0.6
"""One model more costs a part of the speed, not half of it."""


async def measure_slots(worker: WorkerSide, slots: int, window_s: float | None = None) -> list[Row]:
    """As many requests as a batch holds are always waited for, spread evenly over 1, 2, ... 8 models."""
    rows: list[Row] = []
    before: float | None = None
    for models in range(1, MOST_MODELS + 1):
        rate = await _token_rate(worker, models, WINDOW_S if window_s is None else window_s)
        rows.append(
            Row(
                f"{models} {'model' if models == 1 else 'models'} in turn, memory for {slots} | one less",
                "tokens/s",
                rate,
                before,
                None if before is None else rate / before,
                None if before is None else LEAST_OF_THE_STEP_BEFORE,
            )
        )
        before = rate
    return rows


async def _token_rate(worker: WorkerSide, models: int, window_s: float) -> float:
    """Tokens of the answers that ended within the window, a second. It begins when the change to this number has settled."""
    rng, numbers, ended = random.Random(models), itertools.count(), [(0.0, 0)]
    begin_s = time.perf_counter() + SETTLE_S
    end_s = begin_s + window_s

    async def client() -> None:
        while time.perf_counter() < end_s:
            ref = worker.tunes.models[next(numbers) % models].ref
            prompt = [rng.randrange(3, worker.tunes.vocab_size) for _ in range(rng.randint(*PROMPT_TOKENS))]
            tokens = rng.randint(*ANSWER_TOKENS)
            end, _ = await worker.answer(ref, prompt, tokens, patience_s=LONG_PATIENCE_S)
            if end.outcome != "succeeded":
                raise RuntimeError(f"{end.outcome}: {end.error_code}")
            ended.append((time.perf_counter(), tokens))

    async with asyncio.TaskGroup() as group:
        for _ in range(MAX_BATCH):
            group.create_task(client())
    return sum(tokens for at_s, tokens in ended if begin_s <= at_s < end_s) / window_s
