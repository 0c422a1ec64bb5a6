"""Pure: what the levels of a benchmark come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_CONCURRENT = 256
"""Each is a thread of the command."""


@dataclass(frozen=True, slots=True)
class Level:
    """So many requests at once, from the first one's start to the last one's end."""

    concurrency: int
    elapsed_s: float
    latencies_ms: Sequence[float]


def read_levels(text: str) -> list[int]:
    """Return the numbers of a list such as "1,2,4". Raises `ValueError` for anything else, and for too many."""
    levels = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if not levels or len(levels) != len(text.split(",")) or sorted(set(levels)) != levels:
        raise ValueError("concurrency must be rising numbers such as 1,2,4,8")
    if levels[0] < 1 or levels[-1] > MOST_CONCURRENT:
        raise ValueError(f"concurrency must be from 1 to {MOST_CONCURRENT}")
    return levels


def percentile_ms(latencies_ms: Sequence[float], percent: int) -> float:
    """Return the latency at rank ceil(percent * count): of a request that there was."""
    return sorted(latencies_ms)[math.ceil(len(latencies_ms) * percent / 100) - 1]


def level_json(level: Level, gpus: int | None) -> dict[str, Any]:
    """gpus: how many were live meanwhile; None if nobody knows (shared GPUs), and then nothing is told of one."""
    rpm = len(level.latencies_ms) * 60 / level.elapsed_s
    return {
        "concurrency": level.concurrency,
        "requests": len(level.latencies_ms),
        "latency_ms": {f"p{each}": round(percentile_ms(level.latencies_ms, each), 1) for each in (50, 95)},
        "requests_per_minute": round(rpm, 1),
        "requests_per_minute_per_gpu": None if gpus is None else round(rpm / gpus, 1),
    }


def best_rpm_per_gpu(levels: Sequence[dict[str, Any]]) -> float | None:
    """Return what one GPU does at the level at which it does most."""
    known = [each["requests_per_minute_per_gpu"] for each in levels]
    return max((each for each in known if each is not None), default=None)
