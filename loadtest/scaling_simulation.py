"""A discrete-event model of a resource under load: one queue, workers that start, serve in batches, drain and leave.

A job is work in completion tokens' worth (prompt tokens weigh a tenth). A worker with b jobs gives each a token every
`base_s + b * per_job_s`; it takes a job when one of its `max_batch` slots is free, the idlest worker first. A place
costs from its grant until it is free again. Nothing is lost and nothing is cut: that is what the real thing proves.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Machine:
    """How one worker behaves."""

    start_s: float
    max_batch: int = 8
    base_s: float = 0.010
    per_job_s: float = 0.00125
    prompt_weight: float = 0.1

    def token_s(self, jobs: int) -> float:
        return self.base_s + jobs * self.per_job_s


@dataclass(slots=True)
class Worker:
    """`progress` is the tokens that a job would have got that was there from the beginning."""

    number: int
    granted_at: float
    ready_at: float
    draining: bool = False
    progress: float = 0.0
    updated_at: float = 0.0
    stream_s: float = 0.0
    completion_tokens: float = 0.0
    prompt_tokens: float = 0.0
    left_jobs: int = 0
    version: int = 0
    jobs: list[tuple[float, int]] = field(default_factory=list)
    """(progress at which it ends, number of the job), the first to end first."""


class Scaler(Protocol):
    """A rule that says how many workers there should be. Asked every `every_s`."""

    every_s: float

    def wanted(self, world: World, now: float) -> int: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    hours: float
    waits_s: list[float]
    """Of each job until a worker takes it."""
    responses_s: list[float]
    """Of each job until its end."""
    starts: int
    samples: list[tuple[float, int, int, int]]
    """(time, ready workers, taken places, jobs that wait), every 10 s."""

    def share_over(self, limit_s: float) -> float:
        return sum(response > limit_s for response in self.responses_s) / max(len(self.responses_s), 1)


class World:
    """The state of a simulation; rules read it."""

    def __init__(self, machine: Machine, arrivals: Sequence[Arrival]) -> None:
        self.machine = machine
        self.arrivals = arrivals
        self.workers: dict[int, Worker] = {}
        self.waiting: deque[int] = deque()
        self.began: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.seconds = 0.0
        self.starts = 0
        self._count = 0
        self._events: list[tuple[float, int, str, int, int]] = []
        self._sequence = 0

    # ---- what rules may ask

    @property
    def taken(self) -> int:
        return sum(not worker.draining for worker in self.workers.values())

    def ready(self, now: float) -> list[Worker]:
        return [w for w in self.workers.values() if w.ready_at <= now and not w.draining]

    @property
    def running(self) -> int:
        return sum(len(worker.jobs) for worker in self.workers.values())

    # ---- running

    def run(self, scaler: Scaler, initially: int, until: float) -> Outcome:
        """Play all arrivals; `initially` workers are ready at the beginning. Ends when all is done, after `until`."""
        for _ in range(initially):
            self._grant(0.0, ready_at=0.0)
        for number, arrival in enumerate(self.arrivals):
            self._at(arrival.at, "arrive", number)
        self._at(0.0, "scale", 0)
        samples: list[tuple[float, int, int, int]] = []
        self._at(0.0, "sample", 0)
        while self._events:
            now, _, kind, subject, version = heapq.heappop(self._events)
            if now > until and len(self.ended) == len(self.arrivals):
                break
            match kind:
                case "arrive":
                    self.waiting.append(subject)
                    self._dispatch(now)
                case "ready":
                    self._dispatch(now)
                case "end":
                    self._end_jobs(now, subject, version)
                case "scale":
                    self._scale(scaler.wanted(self, now), now)
                    self._at(now + scaler.every_s, "scale", 0)
                case "sample":
                    samples.append((now, len(self.ready(now)), len(self.workers), len(self.waiting)))
                    self._at(now + 10.0, "sample", 0)
        end = max(until, max(self.ended.values(), default=0.0))
        held_s = self.seconds + sum(end - worker.granted_at for worker in self.workers.values())
        numbers = range(len(self.arrivals))
        return Outcome(
            held_s / 3600,
            [self.began[n] - self.arrivals[n].at for n in numbers],
            [self.ended[n] - self.arrivals[n].at for n in numbers],
            self.starts,
            samples,
        )

    def _at(self, at: float, kind: str, subject: int, version: int = 0) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at, self._sequence, kind, subject, version))

    def _grant(self, now: float, ready_at: float) -> None:
        self._count += 1
        self.workers[self._count] = Worker(self._count, now, ready_at, updated_at=ready_at)
        self._at(ready_at, "ready", self._count)

    def _scale(self, wanted: int, now: float) -> None:
        for _ in range(wanted - self.taken):
            self.starts += 1
            self._grant(now, now + self.machine.start_s)
        surplus = self.taken - wanted
        # As the scheduler chooses: starting before ready, idle before busy, the youngest.
        order = sorted(
            (w for w in self.workers.values() if not w.draining),
            key=lambda w: (w.ready_at <= now, len(w.jobs), -w.number),
        )
        for worker in order[: max(surplus, 0)]:
            worker.draining = True
            self._leave_if_done(worker, now)

    def _dispatch(self, now: float) -> None:
        while self.waiting:
            open_ones = [w for w in self.ready(now) if len(w.jobs) < self.machine.max_batch]
            if not open_ones:
                return
            worker = min(open_ones, key=lambda w: (len(w.jobs), w.number))
            job = self.waiting.popleft()
            self.advance(worker, now)
            arrival = self.arrivals[job]
            work = arrival.completion_tokens + arrival.prompt_tokens * self.machine.prompt_weight
            heapq.heappush(worker.jobs, (worker.progress + work, job))
            self.began[job] = now
            self._expect_end(worker, now)

    def advance(self, worker: Worker, now: float) -> None:
        """Bring a worker's counters up to now."""
        passed_s = now - worker.updated_at
        if passed_s <= 0:
            return
        if worker.jobs:
            tokens = passed_s / self.machine.token_s(len(worker.jobs))
            worker.progress += tokens
            worker.completion_tokens += tokens * len(worker.jobs)
            worker.stream_s += passed_s * len(worker.jobs)
        worker.updated_at = now

    def _expect_end(self, worker: Worker, now: float) -> None:
        worker.version += 1
        if worker.jobs:
            left = max(worker.jobs[0][0] - worker.progress, 0.0)
            at = now + left * self.machine.token_s(len(worker.jobs))
            self._at(at, "end", worker.number, worker.version)

    def _end_jobs(self, now: float, number: int, version: int) -> None:
        worker = self.workers.get(number)
        if worker is None or worker.version != version:
            return
        self.advance(worker, now)
        while worker.jobs and worker.jobs[0][0] <= worker.progress + 1e-6:
            _, job = heapq.heappop(worker.jobs)
            self.ended[job] = now
            worker.left_jobs += 1
        self._expect_end(worker, now)
        self._leave_if_done(worker, now)
        self._dispatch(now)

    def _leave_if_done(self, worker: Worker, now: float) -> None:
        if worker.draining and not worker.jobs:
            self.seconds += now - worker.granted_at
            del self.workers[worker.number]
