"""What a line on shared GPUs may cost at most is reserved before it goes out, from the same caps as a live request's and from
those that stop batches.

The slices are `shared.budgets`'s. A line that has no room under a cap is not refused: it waits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from services.batch.preparation import Prepared
from shared.budgets.gate import BudgetGate, Reservation
from shared.inference.errors import ApiError
from shared.messages import BudgetAction

CAP_ACTIONS: tuple[BudgetAction, ...] = ("refuse_ppt", "stop_batches")
"""A budget that does one of these when it is spent is passed by no line on shared GPUs."""

REASONS = {
    "budget_exceeded": "less is left of a budget than the next line may cost",
    "insufficient_credit": "less credit is left than the next line may cost",
    "billing_unavailable": "billing does not say what is left of a budget",
    "no_price": "a budget applies, and tokens of the type have no price to count by",
}


@dataclass(frozen=True, slots=True)
class Paid:
    """A line that may go out. `sent` or `kept` is called once, when it is known whether it did."""

    line: Prepared
    reservation: Reservation

    def sent(self) -> None:
        """Its jobs may run: billing will hear of the end of each, and frees what is reserved for it."""
        for index in range(len(self.line.jobs)):
            self.reservation.published(index)
        self.reservation.resolve()

    def kept(self) -> None:
        """None of its jobs will ever run: what is reserved for it is free at once."""
        self.reservation.resolve()


@dataclass(frozen=True, slots=True)
class Unpaid:
    """A line that has to wait; `reason` is for people."""

    line: Prepared
    reason: str


class LinePayer:
    """longest_s: so long a line under a cap may be out; then it waits again."""

    def __init__(self, gate: BudgetGate, longest_s: int) -> None:
        self._gate = gate
        self.longest_s = longest_s

    def is_capped(self, line: Prepared) -> bool:
        """Whether `reserve` has to ask anybody. All jobs of a line are under the same caps."""
        return self._gate.is_capped(line.jobs[0])

    async def reserve(self, line: Prepared) -> Paid | Unpaid:
        """Reserve what the line may cost at most from all its caps, or from none."""
        try:
            reservation = await self._gate.reserve(line.jobs)
        except ApiError as error:
            return Unpaid(line, REASONS[error.code])
        return Paid(replace(line, jobs=reservation.jobs), reservation)


def starting_at(line: Prepared, unix_ms: int, longest_s: int | None) -> Prepared:
    """The line as it goes out at this moment. Pure.

    It was prepared a while ago. The day that it counts in and its price are those of the moment at which it goes out:
    a line that waited for a new day's budget is no line of yesterday's.

    longest_s: its jobs' deadline is the batch's end, or so long after now if that is earlier.
    """
    ends_unix_ms = int(line.batch.expires_at.timestamp() * 1000)
    if longest_s is not None:
        ends_unix_ms = min(ends_unix_ms, unix_ms + longest_s * 1000)
    return replace(
        line,
        jobs=[
            msgspec.structs.replace(job, accepted_unix_ms=unix_ms, deadline_unix_ms=ends_unix_ms)
            for job in line.jobs
        ],
    )
