"""How a process holds some of a team's permits ahead of need, so that most requests ask Redis for nothing. Pure.

A permit is counted in Redis when it is leased, not when it is spent. So since any full bucket no more than
burst + rate * time ever gets in, however many gateways there are and however they fail. What leases cost is
smoothness: permits leased before some window may be spent in it, `max_permits` for each gateway at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

LEASE_S = 1.0
"""What is not spent by then is lost: a permit kept longer would let a team exceed a burst that it has long regained."""
MAX_PERMITS = 16
RATE_SHARE_S = 0.1
BURST_SHARE = 8
"""As many gateways can hold leases before a team could find its whole burst held elsewhere."""
LOW_SHARE = 4
"""A lease is filled up from a quarter on: at 1000 requests/s that leaves 4 ms, and Redis needs 0.6 ms."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One team's permits in this process, already counted in Redis. The times are of this process's clock."""

    permits: int = 0
    size: int = 1
    """How many Redis was last asked to fill it up to; the request that asked included."""
    spent: int = 0
    """Requests since then, the one that had to wait for the answer included."""
    expires_s: float = 0.0
    asking: bool = False
    """Redis is being asked to fill it."""


@dataclass(frozen=True, slots=True)
class Step:
    """How one request is counted."""

    lease: Lease
    spends: bool
    """It goes by the lease, at once. Otherwise Redis is asked, and the request waits for the answer."""
    ask: int = 0
    """Permits that Redis is asked for: in the background for a request that spends, otherwise this one's own first."""
    fills: bool = False
    """The answer fills the lease, and ends its `asking`."""


def max_permits(requests_per_s: float, burst: int) -> int:
    """Return the largest lease. Pure.

    1. At most 16: Redis is then asked for every sixteenth request, and more would gain nothing.
    2. At most what the team's rate gives in 100 ms, and an eighth of its burst: a tight limit stays exact.
    3. At least 1, the request that asks: no lease, Redis counts every request.
    """
    return max(1, min(MAX_PERMITS, int(requests_per_s * RATE_SHARE_S + 1e-6), burst // BURST_SHARE))


def next_step(lease: Lease, now_s: float, most: int) -> Step:
    """Decide how the team's next request is counted. Pure.

    1. A lease that has expired is empty.
    2. It holds a permit -> spend it; if a quarter is left then, and nobody asks yet, fill it up in the background.
    3. It is empty, and somebody fills it already -> ask for this one request: many at once must not lease many times.
    4. It is empty -> ask for this request and the rest of a lease.

    How much it is filled up to follows what the team needs here, or a few requests at each of many gateways would
    use up the rate in permits that expire:

    5. Wanted again within its time -> twice the last size.
    6. Wanted after it expired -> as much as was spent of it.
    7. Always 1 to `most`.
    """
    expired = now_s >= lease.expires_s  # 1
    permits = 0 if expired else lease.permits
    size = max(1, min(most, lease.spent if expired else 2 * lease.size))  # 5, 6, 7
    if permits > 0:  # 2
        left = permits - 1
        if lease.asking or left > lease.size // LOW_SHARE:
            return Step(replace(lease, permits=left, spent=lease.spent + 1), spends=True)
        filling = Lease(left, size, 0, lease.expires_s, asking=True)
        return Step(filling, spends=True, ask=size - left, fills=True)
    if lease.asking:  # 3
        return Step(replace(lease, permits=0, spent=lease.spent + 1), spends=False, ask=1)
    asked = Lease(0, size, 1, lease.expires_s, asking=True)
    return Step(asked, spends=False, ask=size, fills=True)  # 4


def filled(lease: Lease, permits: int, asked_s: float) -> Lease:
    """Add what Redis granted beyond the request that waited; `asked_s` is when it was asked, so before it counted."""
    held = lease.permits if asked_s < lease.expires_s else 0
    return Lease(held + permits, lease.size, lease.spent, asked_s + LEASE_S)


def not_filled(lease: Lease) -> Lease:
    """Redis granted nothing or did not answer: what is held stays, and whoever comes next may ask."""
    return replace(lease, asking=False)
