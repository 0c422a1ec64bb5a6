"""Whether a request may begin: rate and concurrency. The decision is pure; `Gate` counts and asks for the rate.

In-flight counts are this process's own: they protect its memory. The rate is a team's over all gateways.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.gateway.rate_limit import Rate, RateLimiter
from shared.inference.errors import ApiError
from shared.inference.principal import Principal

BUSY_RETRY_S = 1
OVERLOADED_RETRY_S = 2


@dataclass(frozen=True, slots=True)
class Limits:
    team_in_flight: int = 512
    gateway_in_flight: int = 2048


@dataclass(frozen=True, slots=True)
class Admit:
    pass


@dataclass(frozen=True, slots=True)
class Refuse:
    status: int
    code: str
    message: str
    retry_after_s: int


def admit(rate: Rate, team_in_flight: int, gateway_in_flight: int, limits: Limits) -> Admit | Refuse:
    """Decide whether one more request begins. Pure.

    1. The gateway has all the requests that it can hold -> 503: ours to mend, not the team's.
    2. The team is over its rate -> 429, to come back when its next request fits.
    3. The team has as many requests running here as it may -> 429.
    4. Otherwise it begins.

    team_in_flight, gateway_in_flight: without the one that asks.
    """
    if gateway_in_flight >= limits.gateway_in_flight:  # 1
        return Refuse(503, "overloaded", "Too many requests are running. Try again soon.", OVERLOADED_RETRY_S)
    if not rate.allowed:  # 2
        retry_s = max(1, math.ceil(rate.retry_after_s))
        return Refuse(429, "rate_limit_exceeded", "The team's request rate is exceeded.", retry_s)
    if team_in_flight >= limits.team_in_flight:  # 3
        message = f"The team has {limits.team_in_flight} requests running, its limit."
        return Refuse(429, "concurrency_limit_exceeded", message, BUSY_RETRY_S)
    return Admit()  # 4


class Gate:
    """Counts what runs here, and lets requests in."""

    def __init__(self, limiter: RateLimiter, limits: Limits) -> None:
        self._limiter = limiter
        self._limits = limits
        self._team_in_flight: Counter[str] = Counter()
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @asynccontextmanager
    async def admitted(self, principal: Principal) -> AsyncIterator[dict[str, str]]:
        """Hold a place for the body of the `with`; gives the headers that tell the rate. Raises `ApiError`."""
        rate = await self._limiter.take(principal.team_id)
        headers = rate_headers(rate)
        decision = admit(rate, self._team_in_flight[principal.team_id], self._in_flight, self._limits)
        if isinstance(decision, Refuse):
            raise ApiError(
                decision.status,
                decision.code,
                decision.message,
                retry_after_s=decision.retry_after_s,
                headers=headers,
            )
        self._in_flight += 1
        self._team_in_flight[principal.team_id] += 1
        try:
            yield headers
        finally:
            self._in_flight -= 1
            self._team_in_flight[principal.team_id] -= 1
            if self._team_in_flight[principal.team_id] == 0:
                del self._team_in_flight[principal.team_id]


def rate_headers(rate: Rate) -> dict[str, str]:
    """Return the rate under OpenAI's header names."""
    return {
        "x-ratelimit-limit-requests": str(rate.limit),
        "x-ratelimit-remaining-requests": str(rate.remaining),
        "x-ratelimit-reset-requests": f"{rate.reset_s:.3f}s",
    }
