"""A worker under more work than it can do, in simulated time: real decisions on an engine that costs what ours was seen to.

Beside it a worker in strict order of arrival, on the same engine, to compare with.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtest.hotswap_traffic import PATIENCE_S, Arrival
from services.worker.engine.kv_cache import BLOCK_TOKENS
from services.worker.pull_policy import plan
from services.worker.pull_snapshot import ModelKey, ModelSlot, RunningJob, Snapshot, WaitingJob

PASS_S, ROW_S, PROMPT_TOKEN_S = 0.0135, 0.0025, 0.0009
"""Of SmolLM2 in bf16 on two cores: a pass of one model, each answer in it, each token of a prompt."""
SWAP_S, SLOWED_BY_LOADS = 0.065, 1 / 0.88
PROMPT_STEP_TOKENS = 64
MAX_BATCH = 16
IDLE_S = 0.05


@dataclass(slots=True, eq=False)
class Job:
    job_id: str
    arrival: Arrival
    since_s: float = 0.0
    """When it came, or was paused, or last began."""
    runs: bool = False
    was_begun: bool = False
    pauses: int = 0
    computed_tokens: int = 0
    answered_tokens: int = 0
    latency_s: float | None = None

    @property
    def model(self) -> ModelKey:
        return (f"m{self.arrival.model}", 1)

    @property
    def known_tokens(self) -> int:
        return len(self.arrival.prompt) + self.answered_tokens

    def step_s(self) -> float:
        """One step of the engine for it; what that costs beside the pass."""
        prompt_tokens = min(PROMPT_STEP_TOKENS, self.known_tokens - self.computed_tokens)
        self.computed_tokens += prompt_tokens
        if self.computed_tokens == self.known_tokens:
            self.answered_tokens += 1
        return ROW_S if prompt_tokens == 1 else prompt_tokens * PROMPT_TOKEN_S


@dataclass(slots=True)
class LoadedWorker:
    """Has memory for `slots` models; holds at most `window` jobs, the others wait in the queue."""

    slots: int
    window: int
    jobs: list[Job] = field(default_factory=list)
    held: list[Job] = field(default_factory=list)
    ready: dict[ModelKey, float] = field(default_factory=dict)
    """With the time of the last use."""
    turn_since_s: dict[ModelKey, float] = field(default_factory=dict)
    loading: tuple[ModelKey, float] | None = None
    last_load_s: float = -math.inf
    loads: int = 0
    now_s: float = 0.0

    def run(self, trace: Sequence[Arrival]) -> None:
        coming = deque(Job(str(number), arrival) for number, arrival in enumerate(trace))
        self.jobs = list(coming)
        queue: deque[Job] = deque()
        while coming or queue or self.held:
            while coming and coming[0].arrival.at_s <= self.now_s:
                queue.append(coming.popleft())
            while queue and len(self.held) < self.window:
                job = queue.popleft()
                job.since_s = self.now_s
                self.held.append(job)
            self.held = [job for job in self.held if job.was_begun or not self._is_late(job)]
            if self.loading is not None and self.loading[1] <= self.now_s:
                self.ready[self.loading[0]] = self.last_load_s = self.now_s
                self.loading = None
            self.decide()
            self._step()

    @property
    def pauses(self) -> int:
        return sum(job.pauses for job in self.jobs)

    def decide(self) -> None:
        evicted = True
        while evicted:  # as the worker does: it asks again when memory is free
            decided = plan(self._snapshot(), max_sequences=MAX_BATCH, model_memory_bytes=self.slots)
            by_id = {job.job_id: job for job in self.held}
            for job_id in decided.pause:
                self._pause(by_id[job_id])
            for job_id in decided.start + decided.claim:
                self._begin(by_id[job_id])
            for key in decided.evict:
                del self.ready[key]
            for key in decided.load:
                self._load(key)
            evicted = bool(decided.evict)

    def _is_late(self, job: Job) -> bool:
        return self.now_s - job.arrival.at_s > PATIENCE_S

    def _begin(self, job: Job) -> None:
        job.runs = job.was_begun = True
        job.since_s = self.now_s

    def _pause(self, job: Job) -> None:
        """What fills whole blocks is found again."""
        job.runs = False
        job.pauses += 1
        job.since_s = self.now_s
        job.computed_tokens -= job.computed_tokens % BLOCK_TOKENS

    def _load(self, key: ModelKey) -> None:
        self.loading = (key, self.now_s + SWAP_S)
        self.loads += 1

    def _snapshot(self) -> Snapshot:
        with_work = {job.model for job in self.held}
        self.turn_since_s = {
            key: self.turn_since_s.get(key, self.now_s) for key in self.ready if key in with_work
        }
        models = {
            key: ModelSlot("ready", 1, used_s, self.now_s - self.turn_since_s.get(key, self.now_s))
            for key, used_s in self.ready.items()
        }
        if self.loading is not None:
            models[self.loading[0]] = ModelSlot("loading", 1, self.now_s)
        return Snapshot(
            waiting=[
                WaitingJob(
                    job.job_id,
                    job.model,
                    "live",
                    1,
                    self.now_s - job.since_s,
                    attempt=int(job.was_begun),
                    is_paused=job.was_begun,
                )
                for job in self.held
                if not job.runs
            ],
            running=[
                RunningJob(job.job_id, job.model, 1, 1, "live", self.now_s - job.since_s)
                for job in self.held
                if job.runs
            ],
            claimed_sequences=0,
            models=models,
            sizes=dict.fromkeys(with_work, 1),
            swap_s=dict.fromkeys(with_work, SWAP_S),
            since_swap_s=self.now_s - self.last_load_s,
        )

    def _step(self) -> None:
        running = [job for job in self.held if job.runs]
        if not running:
            self.now_s += IDLE_S if self.loading is None else self.loading[1] - self.now_s
            return
        step_s = PASS_S * len({job.model for job in running}) + sum(job.step_s() for job in running)
        self.now_s += step_s if self.loading is None else step_s * SLOWED_BY_LOADS
        for job in running:
            if job.answered_tokens >= job.arrival.answer_tokens:
                job.latency_s = self.now_s - job.arrival.at_s
                self.held.remove(job)
                self.ready[job.model] = self.now_s


class FifoWorker(LoadedWorker):
    """A job begins when all before it have begun; for an absent model, when one without work can go. Late ones are given up."""

    def decide(self) -> None:
        self.held = [job for job in self.held if not self._is_late(job)]
        waiting = deque(job for job in self.held if not job.runs)
        while waiting and len(self.held) - len(waiting) < MAX_BATCH:
            key = waiting[0].model
            if key not in self.ready:
                busy = {job.model for job in self.held if job.runs}
                idle = sorted((used_s, each) for each, used_s in self.ready.items() if each not in busy)
                if self.loading is None and (len(self.ready) < self.slots or idle):
                    if len(self.ready) >= self.slots:
                        del self.ready[idle[0][1]]
                    self._load(key)
                return
            self._begin(waiting.popleft())
            self.ready[key] = self.now_s
