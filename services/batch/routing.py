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
class OwnGpus:
    """Of a batch that has a resource for itself."""

    resource_id: str | None


@dataclass(frozen=True, slots=True)
class Payer:
    """Whose work it is, as budgets know it."""

    team_id: str
    key_id: str
    model_id: str


def choose_paid_route(
    payer: Payer,
    ppt_fallback: bool,
    model_type: str,
    resources: Iterable[ResourceView],
    purse: Purse,
    own: OwnGpus | None = None,
) -> Route | Waiting:
    """The route, if somebody pays for it. Pure.

    1. A budget of the team, key, model or resource that stops batches is used up -> wait for its next period, on the
       team's own GPUs too. What is out by then is still done; on shared GPUs it was reserved from the budget.
    2. A team's own GPUs are paid by the minute, whatever runs on them.
    3. Tokens without a price can be sold to nobody -> wait for one.
    4. A team that has nothing left to spend -> wait for credit; one with a budget used up that refuses shared GPUs -> wait
       for its next period.

    own: set for a batch that has a resource for itself, whose lines run there and nowhere else.
    """
    team_id = payer.team_id
    if own is not None:
        route = choose_own_route(own, resources)
    else:
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


def choose_own_route(own: OwnGpus, resources: Iterable[ResourceView]) -> Route | Waiting:
    """The batch's own resource, once a worker of it is ready; until then the lines wait for it. Pure."""
    resource = next((r for r in resources if r.resource_id == own.resource_id), None)
    if resource is None:
        return Waiting("the batch's own resource is not there")
    if _serves(resource):
        return Route(resource, "resource")
    why = f": {resource.reason}" if resource.reason else ""
    return Waiting(f"the batch's own resource is {resource.state}{why}"[:300])


def choose_line_route(
    team_id: str, ppt_fallback: bool, model_type: str, resources: Iterable[ResourceView]
) -> Route | Waiting:
    """Choose what runs the lines of this team on this type. Pure.

    1. The team's resource of the type that was made first, if it is on and a worker is ready. Resources that are there for
       one batch alone are nobody else's.
    2. A team without one, or one that allows it while its own cannot serve -> the type's shared pool, if that can.
    3. It has gone to sleep for want of work, and work wakes it -> send lines: they wait in its queue, and the scheduler
       starts a worker. One that is not to be woken is waited for, as is one that is off: until somebody turns it on, a window
       in time gives it GPUs, or the batch expires.
    4. Otherwise wait for the team's own resource, or for the pool.
    5. Neither is there -> wait, and say that nothing is.
    """
    of_type = [r for r in resources if r.model_type == model_type and r.takes_traffic]
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
    if own is not None and _wakes(own):  # 3
        return Route(own, "resource")
    if own is None and pool is not None and _wakes(pool):
        return Route(pool, "ppt")
    if own is not None:  # 4
        return Waiting(
            f"the team's resource is {own.state}" if own.wanted == "on" else "the team's resource is off"
        )
    if pool is not None:
        return Waiting(f"the shared pool is {pool.state}")
    return Waiting(f"no resource of the type '{model_type}' runs this model", missing=True)  # 5


def _serves(resource: ResourceView) -> bool:
    return resource.wanted == "on" and (resource.live_count > 0 or resource.state == "live")


def _wakes(resource: ResourceView) -> bool:
    return resource.wanted == "on" and resource.state == "asleep" and resource.wakes
