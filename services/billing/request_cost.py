"""Pure: what each request cost on GPUs that are paid by the minute, and what their idle time cost.

This shares out what was posted, and charges nothing. Times are integer Unix microseconds UTC; amounts are integers in
nano-USD, and the parts of an hour sum exactly to what the hour cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.billing.instants import HOUR_US, MINUTE_US
from services.billing.minutes import LiveInterval

MINUTES = 60


@dataclass(frozen=True, slots=True)
class GpuWork:
    """A request had the GPU of `worker_id` from `started_us` to `ended_us`: swap, prefill and decode."""

    job_id: str
    worker_id: str
    started_us: int
    ended_us: int


@dataclass(frozen=True, slots=True)
class HourShares:
    """How the cost of one resource and hour falls to its requests. `shares` holds every request that ran in it."""

    cost_nanousd: int
    idle_nanousd: int
    shares: Mapping[str, int]
    gpu_us: Mapping[str, int]


def share_hour(
    cost_nanousd: int, hour_us: int, live: Iterable[LiveInterval], work: Sequence[GpuWork]
) -> HourShares:
    """Share out what a resource cost in the hour that begins at `hour_us`.

    1. The hour's cost falls to its sixty minutes by the live seconds of all places in each.
    2. A minute's cost is first parted between busy and idle: busy is the time in which a worker ran any request (on
       one worker requests that run side by side count once), idle the rest of the live time.
    3. The busy part falls to the requests by their own GPU time in that minute: two that ran side by side share it.
    4. Time outside of what is live costs nothing. Without any live time all of the cost is idle.
    5. Every division is by largest remainder: the parts are integers and sum to the whole.
    """
    by_place: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for interval in live:
        by_place[interval.place].append((interval.started_us, interval.proved_us))
    places = [_union(spans) for spans in by_place.values()]
    by_worker: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for each in work:
        by_worker[each.worker_id].append((each.started_us, each.ended_us))
    live_us = _in_minutes((span for spans in places for span in spans), hour_us)
    busy_us = _in_minutes((span for spans in by_worker.values() for span in _union(spans)), hour_us)
    per_job: list[dict[str, int]] = [defaultdict(int) for _ in range(MINUTES)]
    for each in work:
        for minute, us in enumerate(_in_minutes([(each.started_us, each.ended_us)], hour_us)):
            if us:
                per_job[minute][each.job_id] += us
    shares: dict[str, int] = defaultdict(int)
    gpu_us: dict[str, int] = defaultdict(int)
    idle = cost_nanousd
    for minute, minute_cost in enumerate(split(cost_nanousd, live_us)):
        ran = dict(sorted(per_job[minute].items()))  # one order, whatever the order of the records
        parts = _share_minute(minute_cost, live_us[minute], busy_us[minute], ran)
        for job_id, part in zip(ran, parts, strict=True):
            shares[job_id] += part
            gpu_us[job_id] += ran[job_id]
            idle -= part
    return HourShares(cost_nanousd, idle, dict(shares), dict(gpu_us))


def _share_minute(cost_nanousd: int, live_us: int, busy_us: int, ran: Mapping[str, int]) -> list[int]:
    """What each request of a minute bears; the rest is idle (rules 2 and 3 as one division)."""
    total_us = sum(ran.values())
    busy_us = min(busy_us, live_us)
    idle_weight = (live_us - busy_us) * total_us
    *parts, _ = split(cost_nanousd, [*(busy_us * us for us in ran.values()), idle_weight])
    return parts


def split(amount: int, weights: Sequence[int]) -> list[int]:
    """Integers in proportion to the weights that sum to `amount`, by largest remainder; ties go to the earlier one.

    amount and weights are not negative. Weights that are all zero get nothing: then the sum is 0.
    """
    total = sum(weights)
    if total == 0:
        return [0] * len(weights)
    parts = [amount * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(amount * weights[i] % total), i))
    for index in by_remainder[: amount - sum(parts)]:
        parts[index] += 1
    return parts


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same time as disjoint spans, in order."""
    merged: list[tuple[int, int]] = []
    for start_us, end_us in sorted(spans):
        if merged and start_us <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_us))
        elif end_us > start_us:
            merged.append((start_us, end_us))
    return merged


def _in_minutes(spans: Iterable[tuple[int, int]], hour_us: int) -> list[int]:
    """How much of the spans lies in each minute of the hour."""
    inside = [0] * MINUTES
    for start_us, end_us in spans:
        start_us, end_us = max(start_us, hour_us), min(end_us, hour_us + HOUR_US)
        while start_us < end_us:
            minute = (start_us - hour_us) // MINUTE_US
            border_us = min(end_us, hour_us + (minute + 1) * MINUTE_US)
            inside[minute] += border_us - start_us
            start_us = border_us
    return inside
