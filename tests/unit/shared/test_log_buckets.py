"""Durations in buckets: how close quantiles are, and that merging changes nothing."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.log_buckets import (
    BOUNDS_US,
    RELATIVE_ERROR,
    bucket_of,
    bucket_sql,
    counts_of,
    merge,
    quantile_ms,
    value_ms,
)

HOURS_100_MS = 100 * 3_600_000.0
measurable_ms = st.integers(100, 100 * 3_600_000_000 - 1).map(lambda us: us / 1000)
any_ms = st.one_of(measurable_ms, st.floats(0, 2000), st.just(0.0))


def exact(durations: list[float], percent: int) -> float:
    """The duration at the rank, by its definition."""
    return sorted(durations)[math.ceil(len(durations) * percent / 100) - 1]


@pytest.mark.parametrize(
    ("duration_ms", "bucket"),
    [
        (-5.0, 0),
        (0.0, 0),
        (0.0994, 0),
        (0.0996, 1),  # rounded to whole microseconds first
        (0.1, 1),
        (0.101, 1),
        (0.102, 2),
        (HOURS_100_MS - 0.001, len(BOUNDS_US) - 1),
        (HOURS_100_MS, len(BOUNDS_US)),
        (math.inf, len(BOUNDS_US)),
        (math.nan, len(BOUNDS_US)),
    ],
)
def test_a_duration_has_its_bucket(duration_ms: float, bucket: int) -> None:
    assert bucket_of(duration_ms) == bucket


def test_bounds_rise_and_are_few() -> None:
    assert list(BOUNDS_US) == sorted(set(BOUNDS_US)) and len(BOUNDS_US) < 1200
    assert value_ms(0) == 0.0 and value_ms(len(BOUNDS_US)) == HOURS_100_MS


@pytest.mark.parametrize("bucket", [-1, len(BOUNDS_US) + 1])
def test_what_is_no_bucket_is_refused(bucket: int) -> None:
    with pytest.raises(ValueError, match="no bucket"):
        value_ms(bucket)


@given(measurable_ms)
def test_a_duration_is_told_within_the_error(duration_ms: float) -> None:
    assert value_ms(bucket_of(duration_ms)) == pytest.approx(duration_ms, rel=RELATIVE_ERROR + 1e-9)


@given(st.lists(measurable_ms, min_size=1), st.integers(1, 100))
def test_a_quantile_is_within_the_error_of_the_exact_one(durations: list[float], percent: int) -> None:
    told = quantile_ms(Counter(map(bucket_of, durations)), percent)
    assert told == pytest.approx(exact(durations, percent), rel=RELATIVE_ERROR + 1e-9)


@given(st.lists(st.lists(any_ms)), st.integers(1, 100))
def test_counts_that_are_merged_are_those_of_all_durations(parts: list[list[float]], percent: int) -> None:
    merged = merge(Counter(map(bucket_of, part)) for part in parts)
    whole = Counter(bucket_of(duration) for part in parts for duration in part)
    assert merged == whole
    assert quantile_ms(merged, percent) == quantile_ms(whole, percent)


@given(st.lists(any_ms, min_size=1))
def test_quantiles_do_not_fall(durations: list[float]) -> None:
    counts = Counter(map(bucket_of, durations))
    told = [quantile_ms(counts, percent) for percent in range(1, 101)]
    assert None not in told and told == sorted(told, key=lambda each: each or 0.0)


@given(any_ms, any_ms)
def test_a_longer_duration_is_in_no_lower_bucket(one: float, other: float) -> None:
    assert bucket_of(min(one, other)) <= bucket_of(max(one, other))


def test_of_nothing_there_is_no_quantile() -> None:
    assert quantile_ms({}, 95) is None and quantile_ms({3: 0}, 95) is None
    for percent in (0, 101):
        with pytest.raises(ValueError, match="percentage"):
            quantile_ms({1: 1}, percent)


def test_arrays_of_unequal_length_are_refused() -> None:
    assert counts_of([1, 4], [2, 3]) == {1: 2, 4: 3}
    with pytest.raises(ValueError, match="zip"):
        counts_of([1], [])


def test_the_expression_stands_in_parentheses() -> None:
    assert "round((a + b)::float8 * 1000)" in bucket_sql("a + b")
