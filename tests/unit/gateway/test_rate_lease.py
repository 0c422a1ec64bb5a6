from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.rate_lease import (
    LEASE_S,
    Lease,
    Step,
    filled,
    max_permits,
    next_step,
    not_filled,
)


@pytest.mark.parametrize(
    ("requests_per_s", "burst", "expected"),
    [
        (200.0, 400, 16),  # the defaults
        (1e6, 1_000_000, 16),
        (100.0, 400, 10),  # 100 ms of the rate
        (30.0, 400, 3),
        (19.9, 400, 1),
        (1.0, 400, 1),
        (0.01, 1, 1),
        (1e6, 40, 5),  # an eighth of the burst
        (1e6, 15, 1),
        (1e6, 1, 1),
    ],
)
def test_a_tight_limit_has_no_leases(requests_per_s: float, burst: int, expected: int) -> None:
    assert max_permits(requests_per_s, burst) == expected


NOW_S = 100.0
LATER_S, BEFORE_S = NOW_S + 0.5, NOW_S - 0.5


@pytest.mark.parametrize(
    ("lease", "expected"),
    [
        # 2: spends, and fills up once a quarter is left
        (Lease(10, 16, 5, LATER_S), Step(Lease(9, 16, 6, LATER_S), spends=True)),
        (Lease(6, 16, 9, LATER_S), Step(Lease(5, 16, 10, LATER_S), spends=True)),
        (Lease(5, 16, 9, LATER_S), Step(Lease(4, 16, 0, LATER_S, True), spends=True, ask=12, fills=True)),
        (Lease(1, 16, 9, LATER_S), Step(Lease(0, 16, 0, LATER_S, True), spends=True, ask=16, fills=True)),
        (Lease(5, 16, 9, LATER_S, True), Step(Lease(4, 16, 10, LATER_S, True), spends=True)),
        # 3: empty, somebody asks
        (Lease(0, 8, 9, LATER_S, True), Step(Lease(0, 8, 10, LATER_S, True), spends=False, ask=1)),
        (Lease(4, 8, 9, BEFORE_S, True), Step(Lease(0, 8, 10, BEFORE_S, True), spends=False, ask=1)),
        # 4 and 5: empty within its time
        (Lease(0, 1, 1, LATER_S), Step(Lease(0, 2, 1, LATER_S, True), spends=False, ask=2, fills=True)),
        (Lease(0, 4, 1, LATER_S), Step(Lease(0, 8, 1, LATER_S, True), spends=False, ask=8, fills=True)),
        # 5 and 7: no more than 16
        (Lease(0, 12, 1, LATER_S), Step(Lease(0, 16, 1, LATER_S, True), spends=False, ask=16, fills=True)),
        # 1 and 6: what it holds is lost
        (Lease(10, 16, 5, BEFORE_S), Step(Lease(0, 5, 1, BEFORE_S, True), spends=False, ask=5, fills=True)),
        (Lease(10, 16, 5, NOW_S), Step(Lease(0, 5, 1, NOW_S, True), spends=False, ask=5, fills=True)),
        (Lease(0, 16, 90, BEFORE_S), Step(Lease(0, 16, 1, BEFORE_S, True), spends=False, ask=16, fills=True)),
        (Lease(16, 16, 0, BEFORE_S), Step(Lease(0, 1, 1, BEFORE_S, True), spends=False, ask=1, fills=True)),
        (Lease(), Step(Lease(0, 1, 1, 0.0, True), spends=False, ask=1, fills=True)),
    ],
)
def test_the_next_request(lease: Lease, expected: Step) -> None:
    assert next_step(lease, NOW_S, 16) == expected


@pytest.mark.parametrize("lease", [Lease(), Lease(0, 1, 1, LATER_S), Lease(0, 1, 50, BEFORE_S)])
def test_without_leases_each_request_asks_for_itself(lease: Lease) -> None:
    step = next_step(lease, NOW_S, 1)
    assert (step.spends, step.ask, step.lease.permits) == (False, 1, 0)


@pytest.mark.parametrize(
    ("lease", "permits", "expected"),
    [
        (Lease(3, 16, 2, LATER_S, True), 13, Lease(16, 16, 2, NOW_S + LEASE_S)),
        (Lease(3, 16, 2, BEFORE_S, True), 13, Lease(13, 16, 2, NOW_S + LEASE_S)),
        (Lease(0, 1, 1, 0.0, True), 0, Lease(0, 1, 1, NOW_S + LEASE_S)),
    ],
)
def test_an_answer_fills_the_lease_and_renews_its_time(lease: Lease, permits: int, expected: Lease) -> None:
    assert filled(lease, permits, NOW_S) == expected


def test_a_lease_that_was_not_filled_may_be_asked_for_again() -> None:
    assert not_filled(Lease(3, 16, 2, LATER_S, True)) == Lease(3, 16, 2, LATER_S, False)


@dataclass
class Bucket:
    """What Redis counts."""

    per_s: float
    burst: int
    tat_s: float = 0.0
    granted: int = 0

    def grant(self, wanted: int, now_s: float) -> int:
        tat_s = max(self.tat_s, now_s)
        fit = math.floor((self.burst / self.per_s - (tat_s - now_s)) * self.per_s + 1e-9)
        granted = max(0, min(wanted, fit))
        self.tat_s = tat_s + granted / self.per_s
        self.granted += granted
        return granted


@dataclass
class Process:
    """A gateway whose background fills arrive when the test says so."""

    bucket: Bucket
    most: int
    lease: Lease = field(default_factory=Lease)
    pending: int = 0
    waited: int = 0

    def take(self, now_s: float) -> bool:
        step = next_step(self.lease, now_s, self.most)
        self.lease = step.lease
        if step.spends:
            self.pending = step.ask if step.fills else self.pending
            return True
        self.waited += 1
        granted = self.bucket.grant(step.ask, now_s)
        if step.fills:
            self.lease = filled(self.lease, granted - 1, now_s) if granted else not_filled(self.lease)
        return granted > 0

    def background(self, now_s: float) -> None:
        if self.pending:
            granted = self.bucket.grant(self.pending, now_s)
            self.lease = filled(self.lease, granted, now_s) if granted else not_filled(self.lease)
            self.pending = 0


@given(
    st.lists(st.tuples(st.floats(0, 0.02) | st.floats(0, 2), st.integers(0, 1), st.booleans()), max_size=300),
    st.floats(1, 400),
    st.integers(1, 200),
)
def test_leases_let_no_more_in_than_burst_and_rate(
    events: list[tuple[float, int, bool]], per_s: float, burst: int
) -> None:
    """Since a full bucket exactly; in any later window, what was leased before it comes on top."""
    now_s = 1000.0
    bucket = Bucket(per_s, burst)
    most = max_permits(per_s, burst)
    gateways = [Process(bucket, most), Process(bucket, most)]
    times: list[float] = []
    for gap_s, index, answers in events:
        now_s += gap_s
        gateway = gateways[index]
        if gateway.take(now_s):
            times.append(now_s)
        if answers:
            gateway.background(now_s)
        assert gateway.lease.permits <= most
        assert len(times) <= bucket.granted
    for first in range(len(times)):
        leased = 2 * (most if most > 1 else 0) if first else 0
        for last in range(first, len(times)):
            assert last - first + 1 <= burst + (times[last] - times[first]) * per_s + leased + 1e-6


@pytest.mark.parametrize(
    ("needed_per_s", "max_waiting_share", "max_lost_share"),
    [(0.5, 1.0, 0.0), (3.0, 0.5, 0.4), (10.0, 0.1, 0.5), (50.0, 0.01, 0.15), (150.0, 0.01, 0.05)],
)
def test_a_steady_team_seldom_waits_and_loses_few_permits(
    needed_per_s: float, max_waiting_share: float, max_lost_share: float
) -> None:
    bucket = Bucket(200.0, 400)
    gateway = Process(bucket, max_permits(200.0, 400))
    requests = 1000
    for index in range(requests):
        assert gateway.take(index / needed_per_s)
        gateway.background(index / needed_per_s + 0.001)
    assert gateway.waited <= max_waiting_share * requests
    assert bucket.granted - requests <= max_lost_share * bucket.granted + 16
