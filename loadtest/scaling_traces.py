"""Arrivals for the scaling simulator: an hour of two real services, and synthetic steps, ramps and storms."""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Callable
from pathlib import Path

from loadtest.scaling_simulation import Arrival

FOLDER = Path(__file__).parent / "data" / "azure-llm-2023"
HOUR_S = 3600.0


def azure(name: str) -> list[Arrival]:
    """`conv` or `code`; see the folder's README for what they are."""
    arrivals: list[Arrival] = []
    at_ms = 0
    with gzip.open(FOLDER / f"{name}.csv.gz", "rt", encoding="ascii") as file:
        for row in csv.DictReader(file):
            at_ms += int(row["wait_ms"])
            arrivals.append(Arrival(at_ms / 1000, int(row["prompt_tokens"]), int(row["completion_tokens"])))
    return arrivals


def steps(seed: int = 1) -> list[Arrival]:
    """Twenty quiet minutes, twenty busy ones, twenty quiet ones."""
    return _poisson(lambda at: 6.0 if 1200 <= at < 2400 else 1.0, 6.0, seed)


def ramp(seed: int = 2) -> list[Arrival]:
    """From 0.5 requests a second to 8 in half an hour, and back."""
    return _poisson(lambda at: 0.5 + 7.5 * (1 - abs(at - 1800) / 1800), 8.0, seed)


def storms(seed: int = 3) -> list[Arrival]:
    """Half a request a second, and every few minutes ten a second for half a minute to two minutes."""
    rng = random.Random(seed)
    bursts: list[tuple[float, float]] = []
    at = 60.0
    while at < HOUR_S:
        length = rng.uniform(30, 120)
        bursts.append((at, at + length))
        at += length + rng.uniform(60, 420)
    return _poisson(lambda at: 10.0 if any(b <= at < e for b, e in bursts) else 0.5, 10.0, seed)


def _poisson(rate: Callable[[float], float], highest: float, seed: int) -> list[Arrival]:
    """Arrivals at a rate that changes; sizes like a chat's (lognormal, 300 prompt and 150 completion tokens)."""
    rng = random.Random(seed)
    arrivals: list[Arrival] = []
    at = rng.expovariate(highest)
    while at < HOUR_S:
        if rng.random() < rate(at) / highest:
            prompt = min(max(int(rng.lognormvariate(5.7, 0.8)), 1), 8000)
            completion = min(max(int(rng.lognormvariate(5.0, 0.7)), 1), 1200)
            arrivals.append(Arrival(at, prompt, completion))
        at += rng.expovariate(highest)
    return arrivals


DRAWS = 1000
"""Apart from each other, so that no two loads of any draw come from one seed."""
TRACES: dict[str, Callable[[int], list[Arrival]]] = {
    "conv": lambda draw: azure("conv"),
    "code": lambda draw: azure("code"),
    "steps": lambda draw: steps(1 + DRAWS * draw),
    "ramp": lambda draw: ramp(2 + DRAWS * draw),
    "storms": lambda draw: storms(3 + DRAWS * draw),
}
"""By a draw: made-up arrivals differ with it, at the same rates and of the same sizes; those of real services do not."""
