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
    stream_s: float = 0.0
    """Seconds that sequences ran, summed over sequences."""
    sequences: int = 0
    """Running since the last call of `run`."""
    _since_s: float = 0.0

    def run(self, sequences: int, now_s: float) -> None:
        """From now on so many sequences run."""
        self.stream_s += self.sequences * max(now_s - self._since_s, 0.0)
        self.sequences, self._since_s = sequences, now_s
