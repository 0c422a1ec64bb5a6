"""What a step computes of background work (lines of batches) beside other work, so that this hardly notices. Decisions are
pure; `StepCost` learns what a step takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from .batching import SequenceView

SLOWER = 0.12
"""So much longer a step may take for the background's sake, while anybody else is in it."""
KEPT_SHARE = 0.9
FIT_EVERY = 32


def beside_others(running: Sequence[SequenceView], room: int, turn: int) -> Sequence[SequenceView]:
    """The sequences that this step looks at. room: background ones beside others. turn: number of the step.

    1. Only the background has something to compute, or nothing of it runs -> all.
    2. Otherwise all others, and of the background at most `room` that decode; they take turns. Its prompts wait: one chunk of
       them takes as long as many answers' tokens.
    """
    background = [view for view in running if view.background and not view.only_waits]
    others = [view for view in running if not view.background]
    if not background or all(view.only_waits for view in others):  # 1
        return running
    decoding = [view for view in background if view.is_decoding]
    if not decoding:
        return others
    first = turn * room % len(decoding)
    return others + (decoding[first:] + decoding[:first])[:room]  # 2


class StepCost:
    """How long steps take by the number of sequences that decode in them: a mean for each number, and the line through these."""

    def __init__(self) -> None:
        self._means_s: dict[int, float] = {}
        self._seen = 0
        self._fixed_s = self._each_s = 0.0

    def observe(self, sequences: int, seconds: float) -> None:
        """A step without prompts took so long."""
        before_s = self._means_s.get(sequences, seconds)
        self._means_s[sequences] = KEPT_SHARE * before_s + (1 - KEPT_SHARE) * seconds
        self._seen += 1
        if self._seen % FIT_EVERY == 0:
            self._fit()

    def room(self, sequences: int) -> int:
        """How many more may decode beside these. None as long as steps of one size alone were seen."""
        if self._fixed_s + self._each_s <= 0:
            return 0
        step_s = self._fixed_s + self._each_s * sequences
        return int(SLOWER * step_s / max(self._each_s, step_s * 1e-3))

    def _fit(self) -> None:
        points = list(self._means_s.items())
        if len(points) < 2:
            return
        mean_n = sum(n for n, _ in points) / len(points)
        mean_s = sum(s for _, s in points) / len(points)
        spread = sum((n - mean_n) ** 2 for n, _ in points)
        slope = sum((n - mean_n) * (s - mean_s) for n, s in points) / spread
        self._each_s = max(slope, 0.0)
        self._fixed_s = max(mean_s - self._each_s * mean_n, 0.0)
