"""Pure: how many GPUs a resource needs for a request volume, and how much one GPU was seen to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

MOST_GPUS = 10_000
"""More is a slip of the pen: the numbers are requests a minute, not a day."""
SEEN_BUSY_MS = 600_000
"""An hour in which GPUs were busy for less than this says little about what they can do."""


@dataclass(frozen=True, slots=True)
class Size:
    min: int
    max: int


class SizeError(ValueError):
    """The numbers cannot be meant."""


def choose_size(min_rpm: float, peak_rpm: float, rpm_per_gpu: float, headroom_percent: float = 0) -> Size:
    """Return the bounds for autoscaling; all volumes in requests a minute. Raises `SizeError`.

    1. The minimum is the least number of GPUs that serves the lowest volume; none for none.
    2. The maximum is the least number that serves more than the peak and its headroom: at exactly the peak every
       moment above it would make requests wait.
    3. Decimals count as they are written: 0.1 requests a minute are a tenth.
    """
    lowest, peak, per_gpu, headroom = (
        _exact(value) for value in (min_rpm, peak_rpm, rpm_per_gpu, headroom_percent)
    )
    if per_gpu <= 0:
        raise SizeError("what a GPU does must be above 0 requests a minute")
    if lowest < 0 or headroom < 0:
        raise SizeError("volumes and headroom may not be below 0")
    if peak < lowest:
        raise SizeError("the peak may not be below the lowest volume")
    least = math.ceil(lowest / per_gpu)  # 1
    most = math.floor(peak * (1 + headroom / 100) / per_gpu) + 1  # 2
    if most > MOST_GPUS:
        raise SizeError(f"that would be {most} GPUs; more than {MOST_GPUS} are not thought of")
    return Size(least, max(most, least))


def _exact(value: float) -> Fraction:
    if not math.isfinite(value):
        raise SizeError("every volume must be a number")
    return Fraction(str(value))  # 3


def measured_rpm(points: Iterable[Mapping[str, Any]]) -> float | None:
    """Return what one GPU did in its best hour, in requests a minute of being busy; None if no hour says anything.

    Of points of a resource's metrics. It is a floor: a GPU that ran one request where it has room for eight was as busy.
    """
    return max(
        (
            round(point["requests"] * 60_000 / point["busy_ms"], 2)
            for point in points
            if point["requests"] and point["busy_ms"] >= SEEN_BUSY_MS
        ),
        default=None,
    )
