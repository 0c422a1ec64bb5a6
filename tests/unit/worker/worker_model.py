"""A worker in simulated time: real decisions (`pull_policy.plan`) on jobs, loads and a clock that cost nothing."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from services.worker.model_turns import OVERTAKE_S
from services.worker.pull_policy import plan
from services.worker.pull_snapshot import ModelKey, ModelSlot, Preload, RunningJob, Snapshot, WaitingJob

TICK_S = 0.2
PREFILL_S = 0.05


@dataclass(slots=True, eq=False)
class SimulatedJob:
    job_id: str
    model: ModelKey
    arrives_s: float
    work_s: float
    work_class: Literal["live", "batch"] = "live"
    waiting_since_s: float = 0.0
    began_s: float = 0.0
    runs: int = 0
    """Odd while it runs: counts its starts and its pauses."""
    was_started: bool = False
    first_token_s: float | None = None
    ended_s: float | None = None
    is_failed: bool = False

    @property
    def is_running(self) -> bool:
        return self.runs % 2 == 1


@dataclass(slots=True)
class SimulatedWorker:
    """swap_s: of each model. broken: models whose load fails at its end. pins: with the time from which on each is pinned.

    It checks what must hold at every moment.
    """

    jobs: list[SimulatedJob]
    swap_s: dict[ModelKey, float]
    sizes: dict[ModelKey, int]
    memory: int
    max_sequences: int
    broken: frozenset[ModelKey] = frozenset()
    pins: dict[ModelKey, float] = field(default_factory=dict)
    preload: list[Preload] = field(default_factory=list)
    bases: dict[ModelKey, ModelKey] = field(default_factory=dict)
    preloads_at_start: list[Preload] = field(init=False)
    now_s: float = 0.0
    held: list[SimulatedJob] = field(default_factory=list)
    slots: dict[ModelKey, tuple[Literal["loading", "ready"], float]] = field(default_factory=dict)
    """State, and when it was last used."""
    work_since_s: dict[ModelKey, float] = field(default_factory=dict)
    failed: set[ModelKey] = field(default_factory=set)
    loads: list[ModelKey] = field(default_factory=list)
    last_load_s: float = -math.inf

    def __post_init__(self) -> None:
        self.preloads_at_start = list(self.preload)

    def run(self, until_s: float = 10_000.0) -> None:
        """Until every job has ended. Raises AssertionError when they do not."""
        order = itertools.count()
        events: list[tuple[float, int, str, object]] = []

        def at(time_s: float, kind: str, what: object) -> None:
            heapq.heappush(events, (time_s, next(order), kind, what))

        for job in self.jobs:
            at(job.arrives_s, "arrive", job)
        for time_s in [*self.pins.values(), *([0.0] if self.preload else [])]:
            at(time_s, "pinned", None)
        while events:
            self.now_s, _, kind, what = heapq.heappop(events)
            assert self.now_s < until_s, "somebody waits for ever"
            self._take(kind, what)
            self._decide(at)
            if self.held and not any(each[2] == "tick" for each in events):
                at(self.now_s + TICK_S, "tick", None)

    def _take(self, kind: str, what: object) -> None:
        match kind, what:
            case "arrive", SimulatedJob() as job:
                job.waiting_since_s = self.now_s
                self.held.append(job)
            case "token", (SimulatedJob() as job, run):
                if job.runs == run and job.first_token_s is None:
                    job.first_token_s = self.now_s
            case "end", (SimulatedJob() as job, run):
                if job.runs == run:
                    job.runs += 1
                    self._end(job)
            case "loaded", (str(model_id), int(revision)):
                key = (model_id, revision)
                if key in self.broken:
                    del self.slots[key]
                    self.failed.add(key)
                else:
                    self.slots[key] = ("ready", self.now_s)
                    self.last_load_s = self.now_s
                    self.preload = [preload for preload in self.preload if preload.model != key]
        for job in [job for job in self.held if self._is_failed(job.model)]:
            job.is_failed = True
            self._end(job)

    def _end(self, job: SimulatedJob) -> None:
        job.ended_s = self.now_s
        self.held.remove(job)
        for key in (job.model, self.bases.get(job.model)):
            if key is not None and key in self.slots and self.slots[key][0] == "ready":
                self.slots[key] = ("ready", self.now_s)

    def _is_failed(self, key: ModelKey) -> bool:
        return key in self.failed or self.bases.get(key) in self.failed

    def snapshot(self) -> Snapshot:
        with_work = {job.model for job in self.held}
        with_work |= {self.bases[key] for key in with_work if key in self.bases}
        for key, (state, _) in self.slots.items():
            if state == "ready" and key in with_work:
                self.work_since_s.setdefault(key, self.now_s)
            else:
                self.work_since_s.pop(key, None)
        return Snapshot(
            waiting=[
                WaitingJob(
                    job.job_id,
                    job.model,
                    job.work_class,
                    1,
                    self.now_s - job.waiting_since_s,
                    attempt=int(job.was_started),
                    is_paused=job.was_started,
                )
                for job in self.held
                if not job.is_running
            ],
            running=[
                RunningJob(job.job_id, job.model, 1, 1, job.work_class, self.now_s - job.began_s)
                for job in self.held
                if job.is_running
            ],
            claimed_sequences=0,
            models={
                key: ModelSlot(
                    state,
                    self.sizes[key],
                    used_s,
                    self.now_s - self.work_since_s.get(key, self.now_s),
                )
                for key, (state, used_s) in self.slots.items()
            },
            sizes={key: size for key, size in self.sizes.items() if not self._is_failed(key)},
            swap_s=self.swap_s,
            pinned={
                key: self.now_s - since_s
                for key, since_s in self.pins.items()
                if since_s <= self.now_s and not self._is_failed(key)
            },
            bases=self.bases,
            preload=self.preload,
            since_swap_s=self.now_s - self.last_load_s,
        )

    def _decide(self, at: Callable[[float, str, object], None]) -> None:
        decided = plan(self.snapshot(), max_sequences=self.max_sequences, model_memory_bytes=self.memory)
        by_id = {job.job_id: job for job in self.held}
        for job_id in decided.pause:
            job = by_id[job_id]
            assert job.is_running
            job.runs += 1
            job.work_s -= self.now_s - job.began_s
            job.waiting_since_s = self.now_s
        for key in decided.no_room:
            assert any(job.model == key for job in self.held)
            self.failed.add(key)
        for job in [job for job in self.held if job.model in decided.no_room]:
            job.is_failed = True
            self._end(job)
        for key in decided.evict:
            assert not self.pins.get(key, self.now_s + 1) <= self.now_s, "a pinned model was evicted"
            assert self.slots.pop(key)[0] == "ready", "a model was evicted while it loaded"
            self.work_since_s.pop(key, None)
            assert not any(job.is_running and job.model == key for job in self.held), "evicted under its jobs"
            assert not any(self.bases.get(other) == key for other in self.slots), (
                "a base went before its adapter"
            )
        assert decided.begin_at_once or not decided.claim
        for job_id in decided.start + decided.claim:
            job = by_id[job_id]
            assert not job.is_running
            assert self.slots[job.model][0] == "ready"
            job.runs += 1
            job.was_started, job.began_s = True, self.now_s
            at(self.now_s + PREFILL_S, "token", (job, job.runs))
            at(self.now_s + max(job.work_s, PREFILL_S), "end", (job, job.runs))
        assert sum(job.is_running for job in self.held) <= self.max_sequences
        for key in decided.load:
            assert key not in self.slots
            if key in self.bases:
                assert self.slots[self.bases[key]][0] == "ready", "an adapter was loaded without its base"
            self.slots[key] = ("loading", self.now_s)
            self.loads.append(key)
            taken = sum(self.sizes[each] for each in self.slots)
            assert taken <= self.memory or set(self.slots) <= {key, self.bases.get(key)}, (
                "more is loaded than fits"
            )
            at(self.now_s + self.swap_s[key], "loaded", key)
        if decided.evict:
            at(self.now_s, "evicted", None)


def most_wait_s(worker: SimulatedWorker, job: SimulatedJob, quantum_s: float) -> float:
    """The bound that `model_turns.py` states, for a job of a run that is over."""
    beside = [
        other
        for other in worker.jobs
        if other.arrives_s <= job.arrives_s + OVERTAKE_S
        and (other.ended_s is None or other.ended_s >= job.arrives_s)
    ]
    ahead = {other.model for other in beside if other.work_class == "live"} | {job.model}
    ahead |= {model for model, since_s in worker.pins.items() if since_s <= job.arrives_s + OVERTAKE_S}
    ahead |= {worker.bases[model] for model in ahead if model in worker.bases}
    # A load for batch work that has begun is not broken off.
    under_way_s = max(
        (worker.swap_s[other.model] for other in beside if other.model not in ahead), default=0.0
    )
    # Nor is one for a preload, which began when nobody waited.
    preloads_s = [worker.swap_s[preload.model] for preload in worker.preloads_at_start]
    under_way_s = max([under_way_s, *preloads_s])
    return sum(worker.swap_s[model] + quantum_s for model in ahead) + under_way_s + 2.0
