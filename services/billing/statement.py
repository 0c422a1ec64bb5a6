"""Pure: a month's charges computed from raw facts, intervals and prices alone, and how that differs from the books.

What belongs to a month: a job accepted in it, and minutes of its hours, whenever they were posted. So a statement can
be computed again from what happened, and does not depend on when billing heard of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from services.billing.instants import to_unix_ms, to_unix_us
from services.billing.intake import amount_nanousd
from services.billing.minutes import HourKey, LiveInterval, billed_minutes
from services.billing.pricing import Price, minutes_amount_nanousd, price_in_force
from services.billing.settle import FactsDisagree, settle
from shared.calendar_month import CalendarMonth
from shared.messages import UsageEvent

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class TokenLine(NamedTuple):
    """What a statement has one line for."""

    model_type: str
    work_class: str
    price_id: str


@dataclass(slots=True)
class Sums:
    """Of one token line: what its jobs come to in all."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    amount_nanousd: int = 0

    def __str__(self) -> str:
        return f"{self.prompt_tokens} + {self.completion_tokens} tokens, {self.amount_nanousd} nano-USD"


@dataclass(slots=True)
class MonthBill:
    """One team's charges of one month, from whichever source."""

    jobs_nanousd: dict[str, int] = field(default_factory=dict)
    """By job; jobs that cost nothing are left out."""
    token_lines: dict[TokenLine, Sums] = field(default_factory=dict)
    hours_nanousd: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """By resource, place and hour (Unix microseconds): rates within an hour are summed; free hours are left out."""
    refused: list[str] = field(default_factory=list)
    """Jobs whose facts contradict each other: nobody pays for them."""

    @property
    def total_nanousd(self) -> int:
        return sum(self.jobs_nanousd.values()) + sum(self.hours_nanousd.values())


def bill_from_facts(
    month: CalendarMonth,
    jobs: Iterable[tuple[str, list[UsageEvent]]],
    intervals: Iterable[LiveInterval],
    prices: Iterable[Price],
) -> MonthBill:
    """Compute a team's month from what happened.

    jobs: each with all of its facts, in any order; others than the month's are passed over. intervals: all of the
    team's own resources that reach into the month, shared pools left out. prices: all versions.
    """
    bill, versions = MonthBill(), list(prices)
    lines: dict[TokenLine, Sums] = defaultdict(Sums)
    first_ms, end_ms = to_unix_ms(month.start), to_unix_ms(month.end)
    for job_id, facts in jobs:
        if not first_ms <= facts[0].accepted_unix_ms < end_ms:
            continue
        try:
            settlement = settle(facts)
        except FactsDisagree:
            bill.refused.append(job_id)
            continue
        source = settlement.source
        price = price_in_force(versions, source.model_type, source.work_class, source.accepted_unix_ms)
        amount = amount_nanousd(settlement, price)
        if amount == 0 or price is None:
            continue
        bill.jobs_nanousd[job_id] = amount
        sums = lines[TokenLine(source.model_type, source.work_class, price.price_id)]
        sums.prompt_tokens += settlement.billable_prompt_tokens
        sums.completion_tokens += settlement.billable_completion_tokens
        sums.amount_nanousd += amount
    bill.token_lines = dict(lines)
    bill.hours_nanousd = _hours(month, billed_minutes(intervals, to_unix_us(month.start)))
    return bill


def _hours(month: CalendarMonth, minutes: Mapping[HourKey, int]) -> dict[tuple[str, int, int], int]:
    end_us = to_unix_us(month.end)
    hours: dict[tuple[str, int, int], int] = defaultdict(int)
    for key, count in minutes.items():
        amount = minutes_amount_nanousd(key.hourly_rate_nanousd, count)
        if key.hour_us < end_us and amount:
            hours[key.resource_id, key.place, key.hour_us] += amount
    return dict(hours)


def differences(computed: MonthBill, ledger: MonthBill, statement: MonthBill) -> Iterator[str]:
    """Everything in which the books differ from what happened, a line each; none if they agree to the nano-dollar."""
    for name, told in (("the ledger", ledger), ("the statement", statement)):
        for job_id, want, has in _unequal(computed.jobs_nanousd, told.jobs_nanousd):
            yield f"job {job_id}: {want or 0} nano-USD from its facts, {has or 0} in {name}"
        for (resource_id, place, hour_us), want, has in _unequal(computed.hours_nanousd, told.hours_nanousd):
            where = f"resource {resource_id}, place {place}, hour {hour_us // 3_600_000_000}"
            yield f"{where}: {want or 0} nano-USD from its intervals, {has or 0} in {name}"
    for line, sums, told_sums in _unequal(computed.token_lines, statement.token_lines):
        yield f"{' / '.join(line)}: {sums or Sums()} from facts, {told_sums or Sums()} in the statement"


def _unequal(ours: Mapping[K, V], theirs: Mapping[K, V]) -> Iterator[tuple[K, V | None, V | None]]:
    for key in sorted(ours.keys() | theirs.keys(), key=str):
        if ours.get(key) != theirs.get(key):
            yield key, ours.get(key), theirs.get(key)
