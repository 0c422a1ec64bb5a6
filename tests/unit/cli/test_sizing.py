"""Bounds from volumes, and what levels of a benchmark come to."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli.bench_report import Level, best_rpm_per_gpu, level_json, percentile_ms, read_levels
from services.cli.sizing import MOST_GPUS, Size, SizeError, choose_size, measured_rpm


@pytest.mark.parametrize(
    ("lowest", "peak", "per_gpu", "headroom", "size"),
    [
        (200, 1500, 100, 0, Size(2, 16)),
        (201, 1500, 100, 0, Size(3, 16)),
        (200, 1499.9, 100, 0, Size(2, 15)),
        (0, 0, 100, 0, Size(0, 1)),
        (0, 1, 100, 0, Size(0, 1)),
        (100, 100, 100, 0, Size(1, 2)),
        (200, 1500, 100, 20, Size(2, 19)),
        (0.3, 0.3, 0.1, 0, Size(3, 4)),  # a float's 0.3 / 0.1 is 2.9999999999999996
    ],
)
def test_a_size_serves_the_lowest_volume_and_more_than_the_peak(
    lowest: float, peak: float, per_gpu: float, headroom: float, size: Size
) -> None:
    assert choose_size(lowest, peak, per_gpu, headroom) == size


@pytest.mark.parametrize(
    ("lowest", "peak", "per_gpu", "headroom", "words"),
    [
        (1, 2, 0, 0, "above 0"),
        (1, 2, -5, 0, "above 0"),
        (-1, 2, 5, 0, "below 0"),
        (1, 2, 5, -1, "below 0"),
        (3, 2, 5, 0, "peak"),
        (1, math.inf, 5, 0, "number"),
        (math.nan, 2, 5, 0, "number"),
        (0, 1e12, 1, 0, "GPUs"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(
    lowest: float, peak: float, per_gpu: float, headroom: float, words: str
) -> None:
    with pytest.raises(SizeError, match=words):
        choose_size(lowest, peak, per_gpu, headroom)


volumes = st.integers(0, 5000)


@given(volumes, volumes, st.integers(1, 500))
def test_the_bounds_are_the_tightest(one: int, other: int, per_gpu: int) -> None:
    lowest, peak = sorted((one, other))
    size = choose_size(lowest, peak, per_gpu)
    assert 0 <= size.min <= size.max <= MOST_GPUS
    assert size.min * per_gpu >= lowest and (size.min == 0 or (size.min - 1) * per_gpu < lowest)
    assert size.max * per_gpu > peak >= (size.max - 1) * per_gpu


@pytest.mark.parametrize(
    ("points", "rpm"),
    [
        ([], None),
        ([(0, 3_600_000)], None),
        ([(500, 599_999)], None),
        ([(500, 600_000)], 50.0),
        ([(500, 600_000), (7200, 3_600_000), (100, 3_600_000)], 120.0),
    ],
)
def test_a_gpu_is_measured_by_its_best_hour(points: list[tuple[int, int]], rpm: float | None) -> None:
    assert measured_rpm({"requests": n, "busy_ms": busy_ms} for n, busy_ms in points) == rpm


@pytest.mark.parametrize(("text", "levels"), [("1", [1]), ("1,2,4,8", [1, 2, 4, 8]), (" 3, 256 ", [3, 256])])
def test_levels_are_read(text: str, levels: list[int]) -> None:
    assert read_levels(text) == levels


@pytest.mark.parametrize("text", ["", ",", "0,1", "1,257", "2,1", "1,1", "1,two", "-1", "1,,2", "1.5"])
def test_what_are_no_levels_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="concurrency"):
        read_levels(text)


def test_a_level_tells_latency_and_volume_of_one_gpu() -> None:
    level = Level(4, 30.0, [float(n) for n in range(100, 0, -1)])
    told = level_json(level, 2)
    assert told == {
        "concurrency": 4,
        "requests": 100,
        "latency_ms": {"p50": 50.0, "p95": 95.0},
        "requests_per_minute": 200.0,
        "requests_per_minute_per_gpu": 100.0,
    }
    of_shared = level_json(level, None)
    assert of_shared["requests_per_minute_per_gpu"] is None
    assert percentile_ms([7.0], 95) == percentile_ms([7.0], 50) == 7.0
    better: dict[str, Any] = told | {"requests_per_minute_per_gpu": 130.5}
    assert best_rpm_per_gpu([told, better, of_shared]) == 130.5 and best_rpm_per_gpu([of_shared]) is None
