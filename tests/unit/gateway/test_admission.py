from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.admission import Admit, Limits, Refuse, admit, rate_headers
from services.gateway.rate_limit import Rate, RateRule, take_from

LIMITS = Limits(team_in_flight=2, gateway_in_flight=4)
FREE = Rate(True, 10, 9, 0.1, 0.0)
OVER = Rate(False, 10, 0, 5.0, 2.4)


@pytest.mark.parametrize(
    ("rate", "team", "gateway", "expected"),
    [
        (FREE, 0, 0, None),
        (FREE, 1, 3, None),
        (FREE, 2, 2, (429, "concurrency_limit_exceeded", 1)),
        (FREE, 0, 4, (503, "overloaded", 2)),
        (OVER, 0, 0, (429, "rate_limit_exceeded", 3)),
        (OVER, 2, 2, (429, "rate_limit_exceeded", 3)),
        (OVER, 2, 4, (503, "overloaded", 2)),
    ],
)
def test_admission(rate: Rate, team: int, gateway: int, expected: tuple[int, str, int] | None) -> None:
    decision = admit(rate, team, gateway, LIMITS)
    if expected is None:
        assert decision == Admit()
    else:
        assert isinstance(decision, Refuse)
        assert (decision.status, decision.code, decision.retry_after_s) == expected


def test_the_rate_is_told_in_openais_headers() -> None:
    assert rate_headers(OVER) == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "5.000s",
    }


def test_a_burst_fits_and_then_one_request_each_interval() -> None:
    rule = RateRule(requests_per_s=10.0, burst=3)
    tat_s, allowed_at = 0.0, []
    for tenth in range(100):
        now_s = 100 + tenth * 0.01
        allowed, tat_s = take_from(tat_s, now_s, rule)
        if allowed:
            allowed_at.append(tenth)
    assert allowed_at[:3] == [0, 1, 2]
    assert allowed_at[3:] == list(range(10, 100, 10))


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=200), st.floats(1, 100), st.integers(1, 20))
def test_no_window_ever_holds_more_than_burst_and_rate(gaps_s: list[float], per_s: float, burst: int) -> None:
    rule = RateRule(per_s, burst)
    now_s, tat_s = 1000.0, 0.0
    times: list[float] = []
    for gap_s in gaps_s:
        now_s += gap_s
        allowed, tat_s = take_from(tat_s, now_s, rule)
        if allowed:
            times.append(now_s)
    for first in range(len(times)):
        for last in range(first, len(times)):
            assert last - first + 1 <= burst + (times[last] - times[first]) * per_s + 1e-6
