"""Vectors are cut, made of length 1 and packed; what cannot be had is refused with a code."""

from __future__ import annotations

import struct

import pytest

from services.worker.vectors import MAX_RESULT_BYTES, VectorRefused, pack_vector
from shared.messages import MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("values", "dimensions", "packed"),
    [
        ((3.0, 4.0), None, (0.6, 0.8)),
        ((3.0, 4.0, 12.0), 2, (0.6, 0.8)),
        ((3.0, 4.0), 2, (0.6, 0.8)),
        ((-5.0, 1.0), 1, (-1.0,)),
        ((0.0, 0.0), None, (0.0, 0.0)),
        ((0.0, 2.0), 1, (0.0,)),
        ((3e38, 4e38), None, (0.6, 0.8)),
    ],
)
def test_a_vector_is_cut_and_made_of_length_one(
    values: tuple[float, ...], dimensions: int | None, packed: tuple[float, ...]
) -> None:
    found = struct.unpack(f"<{len(packed)}f", pack_vector(values, dimensions, 1))
    assert found == pytest.approx(packed, abs=1e-7)


def test_more_dimensions_than_there_are_is_refused() -> None:
    with pytest.raises(VectorRefused) as refused:
        pack_vector((1.0, 2.0), 3, 1)
    assert refused.value.code == "invalid_dimensions"


def test_a_result_that_fits_no_message_is_refused_at_its_first_vector() -> None:
    size = MAX_RESULT_BYTES // 4 // 64
    assert len(pack_vector((1.0,) * size, None, 64)) * 64 == MAX_RESULT_BYTES
    with pytest.raises(VectorRefused) as refused:
        pack_vector((1.0,) * (size + 1), None, 64)
    assert refused.value.code == "result_too_large"
    # The same cut to what fits.
    assert len(pack_vector((1.0,) * (size + 1), size, 64)) == 4 * size
    assert MAX_RESULT_BYTES * 4 / 3 < MAX_MESSAGE_BYTES - 64 * 1024
