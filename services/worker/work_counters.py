"""What a worker did since its start: counters that only grow, so that reports which were lost leave no gap."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class WorkCounters:
    """Given the time by its callers; they tell each change of the number of sequences that run."""

    completion_tokens: int = 0
    prompt_tokens: int = 0
    """Computed ones: what a prefix cache had cost nothing."""
    left_jobs: int = 0
    """Jobs that are done with, however they ended. One that was given back is not."""
    batch_left_jobs: int = 0
    """Of these, lines of batches."""
    stream_s: float = 0.0
    """Seconds that sequences ran, summed over sequences."""
    busy_s: float = 0.0
    """Seconds in which any sequence ran."""
    sequences: int = 0
    """Running since the last call of `run`."""
    _since_s: float = 0.0

    def left(self, *, is_batch: bool) -> None:
        """A job is done with."""
        self.left_jobs += 1
        self.batch_left_jobs += is_batch

    def run(self, sequences: int, now_s: float) -> None:
        """From now on so many sequences run."""
        passed_s = max(now_s - self._since_s, 0.0)
        self.stream_s += self.sequences * passed_s
        self.busy_s += passed_s if self.sequences else 0.0
        self.sequences, self._since_s = sequences, now_s
