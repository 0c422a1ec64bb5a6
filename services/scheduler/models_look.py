"""When the table of models and the sets of pins are brought up to date, and what happens when that fails.

Where models are is shown and made faster; places are granted and drained without it. So an error there is counted, logged
and tried again with the next second, and neither of the two keeps the other from its work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import structlog

from services.scheduler.pin_keeper import PinKeeper
from services.scheduler.residency_keeper import ResidencyKeeper
from services.scheduler.snapshot import Stored
from shared.lease import Fenced
from shared.messages import WorkerReport
from shared.outcomes import Unavailable

log = structlog.get_logger()

EVERY_S = 1.0


class ModelsLook:
    def __init__(
        self,
        residency: ResidencyKeeper,
        pins: PinKeeper,
        failed: Callable[[str], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """failed: counts a failure, by its cause."""
        self._pins = pins
        self._parts = (("models", residency.keep), ("pins", pins.look))
        self._failed = failed
        self._now_s = now_s
        self._looked_s = float("-inf")
        self._pins_failed = False

    async def follow(self, stored: Stored, workers: Mapping[str, tuple[WorkerReport, float]]) -> None:
        """Each second; earlier when a worker is new, whose start names its pins. Raises `Fenced`, `Unavailable`."""
        now_s = self._now_s()
        has_new = not self._pins_failed and not self._pins.knows_all(stored)
        if now_s - self._looked_s <= EVERY_S and not has_new:
            return
        self._looked_s, self._pins_failed = now_s, False
        for cause, look in self._parts:
            try:
                await look(stored, workers)
            except (Fenced, Unavailable):
                raise
            except Exception:
                self._pins_failed |= cause == "pins"
                self._failed(cause)
                log.exception("models_not_followed", cause=cause)
