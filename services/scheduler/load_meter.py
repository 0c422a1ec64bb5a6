"""Pure: what is known of a resource's load, from its workers' counters and the depths of its queues over time.

Workers count from their start on: tokens, the time that jobs ran (summed over jobs), jobs that left. Differences
between reports are exact, however many reports were lost. Running means forget: they go over the last minutes of work.

Lines of batches tell what a worker does in a second and how long a job is, and nothing about how much is needed: they fill
what live requests leave, and a batch that keeps a worker full is no reason for another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

from services.scheduler.crowds import TERMS, Crowds, SeenCrowds, Terms
from services.scheduler.scaling_policy import Load
from services.scheduler.scaling_settings import MAX_COUNT

PROMPT_TOKEN_WEIGHT = 0.1
"""What a prompt token costs beside a completion token."""
MEAN_S = 60.0
"""Time constant of the running means of what arrives and of what runs. What is shorter is a crowd (`crowds.py`)."""
KNOWN_STREAM_S = 10.0
RATE_STREAM_S = 600.0
"""The throughput is a mean over so many seconds of jobs: 8 jobs for 75 s, say."""
JOBS_REMEMBERED = 200.0
LEAST_SHARE = 0.05
"""Of a batch, in the weight of what is measured."""


class Counters(Protocol):
    """Of a worker's report: what it did since its start, and what it holds now."""

    @property
    def completion_tokens(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def stream_s(self) -> float: ...
    @property
    def left_jobs(self) -> int: ...
    @property
    def held_jobs(self) -> int: ...
    @property
    def waiting_jobs(self) -> int: ...
    @property
    def running_sequences(self) -> int: ...
    @property
    def remaining_tokens(self) -> int: ...
    @property
    def batch_held_jobs(self) -> int: ...
    @property
    def batch_waiting_jobs(self) -> int: ...
    @property
    def batch_sequences(self) -> int: ...
    @property
    def batch_left_jobs(self) -> int: ...


class Measured(Struct, frozen=True, kw_only=True):
    """What is worth keeping while nothing runs."""

    job_tokens: float
    worker_tokens_per_s: float


class LoadMeter:
    """One resource's. `look` takes what is known at a time; `load` says what follows."""

    def __init__(self, max_batch: int, known: Measured | None = None, seen: SeenCrowds | None = None) -> None:
        """known, seen: from before. What is known weighs as little as a few seconds of work."""
        self._max_batch = max_batch
        self._before: dict[str, Counters] = {}
        self._in_hand: int | None = None
        self._looked_at = 0.0
        self._tokens = self._stream_s = 0.0
        self._job_tokens = self._jobs = 0.0
        self._arriving_jobs_per_s = 0.0
        self._running = self._gone = 0.0
        """`_gone`: jobs that were in hand and are not. Those of a worker that died come back, and are no crowd then."""
        self._crowds = Crowds(MAX_COUNT, seen)
        self._swap_s = 0.0
        self._ready: int | None = None
        self._batch = 0
        self._reports_age_s = 0.0
        if known is not None:
            self._stream_s = KNOWN_STREAM_S
            self._tokens = known.worker_tokens_per_s / max_batch * self._stream_s
            self._jobs, self._job_tokens = 1.0, known.job_tokens

    def look(
        self,
        workers: Mapping[str, Counters],
        ready_messages: int | None,
        batch_messages: int,
        reports_age_s: float,
        now: float,
        *,
        terms: Terms = TERMS,
        swap_s: float = 0.0,
    ) -> None:
        """workers: the latest report of each worker that lives, by incarnation. swap_s: what a job waits for its model."""
        left = 0
        for incarnation, counters in workers.items():
            # Of one that is new to us its past is known too, and is no arrival.
            came_out = self._take(counters, self._before.get(incarnation))
            left += came_out if incarnation in self._before else 0
        self._ready, self._batch, self._reports_age_s = ready_messages, batch_messages, reports_age_s
        self._before, self._swap_s = dict(workers), swap_s
        if ready_messages is None:
            self._in_hand = None  # what comes meanwhile is not counted as one crowd afterwards
            return
        in_hand = ready_messages + sum(each.held_jobs - each.batch_held_jobs for each in workers.values())
        if self._in_hand is not None and now > self._looked_at:
            passed_s = now - self._looked_at
            arrived = in_hand - self._in_hand + left
            share = 1 - math.exp(-passed_s / MEAN_S)
            self._arriving_jobs_per_s += (arrived / passed_s - self._arriving_jobs_per_s) * share
            self._running += (self._live_sequences() - self._running) * share
            came = max(arrived - self._gone, 0.0)
            self._gone = max(self._gone - arrived, 0.0) * (1 - share)
            if rate := self._worker_tokens_per_s():
                request_s = self._mean_job_tokens() / rate
                self._crowds.pass_time(came, request_s, now, passed_s, terms)
        self._in_hand, self._looked_at = in_hand, now

    def _take(self, now: Counters, before: Counters | None) -> int:
        """Add what a worker did since its report before; return how many live jobs left it."""
        tokens = _tokens(now) - (_tokens(before) if before is not None else 0.0)
        weight = self._weight(now, before)
        left = now.left_jobs - (before.left_jobs if before is not None else 0)
        of_batches = now.batch_left_jobs - (before.batch_left_jobs if before is not None else 0)
        stream_s = now.stream_s - (before.stream_s if before is not None else 0.0)
        self._tokens += tokens * weight
        self._stream_s += stream_s * weight
        if self._stream_s > RATE_STREAM_S:
            self._tokens *= RATE_STREAM_S / self._stream_s
            self._stream_s = RATE_STREAM_S
        self._job_tokens += tokens
        self._jobs += left
        if self._jobs > JOBS_REMEMBERED:
            self._job_tokens *= JOBS_REMEMBERED / self._jobs
            self._jobs = JOBS_REMEMBERED
        return left - of_batches

    def _weight(self, now: Counters, before: Counters | None) -> float:
        """A batch that is nearly full tells what a full one does; the streams of an emptier one are faster than those would be."""
        least = min(each.running_sequences for each in (before, now) if each is not None)
        return max(least / self._max_batch, LEAST_SHARE) ** 2

    def _worker_tokens_per_s(self) -> float:
        return self._tokens / self._stream_s * self._max_batch if self._stream_s > 0 else 0.0

    def _mean_job_tokens(self) -> float:
        return self._job_tokens / self._jobs if self._jobs else self._job_tokens

    def _live_sequences(self) -> int:
        return sum(each.running_sequences - each.batch_sequences for each in self._before.values())

    def load(self) -> Load:
        workers = self._before.values()
        job_tokens, rate = self._mean_job_tokens(), self._worker_tokens_per_s()
        return Load(
            ready_messages=self._ready,
            batch_messages=self._batch + sum(each.batch_held_jobs for each in workers),
            waiting_jobs=sum(each.waiting_jobs - each.batch_waiting_jobs for each in workers),
            running_sequences=self._live_sequences(),
            usually_running=self._running,
            remaining_tokens=sum(each.remaining_tokens for each in workers),
            reports_age_s=self._reports_age_s,
            job_tokens=job_tokens,
            arriving_tokens_per_s=max(self._arriving_jobs_per_s, 0.0) * job_tokens,
            worker_tokens_per_s=rate or None,
            crowds=self._crowds.seen(),
            swap_s=self._swap_s,
        )

    def measured(self) -> Measured | None:
        if not (rate := self._worker_tokens_per_s()):
            return None
        return Measured(job_tokens=self._mean_job_tokens(), worker_tokens_per_s=rate)


def _tokens(counters: Counters) -> float:
    return counters.completion_tokens + counters.prompt_tokens * PROMPT_TOKEN_WEIGHT
