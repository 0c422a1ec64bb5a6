"""Whether somebody pays for what is asked, as far as the gateway knows from its last look. Pure.

The look is half a second old: it refuses early and cheaply. That requests never overdraw a team's credit is seen to by the
slices that they are reserved from (`shared/budgets/gate.py`).
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from shared.inference.errors import ApiError, must_not_retry
from shared.inference.principal import ModelView, Principal, Route


@dataclass(frozen=True, slots=True)
class Purse:
    """What billing says of prices and teams."""

    priced_types: AbstractSet[str] = frozenset()
    """Model types whose tokens have a price in force, of the class live."""
    spent_teams: AbstractSet[str] = frozenset()
    """Ids of the teams that may spend nothing now."""


def payment_refusal(principal: Principal, model: ModelView, route: Route, purse: Purse) -> ApiError | None:
    """Why the request cannot be paid for; None if it can. Pure.

    1. A team's own GPUs are paid by the minute, whatever runs on them -> nothing to say here.
    2. Nobody has said what tokens of the type cost -> 409 `no_price`, and no retry: what has no price can be sold to
       nobody.
    3. The team has nothing left to spend -> 402 `insufficient_credit`, and no retry.
    """
    if route.billing != "ppt":  # 1
        return None
    if model.model_type not in purse.priced_types:  # 2
        message = f"Tokens of the type '{model.model_type}' have no price yet: the platform has to set one."
        return must_not_retry(ApiError(409, "no_price", message))
    if principal.team_id in purse.spent_teams:  # 3
        return insufficient_credit()
    return None


def insufficient_credit() -> ApiError:
    """The refusal of whatever costs money, for a team that may spend none."""
    message = "The team has no credit left. Add some to go on."
    return must_not_retry(ApiError(402, "insufficient_credit", message))
