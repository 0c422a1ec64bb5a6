"""Pure: what is left of a budget in one period, and who holds which part of it.

A gateway leases a slice, and takes its requests' worst cases from it; a lease is closed when the gateway takes nothing
more from it. What a lease holds is what its jobs may still cost beyond what is posted:

1. Nobody closed it -> all that was granted counts as spent: its gateway may be alive, or killed after it spent it.
2. It is closed -> what was spent counts, the rest is free. The first close stands; it says at most what was granted.
3. A job's reservation leaves its lease in the transaction that posts what the job costs, which is at most that much;
   what later facts may still make it cost stays until they are here (`budget_spend.sure_nanousd`).
4. A lease past its horizon, when no job of it can run any more, is written off as soon as billing has read all
   facts from before: its gateway was killed with a slice unspent, or the fact of a job is lost. Should a fact come later
   still, it is posted like any other.
5. Free is the limit, less what is posted, less what leases hold. It may be negative: minutes of GPUs and corrections
   are posted whatever the limit is.
6. A waiting request is granted if it fits into what is free, in order; one that does not fit is refused, and a later,
   smaller one may fit.
7. Beside them a gateway gets what it wishes for, but at most an eighth of what is then free; if that is less than one of
   its usual requests, nothing. So slices shrink towards the cap, and at the cap each request is asked for alone.
8. A limit below what is posted and held is refused: requests that were let in under the old one could overshoot it.

By these no grant makes posted + held exceed the limit, and neither does any close, settling or write-off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

LARGEST_SHARE = 8


@dataclass(frozen=True, slots=True)
class Lease:
    """A slice of one budget and period. spent_nanousd: None until its gateway has closed it."""

    granted_nanousd: int
    spent_nanousd: int | None
    settled_nanousd: int
    horizon_unix_ms: int
    written_off: bool = False


@dataclass(frozen=True, slots=True)
class Account:
    """A budget in one period. held_nanousd: the sum over its leases."""

    limit_nanousd: int
    posted_nanousd: int
    held_nanousd: int

    @property
    def free_nanousd(self) -> int:
        return self.limit_nanousd - self.posted_nanousd - self.held_nanousd  # 5


@dataclass(frozen=True, slots=True)
class Grant:
    """refused: indexes of the needs that do not fit. unposted_nanousd: what would be free if no lease held anything."""

    granted_nanousd: int
    refused: tuple[int, ...]
    unposted_nanousd: int


def held_nanousd(lease: Lease) -> int:
    if lease.written_off:
        return 0  # 4
    spent = lease.granted_nanousd if lease.spent_nanousd is None else lease.spent_nanousd  # 1, 2
    return max(0, spent - lease.settled_nanousd)  # 3


def close(lease: Lease, spent_nanousd: int) -> Lease:
    """The lease after its gateway's word. Raises ValueError for what no gateway can truthfully say."""
    if not 0 <= spent_nanousd <= lease.granted_nanousd:
        raise ValueError(f"{spent_nanousd} spent of a lease of {lease.granted_nanousd}")
    if lease.spent_nanousd is not None:
        return lease  # 2
    return replace(lease, spent_nanousd=spent_nanousd)


def settle(lease: Lease, reserved_nanousd: int) -> Lease:
    """The lease after a job of it was posted for the first time."""
    return replace(lease, settled_nanousd=lease.settled_nanousd + reserved_nanousd)  # 3


def write_off(lease: Lease) -> Lease:
    """The lease that nothing more is expected of."""
    return replace(lease, written_off=True)  # 4


def may_write_off(lease: Lease, facts_read_until_unix_ms: int) -> bool:
    """Whether what the lease still holds can be let go. facts_read...: all facts published before this are settled."""
    return held_nanousd(lease) > 0 and lease.horizon_unix_ms <= facts_read_until_unix_ms  # 4


def grant(account: Account, needs_nanousd: Sequence[int], wanted_nanousd: int, unit_nanousd: int) -> Grant:
    """What a gateway gets that has these requests waiting, and wants this much for others to come."""
    free, granted = account.free_nanousd, 0
    refused = []
    for index, need in enumerate(needs_nanousd):
        if need <= free - granted:
            granted += need
        else:
            refused.append(index)  # 6
    spare = min(wanted_nanousd, max(0, free - granted) // LARGEST_SHARE)
    if spare >= max(unit_nanousd, 1):  # 7
        granted += spare
    return Grant(granted, tuple(refused), account.limit_nanousd - account.posted_nanousd)


def limit_refusal(account: Account, limit_nanousd: int) -> str | None:
    """Why the limit cannot become this; None if it can."""
    if limit_nanousd < account.posted_nanousd:
        return "more than that was spent in the running period"  # 8
    if limit_nanousd < account.posted_nanousd + account.held_nanousd:
        return "more than that was spent in the running period or is reserved by running requests"  # 8
    return None
