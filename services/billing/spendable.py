"""Pure: what a team may still spend. The one place that decides it; `billing_api.spendable_v1` says the same in SQL.

Whoever gates spending (the gateway's door, budgets and their slices) asks here or reads the view, and never computes
it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pays = Literal["prepaid", "postpaid"]

MAX_CREDIT_LIMIT_NANOUSD = 10**15
"""A million USD: with any balance that can come together it stays within a bigint."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a team pays."""

    pays: Pays
    credit_limit_nanousd: int | None = None
    """What a postpaid team may owe; None: any amount. A prepaid team owes nothing."""


WITHOUT_TERMS = Terms("postpaid")
"""Of a team for which nothing was ever said."""


def spendable_nanousd(terms: Terms, balance_nanousd: int) -> int | None:
    """What the team may spend beyond what is in the ledger; None means without a bound. Pure.

    1. Prepaid -> its balance.
    2. Postpaid without a limit -> no bound.
    3. Postpaid with a limit -> its balance and the limit.
    4. Never below zero: what is overdrawn (a charge for what was running when the money ended) is owed, not spent.

    balance_nanousd: as in the ledger; negative means that the team owes.
    """
    if terms.pays == "prepaid":
        return max(balance_nanousd, 0)
    if terms.credit_limit_nanousd is None:
        return None
    return max(balance_nanousd + terms.credit_limit_nanousd, 0)


def terms_refusal(terms: Terms) -> tuple[str, str] | None:
    """Why a team cannot have these terms, as (code, message); None if it can. Pure."""
    limit = terms.credit_limit_nanousd
    if limit is None:
        return None
    if terms.pays == "prepaid":
        return "invalid_value", "a prepaid team has no credit limit"
    if not 0 <= limit <= MAX_CREDIT_LIMIT_NANOUSD:
        return "invalid_value", f"credit_limit_nanousd must be between 0 and {MAX_CREDIT_LIMIT_NANOUSD}"
    return None
