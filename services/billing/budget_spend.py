"""Pure: which budgets an amount counts in, and what a job's posting frees of the leases that it was reserved from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import NamedTuple

from services.billing.pricing import Price, price_in_force, tokens_amount_nanousd
from shared.budgets.period import day_of
from shared.messages import JobUsage, JobVoided, UsageEvent


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


def reservations_freed(
    facts: Mapping[str, Sequence[UsageEvent]], new: set[str], prices: Sequence[Price]
) -> Counter[str]:
    """What each lease is freed of, by facts that are settled now. facts: all facts of each job; new: ids of today's.

    1. A job frees what is sure with the first facts that billing hears of it, the rest with later ones, nothing twice.
    2. A job that was reserved from several leases (a budget of the team, one of the key) frees as much of each.
    """
    freed: Counter[str] = Counter()
    for of_job in facts.values():
        before = [fact for fact in of_job if fact.event_id not in new]
        amount = sure_nanousd(of_job, prices) - sure_nanousd(before, prices)  # 1
        if amount > 0:
            first = min(of_job, key=lambda fact: fact.event_id)
            for lease_id in first.lease_ids:
                freed[lease_id] += amount  # 2
    return freed


def sure_nanousd(facts: Sequence[UsageEvent], prices: Sequence[Price]) -> int:
    """How much of a job's reservation it needs no more; what facts to come may still make it cost stays reserved.

    With more facts it is never less.

    1. Nothing was heard of the job -> nothing.
    2. Workers alone speak, and say that it was cancelled before anything came of it -> nothing: the gateway's word
       follows, or, if one of them had only lost touch with the gateway, another one's answer.
    3. A gateway alone speaks, and its client went before the first token, of a worker that had the job -> all but the
       prompt: that worker may have read it.
    4. Else all: what these facts come to is the most that it can cost.
    """
    if all(isinstance(fact, JobUsage) and _came_to_nothing(fact) for fact in facts):
        return 0  # 1, 2
    reserved = facts[0].reserved_nanousd
    if all(isinstance(fact, JobVoided) and _worker_may_have_read(fact) for fact in facts):
        void = facts[0]
        price = price_in_force(prices, void.model_type, void.work_class, void.accepted_unix_ms)
        prompt = tokens_amount_nanousd(price, void.prompt_tokens, 0) if price is not None else 0
        return max(reserved - prompt, 0)  # 3
    return reserved  # 4


def _came_to_nothing(usage: JobUsage) -> bool:
    return usage.outcome == "cancelled" and usage.completion_tokens == 0 and not usage.prefill_ran


def _worker_may_have_read(void: JobVoided) -> bool:
    return void.reason == "client_gone" and void.delivered_tokens == 0 and void.had_worker
