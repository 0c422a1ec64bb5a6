"""An error of what is said about models ends neither the look nor the other half of it, and is tried again, not at once."""

from __future__ import annotations

from typing import Any

import pytest

from services.scheduler.models_look import EVERY_S, ModelsLook
from services.scheduler.snapshot import Stored
from shared.lease import Fenced
from shared.outcomes import Unavailable
from tests.unit.scheduler.builders import NOW

STORED = Stored(now=NOW, resources=[], places=[])


class Part:
    """Stands for both keepers; raises what it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None
        self.is_complete = True

    async def keep(self, stored: Stored, workers: Any) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error

    look = keep

    def knows_all(self, stored: Stored) -> bool:
        return self.is_complete


class Bench:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.residency, self.pins = Part(), Part()
        self.failures: list[str] = []
        self._look = ModelsLook(self.residency, self.pins, self.failures.append, lambda: self.now_s)  # type: ignore[arg-type]

    async def follow(self, passed_s: float) -> tuple[int, int]:
        """Look after so long; return how often each part was asked so far."""
        self.now_s += passed_s
        await self._look.follow(STORED, {})
        return self.residency.calls, self.pins.calls


async def test_it_looks_each_second_and_at_once_when_a_worker_is_new() -> None:
    bench = Bench()
    assert await bench.follow(0.0) == (1, 1)
    assert await bench.follow(EVERY_S / 2) == (1, 1)
    bench.pins.is_complete = False
    assert await bench.follow(0.01) == (2, 2)
    bench.pins.is_complete = True
    assert await bench.follow(EVERY_S * 1.1) == (3, 3)


@pytest.mark.parametrize("broken", ["models", "pins"])
async def test_what_fails_is_counted_and_tried_again_with_the_next_second_and_the_other_goes_on(
    broken: str,
) -> None:
    bench = Bench()
    part = bench.residency if broken == "models" else bench.pins
    part.error = ZeroDivisionError()
    assert await bench.follow(0.0) == (1, 1)
    assert bench.failures == [broken]
    bench.pins.is_complete = broken == "models"  # what could not look knows nothing of whoever is new
    assert await bench.follow(EVERY_S / 2) == (1, 1), "tried again at once, and again, and again"
    assert await bench.follow(EVERY_S) == (2, 2)
    part.error, bench.pins.is_complete = None, True
    assert await bench.follow(EVERY_S * 1.1) == (3, 3)
    assert bench.failures == [broken, broken]


@pytest.mark.parametrize("error", [Fenced("epoch 1"), Unavailable("database")])
async def test_what_ends_the_look_as_a_whole_is_handed_on(error: Exception) -> None:
    bench = Bench()
    bench.residency.error = error
    with pytest.raises(type(error)):
        await bench.follow(0.0)
    assert bench.failures == []
