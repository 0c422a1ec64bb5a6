"""How many jobs a worker holds beyond those that run, and which of these it gives up for a worker that idles.

Pure, but for `JobsRate`, which is given the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

LOOKAHEAD_S = 2.0
STEP_JOBS = 4
"""The lookahead grows and shrinks by so many: each step is a consumer of its own, since a consumer's prefetch is fixed."""
SHARED_AFTER_S = 1.0
"""A job that came later than that may just be about to begin."""
_REMEMBERED_S = 10.0


class UnbegunJob(Protocol):
    @property
    def received_s(self) -> float: ...


J = TypeVar("J", bound=UnbegunJob)


@dataclass(slots=True)
class JobsRate:
    """Jobs that left the worker per second, over the last seconds in which it had as many as it can run at once."""

    per_s: float | None = None
    _left: int = 0
    _looked_at_s: float = -math.inf

    def look(self, left_jobs: int, now_s: float, *, is_full: bool) -> None:
        """left_jobs: since the worker's start. is_full: now, which is taken for the time since the last look."""
        passed_s, left = now_s - self._looked_at_s, left_jobs - self._left
        self._looked_at_s, self._left = now_s, left_jobs
        if not is_full or not 0 < passed_s < _REMEMBERED_S:
            return
        share = 1 - math.exp(-passed_s / _REMEMBERED_S)
        before = left / passed_s if self.per_s is None else self.per_s
        self.per_s = before + (left / passed_s - before) * share


def choose_steps(jobs_per_s: float | None, now_steps: int, most_jobs: int) -> int:
    """Return the lookahead in steps of `STEP_JOBS`, one up or down from `now_steps` at most.

    1. Not more than `LOOKAHEAD_S` of the worker's measured work: a place that frees is filled within one engine step, and
       what others could begin sooner is not kept from them.
    2. Not more than `most_jobs`.
    3. One step while nothing is measured.
    4. It shrinks only when a quarter of a step too large, so that a rate at the edge does not turn it on and off.
    """
    wanted_jobs = STEP_JOBS if jobs_per_s is None else jobs_per_s * LOOKAHEAD_S  # 1, 3
    most_steps = most_jobs // STEP_JOBS  # 2
    wanted = min(int(wanted_jobs // STEP_JOBS), most_steps)
    if wanted > now_steps:
        return now_steps + 1
    is_far_below = now_steps > most_steps or wanted_jobs < (now_steps - 0.25) * STEP_JOBS  # 4
    return now_steps - 1 if wanted < now_steps and is_far_below else now_steps


def choose_shared(unbegun: Iterable[J], now_s: float) -> list[J]:
    """Jobs that go back to the queue because another worker of the resource has nothing to do.

    unbegun: those that nobody was asked about. All that have waited for `SHARED_AFTER_S`: had there been a place for
    them, they would have begun.
    """
    return [job for job in unbegun if now_s - job.received_s >= SHARED_AFTER_S]
