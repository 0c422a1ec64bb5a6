"""Where a batch's lines run, or what they wait for. Pure.

Unlike a live request a line does not need a refusal: it waits for its resource until the batch expires.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from shared.inference.principal import ResourceView, Route


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing runs the lines now; `reason` is for people. `missing`: there is nothing that ever could."""

    reason: str
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Purse:
    """What billing says of prices and teams."""

    priced_types: AbstractSet[str] = frozenset()
    """Model types whose tokens have a price in force, of the class batch."""
    spent_teams: AbstractSet[str] = frozenset()
    """Ids of the teams that may spend nothing now."""
    stopped: AbstractSet[tuple[str, str, str]] = frozenset()
    """(team, scope, id in the scope) of budgets that are used up and stop batches."""
    refused: AbstractSet[tuple[str, str, str]] = frozenset()
    """Likewise of those that refuse shared GPUs."""


@dataclass(frozen=True, slots=True)
class Payer:
    """Whose work it is, as budgets know it."""

    team_id: str
    key_id: str
    model_id: str


def choose_paid_route(
    payer: Payer, ppt_fallback: bool, model_type: str, resources: Iterable[ResourceView], purse: Purse
) -> Route | Waiting:
    """The route, if somebody pays for it. Pure.

    1. A budget of the team, key, model or resource that stops batches is used up -> wait for its next period, on the
       team's own GPUs too. What is out by then is still done, and charged.
    2. A team's own GPUs are paid by the minute, whatever runs on them.
    3. Tokens without a price can be sold to nobody -> wait for one.
    4. A team that has nothing left to spend -> wait for credit; one with a budget used up that refuses shared GPUs -> wait
       for its next period.
    """
    team_id = payer.team_id
    route = choose_line_route(team_id, ppt_fallback, model_type, resources)
    if isinstance(route, Waiting):
        return route
    budgets = {
        (team_id, "team", team_id),
        (team_id, "key", payer.key_id),
        (team_id, "model", payer.model_id),
        (team_id, "resource", route.resource.resource_id),
    }
    if budgets & purse.stopped:  # 1
        return Waiting("a budget that stops batches is used up")
    if route.billing != "ppt":  # 2
        return route
    if model_type not in purse.priced_types:  # 3
        return Waiting(f"tokens of the type '{model_type}' have no price for batches yet")
    if team_id in purse.spent_teams:  # 4
        return Waiting("the team has no credit left")
    if budgets & purse.refused:
        return Waiting("a budget for shared GPUs is used up")
    return route


def choose_line_route(
    team_id: str, ppt_fallback: bool, model_type: str, resources: Iterable[ResourceView]
) -> Route | Waiting:
    """Choose what runs the lines of this team on this type. Pure.

    1. The team's resource of the type that was made first, if it is on and a worker is ready.
    2. A team without one, or one that allows it while its own cannot serve -> the type's shared pool, if that can.
    3. Otherwise wait for the team's own resource, or for the pool.
    4. Neither is there -> wait, and say that nothing is.
    """
    of_type = [r for r in resources if r.model_type == model_type]
    own = min(
        (r for r in of_type if r.team_id == team_id and not r.pool),
        key=lambda r: (r.created_unix_s, r.resource_id),
        default=None,
    )
    pool = next((r for r in of_type if r.pool), None)
    if own is not None and _serves(own):  # 1
        return Route(own, "resource")
    if pool is not None and _serves(pool) and (own is None or ppt_fallback):  # 2
        return Route(pool, "ppt")
    if own is not None:  # 3
        return Waiting(
            f"the team's resource is {own.state}" if own.wanted == "on" else "the team's resource is off"
        )
    if pool is not None:
        return Waiting(f"the shared pool is {pool.state}")
    return Waiting(f"no resource of the type '{model_type}' runs this model", missing=True)  # 4


def _serves(resource: ResourceView) -> bool:
    return resource.wanted == "on" and (resource.live_count > 0 or resource.state == "live")
