"""Which window is asked for, and what a point tells of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.gateway.management.metric_series import Sums, point_json, read_window, series_json, steps_of
from services.gateway.metric_views import Window
from shared.inference.errors import ApiError
from shared.log_buckets import bucket_of

NOW = datetime(2026, 11, 28, 12, 34, 56, 789000, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("query", "start", "end", "grain"),
    [
        ({}, "2026-11-28T11:34", "2026-11-28T12:35", "minute"),
        ({"bucket": "hour"}, "2026-11-27T12:00", "2026-11-28T13:00", "hour"),
        ({"bucket": "day"}, "2026-10-29T00:00", "2026-11-29T00:00", "hour"),
        ({"from": "2026-11-28T10:00:30Z", "to": "2026-11-28T10:01:00Z"}, "2026-11-28T10:00", "2026-11-28T10:01", "minute"),
        ({"from": "2026-11-28T12:00:00+02:00", "to": "2026-11-28T10:59:01Z"}, "2026-11-28T10:00", "2026-11-28T11:00", "minute"),
        ({"bucket": "day", "from": "2026-11-01", "to": "2026-11-02"}, "2026-11-01T00:00", "2026-11-02T00:00", "hour"),
    ],
)  # fmt: skip
def test_a_window_is_of_whole_buckets(query: dict[str, str], start: str, end: str, grain: str) -> None:
    window, _ = read_window(query, NOW)
    assert (window.start, window.end) == (
        datetime.fromisoformat(start + "+00:00"),
        datetime.fromisoformat(end + "+00:00"),
    )
    assert window.grain == grain and (window.end - window.start) % window.step == timedelta(0)


@pytest.mark.parametrize(
    "query",
    [
        {"bucket": "second"},
        {"from": "2026-11-28T12:00:00Z", "to": "2026-11-28T12:00:00Z"},
        {"from": "2026-11-28T12:00:00Z", "to": "2026-11-28T11:00:00Z"},
        {"from": "2026-11-27T12:00:00Z", "to": "2026-11-28T12:00:01Z"},
        {"bucket": "hour", "from": "2026-10-27T12:00:00Z", "to": "2026-11-28T12:00:00Z"},
        {"bucket": "day", "from": "2026-08-20", "to": "2026-11-28"},
        {"from": "2026-10-29T12:00:00Z", "to": "2026-10-29T13:00:00Z"},
        {"bucket": "hour", "from": "2025-10-20", "to": "2025-10-21"},
        {"to": "noon"},
    ],
)
def test_a_window_that_cannot_be_told_of_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(ApiError) as refused:
        read_window(query, NOW)
    assert refused.value.status == 400


def test_every_step_has_a_point_and_the_total_is_of_all_requests() -> None:
    start = NOW.replace(second=0, microsecond=0) - 3 * MINUTE
    window = Window(start, start + 3 * MINUTE, MINUTE, "minute")
    counted = {"errors": 1, "cancelled": 0, "prompt_tokens": 10, "completion_tokens": 60}
    steps = steps_of(
        window,
        [{"start": start + number * MINUTE, "requests": requests, **counted} for number, requests in ((0, 99), (2, 1))],
        [
            {"start": start, "measure": "response", "buckets": [bucket_of(10.0)], "counts": [98]},
            {"start": start + 2 * MINUTE, "measure": "response", "buckets": [bucket_of(900.0)], "counts": [1]},
        ],
        [{"start": start, "busy_ms": 30_000}],
        [{"start": start, "live_ms": 60_000}, {"start": start + 2 * MINUTE, "live_ms": 30_000}],
    )  # fmt: skip
    told = series_json(window, steps, NOW)
    assert [point["requests"] for point in told["data"]] == [99, 0, 1]
    assert [point["live_gpus"] for point in told["data"]] == [1, 0, 0.5]
    assert [point["utilisation"] for point in told["data"]] == [0.5, None, 0]
    assert told["total"]["requests"] == 100 and told["total"]["errors"] == 2
    assert told["total"]["utilisation"] == pytest.approx(1 / 3, abs=1e-4)
    assert told["total"]["completion_tokens_per_s"] == pytest.approx(120 / 180, abs=1e-4)
    # ranks 50, 95 and 99 of 99 requests, of which 98 took ten milliseconds
    assert told["total"]["response_ms"]["p95"] == pytest.approx(10.0, rel=0.01)
    assert told["total"]["response_ms"]["p99"] == pytest.approx(900.0, rel=0.01)
    assert told["data"][1]["response_ms"] == {"p50": None, "p95": None, "p99": None}


def test_rates_of_a_step_that_still_runs_are_by_the_time_that_has_passed() -> None:
    sums = Sums(live_ms=30_000, busy_ms=31_000)
    sums.counted |= {"requests": 60, "completion_tokens": 300}
    start = NOW - timedelta(seconds=30)
    point = point_json(start, start + MINUTE, sums, NOW)
    assert (point["requests_per_minute"], point["completion_tokens_per_s"]) == (120, 10)
    assert (point["live_gpus"], point["utilisation"]) == (1, 1)
    ahead = point_json(NOW + MINUTE, NOW + 2 * MINUTE, Sums(), NOW)
    assert (ahead["requests_per_minute"], ahead["live_gpus"]) == (0, 0)
