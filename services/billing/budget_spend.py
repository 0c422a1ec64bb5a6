"""Pure: which budgets an amount counts in, and what a job's posting frees of the leases that it was reserved from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import NamedTuple

from shared.budgets.period import day_of
from shared.messages import UsageEvent


class SpendKey(NamedTuple):
    """One thing that may have a budget, on one day (UTC). A tuple: a charge hashes and sorts four of them."""

    team_id: str
    scope: str
    scope_id: str
    day: date


def tokens_spend(fact: UsageEvent, amount_nanousd: int) -> dict[SpendKey, int]:
    """Tokens count for the team, the resource, the model and the key, on the day that the job was accepted."""
    day = day_of(fact.accepted_unix_ms)
    named = {
        "team": fact.team_id,
        "resource": fact.resource_id,
        "model": fact.model_id,
        "key": fact.key_id,
    }
    return {SpendKey(fact.team_id, scope, name, day): amount_nanousd for scope, name in named.items()}


def minutes_spend(
    team_id: str, resource_id: str, hour_unix_us: int, amount_nanousd: int
) -> dict[SpendKey, int]:
    """Minutes count for the team and the resource, on the day that they belong to."""
    day = day_of(hour_unix_us // 1000)
    return {
        SpendKey(team_id, "team", team_id, day): amount_nanousd,
        SpendKey(team_id, "resource", resource_id, day): amount_nanousd,
    }


def add_up(spends: Iterable[Mapping[SpendKey, int]]) -> Counter[SpendKey]:
    total: Counter[SpendKey] = Counter()
    for spend in spends:
        for key, amount in spend.items():
            total[key] += amount
    return total


def reservations_freed(facts: Mapping[str, Sequence[UsageEvent]], new: set[str]) -> Counter[str]:
    """What each lease is freed of, by facts that are settled now. facts: all facts of each job; new: ids of today's.

    1. A job frees its reservation with the first facts that billing hears of it, and never again.
    2. A job that was reserved from several leases (a budget of the team, one of the key) frees as much of each.
    """
    freed: Counter[str] = Counter()
    for of_job in facts.values():
        if all(fact.event_id in new for fact in of_job):  # 1
            first = min(of_job, key=lambda fact: fact.event_id)
            for lease_id in first.lease_ids:
                freed[lease_id] += first.reserved_nanousd  # 2
    return freed
