"""Who asks which model when, and what counts as served. Pure: the same trace for the same arguments."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ZIPF_EXPONENT = 1.1
PROMPT_TOKENS = (16, 64)
ANSWER_TOKENS = (16, 48)
PATIENCE_S = 10.0
"""An answer that is whole within this time of its arrival counts. What waits longer unbegun is given up by every side."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """at_s: since the trace's begin. model: its number, 0 is the most popular."""

    at_s: float
    model: int
    prompt: tuple[int, ...]
    answer_tokens: int


def make_trace(rate_per_s: float, seconds: float, models: int, vocab_size: int, seed: int) -> list[Arrival]:
    """Poisson arrivals that wait for nobody; models by Zipf's law; no prompt begins as another does."""
    rng = random.Random(f"{seed} {rate_per_s}")
    weights = [1 / rank**ZIPF_EXPONENT for rank in range(1, models + 1)]
    trace = []
    at_s = rng.expovariate(rate_per_s)
    while at_s < seconds:
        prompt = tuple(rng.randrange(3, vocab_size) for _ in range(rng.randint(*PROMPT_TOKENS)))
        [model] = rng.choices(range(models), weights)
        trace.append(Arrival(at_s, model, prompt, rng.randint(*ANSWER_TOKENS)))
        at_s += rng.expovariate(rate_per_s)
    return trace


def goodput(latencies_s: Sequence[float | None], seconds: float) -> float:
    """Requests answered in time, each second of the trace. None: never answered."""
    return sum(latency is not None and latency <= PATIENCE_S for latency in latencies_s) / seconds


def is_past_its_best(curve: Mapping[float, float]) -> bool:
    """curve: goodput by rate. True once it was below its best at the two highest rates."""
    values = [curve[rate] for rate in sorted(curve)]
    return len(values) >= 3 and max(values[-2:]) < max(values[:-2])


def best_rate(curve: Mapping[float, float]) -> float:
    return max(sorted(curve), key=lambda rate: curve[rate])
