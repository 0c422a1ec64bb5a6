"""Which of several numbers of threads computes best beside what else the machine does, decided again while models answer.

Beside other busy processes one is best, and they come and go: two workers that start at once each see a machine that is full.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

# More threads must bring at least this much: what they bring less than that, they cost those who share the machine.
_LEAST_GAIN = 1.25
# Fewer are taken again when more bring less than this: between the two numbers what runs stays.
_KEPT_GAIN = 1.15
_TRIAL_ROUNDS, _TRIAL_BUDGET = 3, 3
_FIRST_INTERVAL_S, _LAST_INTERVAL_S = 1.0, 60.0
# Passes of so different a size do not belong to one trial.
_SAME_ROWS = 1 / 8


def choose_threads(seconds: Mapping[int, float]) -> int:
    """seconds: of one pass, by number of threads. Pure.

    1. From the fewest upward, the next number is taken while it is at least _LEAST_GAIN times as fast as the last taken.
    2. A number that brings too little is passed over: the one after it may still.
    """
    counts = sorted(seconds)
    chosen = counts[0]
    for count in counts[1:]:
        if seconds[chosen] / seconds[count] >= _LEAST_GAIN:
            chosen = count
    return chosen


def is_better(current: int, other: int, gain: float) -> bool:
    """gain: how many times as fast the larger of the two numbers is. Pure; see `ThreadTuner`, rules 3 and 4."""
    return gain >= _LEAST_GAIN if other > current else gain < _KEPT_GAIN


class ThreadTuner:
    """Says how many threads compute the next pass, and is told how long it took. Of one thread: the engine's.

    1. A trial takes passes by the number that runs and by its next larger or smaller one in turn, two at a time, of which the
       second counts: the first wakes the threads. Larger and smaller have their turns one after the other.
    2. Only passes with about as many rows as the trial's first count; others are made again.
    3. A larger number is taken when it is at least `_LEAST_GAIN` times as fast.
    4. A smaller one is taken when the larger that runs is less than `_KEPT_GAIN` times as fast.
    5. A trial changes nothing if it is not over after `_TRIAL_BUDGET` times its passes, or as soon as the other number turns out
       to take twice as long.
    6. After a change the next trial comes `_FIRST_INTERVAL_S` later; after each that changed nothing in twice the time,
       `_LAST_INTERVAL_S` at most.
    """

    def __init__(
        self, counts: Sequence[int], threads: int, clock: Callable[[], float] = perf_counter
    ) -> None:
        """counts: the numbers to choose from, ascending; threads: the one of them to begin with."""
        self.chosen = threads
        self._counts, self._now_s = counts, clock
        self._interval_s = _FIRST_INTERVAL_S
        self._next_trial_s = clock() + _FIRST_INTERVAL_S
        self._goes_up = False
        self._other = threads
        self._order: list[int] = []
        self._taken: dict[int, list[float]] = {}
        self._rows = self._passes = self._left = 0

    def next_count(self) -> int:
        if not self._order and len(self._counts) > 1 and self._now_s() >= self._next_trial_s:
            self._begin_trial()
        return self._order[self._passes] if self._order else self.chosen

    def took(self, rows: int, seconds: float) -> None:
        """The pass that `next_count` was asked for is done."""
        if not self._order:
            return
        self._left -= 1
        if self._passes == 0:
            self._rows = rows
        if abs(rows - self._rows) <= self._rows * _SAME_ROWS:
            self._count(self._order[self._passes], seconds)
        if self._order and self._left == 0:
            self._end_trial(None)

    def _count(self, threads: int, seconds: float) -> None:
        if self._passes % 2:
            self._taken.setdefault(threads, []).append(seconds)
        self._passes += 1
        medians = {each: statistics.median(taken) for each, taken in self._taken.items()}
        if self._passes == len(self._order):
            self._end_trial(medians)
        elif medians.get(self._other, 0.0) > 2 * medians.get(self.chosen, seconds):
            self._end_trial(None)

    def _begin_trial(self) -> None:
        place, last = self._counts.index(self.chosen), len(self._counts) - 1
        self._goes_up = place == 0 or (place < last and not self._goes_up)
        self._other = self._counts[place + 1 if self._goes_up else place - 1]
        self._order = [self.chosen, self.chosen, self._other, self._other] * _TRIAL_ROUNDS
        self._left = len(self._order) * _TRIAL_BUDGET
        self._passes, self._taken = 0, {}

    def _end_trial(self, medians: Mapping[int, float] | None) -> None:
        """medians: seconds of a pass by each of both; None changes nothing."""
        fewer, more = sorted((self.chosen, self._other))
        if medians is not None and is_better(self.chosen, self._other, medians[fewer] / medians[more]):
            self.chosen, self._interval_s = self._other, _FIRST_INTERVAL_S
        else:
            self._interval_s = min(2 * self._interval_s, _LAST_INTERVAL_S)
        self._order = []
        self._next_trial_s = self._now_s() + self._interval_s
