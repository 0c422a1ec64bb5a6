"""Rules of scaling for the simulator: ours, by the scheduler's own code, and those it is measured against.

KEDA: the queue's length (ready and unacked), polled every 30 s, over a target; Kubernetes' autoscaler takes the highest of
the last 300 s before it goes down. Ray Serve: ongoing requests (waiting and running), a mean over 30 s, over a target
for each replica; up after 30 s of the same wish, down after 600 s. Both are given the bounds that we have.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from loadtest.scaling_simulation import World
from services.scheduler.load_meter import LoadMeter
from services.scheduler.scaling_policy import ScalingMemory, Supply, Tuning, crowd_terms, decide_count


@dataclass(frozen=True, slots=True)
class _Report:
    """What the meter reads of a worker's report. The model's work is in completion tokens' worth already."""

    completion_tokens: int
    stream_s: float
    left_jobs: int
    held_jobs: int
    running_sequences: int
    prompt_tokens: int = 0
    waiting_jobs: int = 0
    remaining_tokens: int = 0
    batch_held_jobs: int = 0
    batch_waiting_jobs: int = 0
    batch_sequences: int = 0
    batch_left_jobs: int = 0


class Ours:
    """What the scheduler does each second, on the reports that workers would have sent."""

    every_s = 1.0

    def __init__(
        self, bounds: tuple[int, int], tuning: Tuning, wait_s: float = 10.0, idle_timeout_s: float = 600.0
    ) -> None:
        self._bounds = bounds
        self._wait_s = wait_s
        self._tuning = tuning
        self._idle_timeout_s = idle_timeout_s
        self._memory = ScalingMemory(wanted=bounds[0], busy_at=0.0)
        self._meter: LoadMeter | None = None

    def wanted(self, world: World, now: float) -> int:
        machine = world.machine
        self._meter = self._meter or LoadMeter(machine.max_batch)
        reports = {}
        for worker in world.workers.values():
            if worker.ready_at <= now:
                world.advance(worker, now)
                reports[str(worker.number)] = _Report(
                    completion_tokens=round(worker.completion_tokens),
                    stream_s=worker.stream_s,
                    left_jobs=worker.left_jobs,
                    held_jobs=len(worker.jobs),
                    running_sequences=len(worker.jobs),
                )
        self._meter.look(
            reports,
            len(world.waiting),
            0,
            0.0,
            now,
            terms=crowd_terms(self._wait_s, self._tuning),
        )
        supply = Supply(
            ready_workers=len(world.ready(now)),
            starting_ages_s=[now - w.granted_at for w in world.workers.values() if w.ready_at > now],
            max_batch=machine.max_batch,
            start_s=machine.start_s,
        )
        decision = decide_count(
            self._meter.load(),
            supply,
            self._bounds,
            self._idle_timeout_s,
            self._memory,
            now,
            self._tuning,
            target_wait_s=self._wait_s,
        )
        self._memory = decision.memory
        return decision.wanted


class Keda:
    every_s = 30.0

    def __init__(self, bounds: tuple[int, int], target: float, window_s: float = 300.0) -> None:
        self._bounds = bounds
        self._target = target
        self._window_s = window_s
        self._wishes: deque[tuple[float, int]] = deque()

    def wanted(self, world: World, now: float) -> int:
        least, most = self._bounds
        wish = min(max(math.ceil((len(world.waiting) + world.running) / self._target), least), most)
        self._wishes.append((now, wish))
        while self._wishes[0][0] <= now - self._window_s:
            self._wishes.popleft()
        # Up at once; down to the highest wish of the window.
        return max(wish, min(world.taken, max(each for _, each in self._wishes)))


class RayServe:
    every_s = 1.0

    def __init__(
        self, bounds: tuple[int, int], target: float, up_s: float = 30.0, down_s: float = 600.0
    ) -> None:
        self._bounds = bounds
        self._target = target
        self._up_s, self._down_s = up_s, down_s
        self._ongoing: deque[tuple[float, int]] = deque()
        self._wanted = bounds[0]
        self._up_since: float | None = None
        self._down_since: float | None = None

    def wanted(self, world: World, now: float) -> int:
        self._ongoing.append((now, len(world.waiting) + world.running))
        while self._ongoing[0][0] <= now - 30.0:
            self._ongoing.popleft()
        mean = sum(count for _, count in self._ongoing) / len(self._ongoing)
        least, most = self._bounds
        wish = min(max(math.ceil(mean / self._target), least), most)
        self._up_since = _since(self._up_since, wish > self._wanted, now)
        self._down_since = _since(self._down_since, wish < self._wanted, now)
        if self._up_since is not None and now - self._up_since >= self._up_s:
            self._wanted, self._up_since = wish, None
        elif self._down_since is not None and now - self._down_since >= self._down_s:
            self._wanted, self._down_since = wish, None
        return self._wanted


def _since(before: float | None, is_so: bool, now: float) -> float | None:
    """Since when it is so, without a break."""
    return None if not is_so else now if before is None else before


class Fixed:
    every_s = 3600.0

    def __init__(self, count: int) -> None:
        self._count = count

    def wanted(self, world: World, now: float) -> int:
        return self._count
