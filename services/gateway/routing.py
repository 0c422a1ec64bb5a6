"""Which GPUs a request runs on, or why on none. Pure: values in, a route or a refusal out."""

from __future__ import annotations

import math
from collections.abc import Iterable

from shared.inference.errors import ApiError, must_not_retry
from shared.inference.principal import ModelView, Principal, ResourceView, Route

HOLD_S = 20.0
"""A request waits in the queue for a start that should be over by then; below every client's usual time-out."""

UNKNOWN_START_S = 30
"""What `Retry-After` says when there is no history of starts yet."""

FAILED_RETRY_S = 60
MAX_RETRY_AFTER_S = 600


def choose_route(
    principal: Principal, model: ModelView, resources: Iterable[ResourceView], now_unix_s: float
) -> Route | ApiError:
    """Choose what runs this model for this principal. Pure; returns the refusal instead of raising it.

    1. The team's resource of the model's type that was made first takes the type's traffic, if it can serve.
    2. A team without one, or one whose resource cannot serve and that allows it, goes to the type's shared pool,
       if that can serve.
    3. Otherwise the refusal of the team's own resource: why it cannot serve.
    4. Of a team without one: the pool's refusal while it is starting or failed, else that there is no resource.

    resources: any; those of other types and teams are passed over.
    """
    of_type = [r for r in resources if r.model_type == model.model_type]
    own = min(
        (r for r in of_type if r.team_id == principal.team_id and not r.pool),
        key=lambda r: (r.created_unix_s, r.resource_id),
        default=None,
    )
    pool = next((r for r in of_type if r.pool), None)

    own_refusal = _refusal(own, now_unix_s) if own is not None else None
    if own is not None and own_refusal is None:  # 1
        return Route(own, "resource")
    pool_refusal = _refusal(pool, now_unix_s) if pool is not None else None
    if pool is not None and pool_refusal is None and (own is None or principal.ppt_fallback):  # 2
        return Route(pool, "ppt")
    if own_refusal is not None:  # 3
        return own_refusal
    if pool_refusal is not None and pool_refusal.status == 503:  # 4
        return pool_refusal
    return must_not_retry(
        ApiError(409, "no_resource", f"No resource of the type '{model.model_type}' runs this model.")
    )


def _refusal(resource: ResourceView, now_unix_s: float) -> ApiError | None:
    """Say why the resource takes no work now; None if it does. Pure.

    1. Not wanted on (off, or draining to off) -> 409, and no retry: only a person turns it on.
    2. A worker is ready -> takes work, also while the rest starts or drains.
    3. Failed -> 503 with the reason: the scheduler goes on trying.
    4. Woken by requests -> takes work, which waits in the queue until a worker has started or its deadline is over.
    5. Asleep otherwise (on, with no GPUs) -> 409, and no retry: only a person, or a window in time, gives it some.
    6. Expected live within `HOLD_S` -> takes work, which waits in the queue. A start that is overdue by less
       than that counts too: it may be over at any moment.
    7. Otherwise starting -> 503, to come back when it is expected.
    """
    if resource.wanted != "on":  # 1
        return must_not_retry(
            ApiError(409, "resource_off", "The resource is off. Turn it on to use its models.")
        )
    if resource.state == "live" or resource.live_count > 0:  # 2
        return None
    if resource.state == "failed":  # 3
        why = f": {resource.reason}" if resource.reason else "."
        message = f"The resource could not be started{why}"[:300]
        return ApiError(503, "resource_failed", message, retry_after_s=FAILED_RETRY_S)
    if resource.wakes:  # 4
        return None
    if resource.state == "asleep":  # 5
        message = "The resource is on but has no GPUs, and its settings do not wake it for a request."
        return must_not_retry(ApiError(409, "resource_asleep", message))
    wait_s = float(UNKNOWN_START_S)
    if resource.expected_live_unix_s is not None:
        wait_s = resource.expected_live_unix_s - now_unix_s
        if -HOLD_S <= wait_s <= HOLD_S:  # 6
            return None
    retry_after_s = math.ceil(min(max(wait_s, 1.0), MAX_RETRY_AFTER_S))
    return ApiError(503, "resource_starting", "The resource is starting.", retry_after_s=retry_after_s)  # 7
