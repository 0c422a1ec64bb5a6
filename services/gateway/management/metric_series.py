"""Pure: which window of metrics is asked for, and the series of points that its rows come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from services.gateway.management.acting import read_time, timestamp
from services.gateway.metric_views import Grain, Window
from shared.inference.errors import bad_request
from shared.log_buckets import Counts, counts_of, merge, quantile_ms

Row = Any
"""A row by the names of its columns: asyncpg's records are no mappings to a type checker."""
MEASURES = ("response", "queue", "swap", "first_token")
COUNTED = ("requests", "errors", "cancelled", "prompt_tokens", "completion_tokens")
PERCENTS = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class BucketRule:
    """`longest` bounds how many points an answer has, `kept` is for how long billing keeps what is read."""

    step: timedelta
    grain: Grain
    usual: timedelta
    longest: timedelta
    kept: timedelta


RULES: dict[str, BucketRule] = {
    "minute": BucketRule(
        timedelta(minutes=1), "minute", timedelta(hours=1), timedelta(hours=24), timedelta(days=30)
    ),
    "hour": BucketRule(
        timedelta(hours=1), "hour", timedelta(days=1), timedelta(days=31), timedelta(days=400)
    ),
    "day": BucketRule(timedelta(days=1), "hour", timedelta(days=30), timedelta(days=93), timedelta(days=400)),
}
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def read_window(query: Mapping[str, str], now: datetime) -> tuple[Window, str]:
    """Return the window that a query asks for. Raises `ApiError` 400.

    1. `bucket` is minute (the default), hour or day, in UTC.
    2. `to` is now, and `from` an hour, a day or thirty days before it, if they are left out.
    3. Both are moved outwards to whole buckets: a point tells of a whole bucket.
    4. A window that is too long for its bucket, or begins before what is kept, is refused rather than cut.
    """
    bucket = query.get("bucket", "minute")  # 1
    if bucket not in RULES:
        raise bad_request("invalid_value", f"bucket must be one of {', '.join(RULES)}.", "bucket")
    rule = RULES[bucket]
    end = read_time(query["to"], "to") if "to" in query else now  # 2
    start = read_time(query["from"], "from") if "from" in query else end - rule.usual
    if not start < end:
        raise bad_request("invalid_value", "from must be before to.", "from")
    if end - start > rule.longest:  # 4
        longest = rule.longest // timedelta(hours=1)
        raise bad_request("invalid_value", f"By the {bucket} a window is {longest} hours at most.", "from")
    if start < now - rule.kept - timedelta(
        minutes=1
    ):  # a minute of grace, as clients compute it before they ask
        raise bad_request(
            "invalid_value", f"By the {bucket} metrics are kept for {rule.kept.days} days.", "from"
        )
    first = start - (start - _EPOCH) % rule.step  # 3
    last = end + (_EPOCH - end) % rule.step
    return Window(first, last, rule.step, rule.grain), bucket


@dataclass(slots=True)
class Sums:
    """What is known of a step, or of all of them."""

    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    durations: dict[str, Counts] = field(default_factory=lambda: {measure: {} for measure in MEASURES})
    busy_ms: int = 0
    live_ms: int = 0

    def add(self, other: Sums) -> None:
        for name in COUNTED:
            self.counted[name] += other.counted[name]
        for measure in MEASURES:
            self.durations[measure] = merge((self.durations[measure], other.durations[measure]))
        self.busy_ms += other.busy_ms
        self.live_ms += other.live_ms


def steps_of(
    window: Window, counts: Iterable[Row], histograms: Iterable[Row], busy: Iterable[Row], live: Iterable[Row]
) -> dict[datetime, Sums]:
    """Return every step of the window, oldest first, with what the rows say of it."""
    steps = {
        window.start + number * window.step: Sums()
        for number in range((window.end - window.start) // window.step)
    }
    for row in counts:
        steps[row["start"]].counted = {name: row[name] for name in COUNTED}
    for row in histograms:
        steps[row["start"]].durations[row["measure"]] = counts_of(row["buckets"], row["counts"])
    for row in busy:
        steps[row["start"]].busy_ms = row["busy_ms"]
    for row in live:
        steps[row["start"]].live_ms = row["live_ms"]
    return steps


def series_json(window: Window, steps: Mapping[datetime, Sums], now: datetime) -> dict[str, Any]:
    """Return the points, and one for the whole window."""
    total = Sums()
    for sums in steps.values():
        total.add(sums)
    return {
        "from": timestamp(window.start),
        "to": timestamp(window.end),
        "total": point_json(window.start, window.end, total, now),
        "data": [point_json(start, start + window.step, sums, now) for start, sums in steps.items()],
    }


def point_json(start: datetime, end: datetime, sums: Sums, now: datetime) -> dict[str, Any]:
    """Return a point. Of a step that still runs, rates are by the time that has passed of it.

    A worker's last report is some seconds old, so GPUs may have been busy for a little longer than they are known to
    have been live: utilisation is 1 at most.
    """
    passed_ms = max((min(end, now) - start) // timedelta(milliseconds=1), 1)
    tokens = sums.counted["completion_tokens"]
    utilisation = min(sums.busy_ms / sums.live_ms, 1.0) if sums.live_ms else None
    return {
        "start": timestamp(start),
        **sums.counted,
        "requests_per_minute": _rounded(sums.counted["requests"] * 60_000 / passed_ms),
        "completion_tokens_per_s": _rounded(tokens * 1000 / passed_ms),
        "live_gpus": _rounded(sums.live_ms / passed_ms),
        "live_ms": sums.live_ms,
        "busy_ms": sums.busy_ms,
        "utilisation": None if utilisation is None else _rounded(utilisation),
        **{f"{measure}_ms": _quantiles(sums.durations[measure]) for measure in MEASURES},
    }


def _quantiles(counts: Counts) -> dict[str, float | None]:
    told = {percent: quantile_ms(counts, percent) for percent in PERCENTS}
    return {f"p{percent}": None if value is None else _rounded(value) for percent, value in told.items()}


def _rounded(value: float) -> float:
    return round(value, 4)
