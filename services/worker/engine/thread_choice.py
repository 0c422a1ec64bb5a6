"""How many threads compute on a CPU: what there is to choose from, and a first measurement, where nobody said it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch

from .kv_cache import KVPool
from .native.decoder import NativeDecoder
from .packing import PackedTokens, Span
from .thread_tuner import choose_threads

# Pairs of passes for each number: some 50 ms in all for a small model. A large one is measured less often, not for longer.
_ROUNDS = 7
_MOST_SECONDS = 3.0
_MOST_THREADS = 64


def measure_threads(decoder: NativeDecoder, counts: Sequence[int]) -> int:
    """Decodes one token again and again, by each number of threads in turn, in a pool of its own."""
    if len(counts) == 1:
        return counts[0]
    pool = KVPool(decoder.spec.kv_shape, 1, decoder.kv_dtype, torch.device("cpu"))
    batch = PackedTokens([0], [Span((1,), 0, 1)])
    taken: dict[int, list[float]] = {count: [] for count in counts}
    stop_at = perf_counter() + _MOST_SECONDS
    with torch.inference_mode():
        for round_ in range(_ROUNDS):
            if round_ and perf_counter() > stop_at:
                break
            for count in counts:
                decoder.threads = count
                decoder.forward(batch, pool)  # wakes the threads, as the step before would have
                begin = perf_counter()
                decoder.forward(batch, pool)
                taken[count].append(perf_counter() - begin)
    return choose_threads({count: statistics.median(each) for count, each in taken.items()})


def available_cores() -> int:
    """Cores that this process may run on, and no more than its container's quota of time is worth."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii")
    except OSError:
        return cores
    return cores_within(quota, cores)


def cores_within(quota: str, cores: int) -> int:
    """quota: `cpu.max` of cgroup v2, microseconds for each period, or "max". Rounded up; at least one core."""
    allowed, _, period = quota.strip().partition(" ")
    if not (allowed.isdigit() and period.isdigit() and int(period)):
        return cores
    return max(1, min(cores, -(-int(allowed) // int(period))))


def candidate_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and the number of cores itself."""
    cores = min(cores, _MOST_THREADS)
    return sorted({1 << power for power in range(cores.bit_length())} | {cores})
