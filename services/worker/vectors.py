"""The vectors of an embedding job: cut, made of length 1, packed. Pure."""

from __future__ import annotations

import array
import math
import sys
from collections.abc import Sequence

PLACES = 4
"""Inputs of one job in the engine at once: enough to fill a pass, few enough that others' answers go on beside them."""

MAX_RESULT_BYTES = 5 * 1024 * 1024
"""Of all vectors of a job. In the message they take a third more, which has to stay under its limit."""


class VectorRefused(ValueError):
    """The vector cannot be had as it was asked for; `code` goes to the owner."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def pack_vector(values: Sequence[float], dimensions: int | None, inputs: int) -> bytes:
    """Little-endian fp32 of length 1. inputs: how many vectors the job's result will hold. Raises `VectorRefused`.

    1. More dimensions than the model has -> invalid_dimensions.
    2. The whole result would be over `MAX_RESULT_BYTES` -> result_too_large.
    3. The first `dimensions` values, divided by their length; one of zeros only stays as it is.
    """
    size = len(values) if dimensions is None else dimensions
    if size > len(values):  # 1
        raise VectorRefused("invalid_dimensions", f"the model's vectors have {len(values)} values")
    if 4 * size * inputs > MAX_RESULT_BYTES:  # 2
        raise VectorRefused("result_too_large", f"{inputs} vectors of {size} values are too many for one job")
    length = math.hypot(*values[:size]) or 1.0  # 3
    packed = array.array("f", [value / length for value in values[:size]])
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
