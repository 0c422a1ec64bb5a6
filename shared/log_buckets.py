"""Pure: durations counted in buckets that grow by the same share, so that quantiles of merged counts stay close.

Billing counts with `bucket_sql`, whoever tells quantiles reads with `quantile_ms`: both use the same bounds, which are whole
microseconds made by integer arithmetic, so that the database and every machine's Python agree to the last bucket.
Source: DDSketch (Masson, Rim, Lee: VLDB 2019); its bounds are powers of a float, ours are stored numbers.

1. Bucket 0 holds what is shorter than 0.1 ms, and is told as 0.
2. Bucket i holds bounds[i-1] <= duration < bounds[i]; it is told as the point from which both ends are equally far by
   their own measure, at most `RELATIVE_ERROR` from anything in it.
3. The last bucket holds everything from 100 hours on, and is told as 100 hours.
4. A quantile is the duration of the request at rank ceil(q * count), as `percentile_disc` has it: never a number between
   two requests.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

RELATIVE_ERROR = 0.01
_SHARE = (101, 99)
"""(1 + error) / (1 - error)."""
_FIRST_US = 100
_LAST_US = 100 * 3600 * 1_000_000
_MOST_US = 10**15
"""What is longer is taken for this: it is a wrong clock, and must fit into a bigint."""

Counts = dict[int, int]
"""How many durations by bucket."""


def _make_bounds() -> tuple[int, ...]:
    up, down = _SHARE
    bounds = [_FIRST_US]
    while bounds[-1] < _LAST_US:
        bounds.append(min(max(bounds[-1] + 1, bounds[-1] * up // down), _LAST_US))
    return tuple(bounds)


BOUNDS_US = _make_bounds()


def bucket_of(duration_ms: float) -> int:
    """The bucket of a duration. What is negative (two clocks) or no number counts as `bucket_sql` does."""
    if math.isnan(duration_ms):
        return len(BOUNDS_US)
    return bisect_right(BOUNDS_US, round(min(max(duration_ms * 1000, 0.0), float(_MOST_US))))


def bucket_sql(expression: str) -> str:
    """SQL for the bucket of an expression in milliseconds that is not null."""
    microseconds = (
        f"least(greatest(round(({expression})::float8 * 1000), 0::float8), {_MOST_US}::float8)::bigint"
    )
    return f"width_bucket({microseconds}, '{{{','.join(map(str, BOUNDS_US))}}}'::bigint[])"


def value_ms(bucket: int) -> float:
    """What a duration in the bucket is told as. Raises `ValueError` for what is no bucket."""
    if not 0 <= bucket <= len(BOUNDS_US):
        raise ValueError(f"there is no bucket {bucket}")
    if bucket == 0:
        return 0.0
    if bucket == len(BOUNDS_US):
        return BOUNDS_US[-1] / 1000
    low, high = BOUNDS_US[bucket - 1], BOUNDS_US[bucket]
    return 2 * low * high / (low + high) / 1000


def counts_of(buckets: Sequence[int], counts: Sequence[int]) -> Counts:
    """Counts from the two arrays that the database keeps."""
    return dict(zip(buckets, counts, strict=True))


def merge(several: Iterable[Mapping[int, int]]) -> Counts:
    """The counts of all together: the same as if all durations had been counted at once."""
    merged: Counts = {}
    for counts in several:
        for bucket, count in counts.items():
            merged[bucket] = merged.get(bucket, 0) + count
    return merged


def quantile_ms(counts: Mapping[int, int], percent: int) -> float | None:
    """The quantile in milliseconds; None of nothing. `percent`: 1 to 100, whole so that the rank is exact."""
    if not 1 <= percent <= 100:
        raise ValueError("a percentage from 1 to 100")
    rank = -(-sum(counts.values()) * percent // 100)
    seen = 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen >= rank > 0:
            return value_ms(bucket)
    return None
