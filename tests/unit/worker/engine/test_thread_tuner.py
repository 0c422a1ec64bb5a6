"""The number of threads follows what the machine has free, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from services.worker.engine.thread_tuner import ThreadTuner, is_better

Seconds = Callable[[int, float], float]
"""What a pass takes by so many threads at a time."""


class Machine:
    """Passes of 16 rows, one after the other."""

    def __init__(self, counts: list[int], threads: int, seconds: Seconds) -> None:
        self.now_s = 0.0
        self.seconds = seconds
        self.passes: list[int] = []
        self.tuner = ThreadTuner(counts, threads, lambda: self.now_s)

    def run(self, until_s: float, rows: Callable[[int], int] = lambda _: 16) -> None:
        while self.now_s < until_s:
            count, now_rows = self.tuner.next_count(), rows(len(self.passes))
            took_s = self.seconds(count, self.now_s) * now_rows / 16
            self.now_s += took_s
            self.passes.append(count)
            self.tuner.took(now_rows, took_s)


def alone(count: int, _now_s: float) -> float:
    return 0.02 / count


def crowded(_count: int, _now_s: float) -> float:
    return 0.02


@pytest.mark.parametrize(
    ("current", "other", "gain", "better"),
    [
        pytest.param(1, 2, 1.25, True, id="more bring enough"),
        pytest.param(1, 2, 1.24, False, id="more bring too little"),
        pytest.param(2, 1, 1.2, False, id="more bring little, but run already"),
        pytest.param(2, 1, 1.14, True, id="what runs brings too little"),
        pytest.param(2, 1, 0.5, True, id="what runs waits for cores that others have"),
    ],
)
def test_what_runs_stays_between_the_two_gains(current: int, other: int, gain: float, better: bool) -> None:
    assert is_better(current, other, gain) is better


def test_who_started_in_a_crowd_takes_the_machine_when_it_is_free() -> None:
    machine = Machine([1, 2], 1, lambda count, now_s: (crowded if now_s < 5 else alone)(count, now_s))
    machine.run(5)
    assert machine.tuner.chosen == 1
    machine.run(14)
    assert machine.tuner.chosen == 2


def test_who_had_the_machine_gives_it_up_beside_others_and_takes_it_again() -> None:
    machine = Machine([1, 2], 2, lambda count, now_s: (crowded if 100 < now_s < 300 else alone)(count, now_s))
    machine.run(100)
    assert machine.tuner.chosen == 2
    machine.run(200)
    assert machine.tuner.chosen == 1
    machine.run(400)
    assert machine.tuner.chosen == 2


@pytest.mark.parametrize(
    ("seconds", "chosen", "tried"),
    [
        pytest.param(
            {1: 0.02, 2: 0.01, 4: 0.006, 8: 0.0058}, 4, {1, 2, 4, 8}, id="eight are no better than four"
        ),
        pytest.param(
            {1: 0.02, 2: 0.018, 4: 0.01, 8: 0.005}, 1, {1, 2}, id="two bring little: nobody asks for four"
        ),
        pytest.param({1: 0.02, 2: 0.016, 4: 0.014, 8: 0.0124}, 2, {1, 2, 4}, id="each brings a little"),
    ],
)
def test_it_climbs_to_the_last_number_that_brings_enough(
    seconds: dict[int, float], chosen: int, tried: set[int]
) -> None:
    machine = Machine([1, 2, 4, 8], 1, lambda count, _: seconds[count])
    machine.run(120)
    settled = len(machine.passes)
    assert machine.tuner.chosen == chosen and set(machine.passes) == tried
    machine.run(720)
    others = sum(count != chosen for count in machine.passes[settled:])
    assert others <= 6 * 12, "it stays there: a trial a minute"


def test_trials_are_few_where_nothing_changes() -> None:
    machine = Machine([1, 2], 1, crowded)
    machine.run(600)
    tried = machine.passes.count(2)
    assert 6 * 8 <= tried <= 6 * 20, "trials after 1, 2, 4, ... and then each 60 s"
    assert tried < len(machine.passes) / 200


@pytest.mark.parametrize("every", [2, 3, 5, 8])
def test_passes_of_other_sizes_are_not_compared(every: int) -> None:
    """Prompts and answers by turns: what is in a prompt's pass says nothing of the threads."""
    machine = Machine([1, 2], 1, alone)
    machine.run(30, lambda number: 256 if number % every == 0 else 16)
    assert machine.tuner.chosen == 2
    machine = Machine([1, 2], 1, crowded)
    machine.run(30, lambda number: 256 if number % every == 0 else 16)
    assert machine.tuner.chosen == 1


def test_a_trial_ends_though_no_two_passes_are_of_a_size() -> None:
    machine = Machine([1, 2], 1, alone)
    machine.run(600, lambda number: 16 + 100 * (number % 7))
    assert machine.tuner.chosen == 1
    assert machine.passes.count(2) <= 18 * 20


def test_a_number_that_takes_twice_as_long_is_given_up_at_once() -> None:
    machine = Machine([1, 16], 16, lambda count, _: 0.32 / count)
    machine.run(600)
    assert machine.tuner.chosen == 16
    assert machine.passes.count(1) <= 2 * 20


def test_one_core_has_nothing_to_try() -> None:
    machine = Machine([1], 1, alone)
    machine.run(100)
    assert set(machine.passes) == {1}
