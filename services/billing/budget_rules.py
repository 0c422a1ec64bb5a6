"""Pure: which budgets there may be, when somebody is told, and what is done when one is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Literal

from services.billing.budget_account import Account, limit_refusal
from shared.messages import BudgetAction, BudgetScope, ChangeBudget

MAX_LIMIT_NANOUSD = 10**15
"""A million USD."""
MAX_ALERTS = 10
MAX_BUDGETS = 200
"""Of one team: gateways hold all caps in memory, and each request looks at its team's."""
ACTION_EVERY_MS = 60_000

Refusal = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Budget:
    """What is wanted of a budget; an `Account` says how it stands in one period."""

    budget_id: str
    team_id: str
    scope: BudgetScope
    scope_id: str
    period: Literal["day", "month"]
    limit_nanousd: int
    alert_percents: tuple[int, ...]
    actions: tuple[BudgetAction, ...]


@dataclass(frozen=True, slots=True)
class Alert:
    """Somebody is to be told, once for each budget, period, percent and limit."""

    budget: Budget
    period_start: date
    percent: int
    spent_nanousd: int


def budget_refusal(budget: Budget) -> Refusal | None:
    """Why there cannot be such a budget, as (code, message); None if there can.

    1. A limit out of range.
    2. Alerts at other than 1 to 100 percent, more than `MAX_ALERTS`, or one twice.
    3. An action twice.
    4. GPUs are turned off, or not added, for a team or a resource: no model and no key has GPUs of its own.
    5. Nothing to be told and nothing to be done: it would be no budget.
    """
    alerts, actions = budget.alert_percents, budget.actions
    if not 0 <= budget.limit_nanousd <= MAX_LIMIT_NANOUSD:  # 1
        return "invalid_value", f"limit_nanousd must be between 0 and {MAX_LIMIT_NANOUSD}"
    if not all(1 <= percent <= 100 for percent in alerts) or len(set(alerts)) < len(alerts):  # 2
        return "invalid_value", "alert_percents must be different numbers from 1 to 100"
    if len(alerts) > MAX_ALERTS:  # 2
        return "invalid_value", f"alert_percents may be {MAX_ALERTS} at most"
    if len(set(actions)) < len(actions):  # 3
        return "invalid_value", "actions names one twice"
    if budget.scope in ("model", "key") and {"stop_scale_up", "turn_off"} & set(actions):  # 4
        return (
            "invalid_value",
            f"a budget of a {budget.scope} can neither stop scale-up nor turn anything off",
        )
    if not alerts and not actions:  # 5
        return "invalid_value", "a budget needs alert_percents or actions"
    return None


def changed(budget: Budget, command: ChangeBudget) -> Budget:
    """The budget as the command wants it."""
    return replace(
        budget,
        limit_nanousd=budget.limit_nanousd if command.limit_nanousd is None else command.limit_nanousd,
        alert_percents=budget.alert_percents
        if command.alert_percents is None
        else tuple(command.alert_percents),
        actions=budget.actions if command.actions is None else tuple(command.actions),
    )


def cap_refusal(before: Budget | None, after: Budget, account: Account) -> Refusal | None:
    """Why a limit cannot become a cap; None if it can. account: how it stands now. before: None for a new budget.

    1. Without an action it is no cap: it may be any number, and tells at once what is over it.
    2. A cap that stays as it was is not looked at again: minutes may have gone beyond it.
    3. A cap below what is spent, or is reserved by requests that run -> cap_below_spent.
    """
    if not after.actions:  # 1
        return None
    if before is not None and before.actions and before.limit_nanousd == after.limit_nanousd:  # 2
        return None
    words = limit_refusal(account, after.limit_nanousd)
    return None if words is None else ("cap_below_spent", f"The limit is too low: {words}.")  # 3


def is_spent(budget: Budget, spent_nanousd: int) -> bool:
    """Whether the budget's actions are due."""
    return spent_nanousd >= budget.limit_nanousd


def alerts_due(budget: Budget, period_start: date, spent_nanousd: int) -> list[Alert]:
    """All alerts that the budget has come to in this period; those that were told are told apart by the caller.

    1. At each share that was chosen, once so much of the limit is spent.
    2. When it is spent, if that does something.
    3. Of a limit of nothing: when anything is spent, or if that does something.
    """
    percents = set(budget.alert_percents) | ({100} if budget.actions else set())  # 2
    if budget.limit_nanousd == 0 and spent_nanousd <= 0 and not budget.actions:  # 3
        return []
    return [
        Alert(budget, period_start, percent, spent_nanousd)
        for percent in sorted(percents)
        if spent_nanousd * 100 >= percent * budget.limit_nanousd  # 1
    ]


def resources_to_turn_off(
    budgets: Iterable[tuple[Budget, int]], on: Sequence[tuple[str, str]]
) -> list[tuple[str, Budget]]:
    """Resources that are on and have to go off, each with the budget that says so.

    budgets: with what is spent of each in the running period. on: (resource id, team id) of dedicated resources.
    """
    spent = [b for b, amount in budgets if "turn_off" in b.actions and is_spent(b, amount)]
    found = []
    for resource_id, team_id in on:
        for budget in spent:
            whole_team = budget.scope == "team"
            if budget.team_id == team_id and (whole_team or budget.scope_id == resource_id):
                found.append((resource_id, budget))
                break
    return found


def turn_off_id(budget_id: str, resource_id: str, now_unix_ms: int) -> str:
    """The command's id: one for each minute, so that somebody who turns it on again is answered, not ignored."""
    text = f"{budget_id} {resource_id} {now_unix_ms // ACTION_EVERY_MS}"
    return "cmd_" + hashlib.sha256(text.encode()).hexdigest()[:32]
