"""Requests per second of a team, counted in Redis over all gateways; by each process alone while Redis is away.

GCRA ("leaky bucket as a meter", ITU-T I.371 annex A): one number per team, the time at which its bucket is empty
again. Redis is only speed here: losing it forgets at most one burst.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

log = structlog.get_logger()

BUDGET_S = 0.05
"""What a request waits for Redis at most; redis-py's own retries took 26 s when it was paused."""
CONNECTIONS = 16
AWAY_PAUSE_S = 1.0
MAX_LOCAL_TEAMS = 10_000

# KEYS[1]: the team's key; ARGV: emission interval and burst tolerance in microseconds. Redis's clock is the only one.
# Returns {allowed, microseconds until the bucket is empty, microseconds until one more fits}.
_GCRA = """
local now = redis.call('TIME')
now = now[1] * 1000000 + now[2]
local interval, tolerance = tonumber(ARGV[1]), tonumber(ARGV[2])
local tat = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now)
local new_tat = tat + interval
local early = new_tat - tolerance - now
if early > 0 then
  return {0, tat - now, early}
end
redis.call('SET', KEYS[1], string.format('%.0f', new_tat), 'PX', math.ceil((new_tat - now) / 1000) + 1000)
return {1, new_tat - now, 0}
"""


@dataclass(frozen=True, slots=True)
class RateRule:
    requests_per_s: float
    burst: int


@dataclass(frozen=True, slots=True)
class Rate:
    """The outcome for one request."""

    allowed: bool
    limit: int
    remaining: int
    reset_s: float
    """Seconds until the whole burst is free again."""
    retry_after_s: float


def take_from(tat_s: float, now_s: float, rule: RateRule) -> tuple[bool, float]:
    """GCRA on one number: whether a request fits at `now_s`, and the time `tat` after it. Pure.

    A request costs 1/rate; it fits if the bucket would then be empty again within burst/rate.
    """
    new_tat_s = max(tat_s, now_s) + 1 / rule.requests_per_s
    if new_tat_s - now_s > rule.burst / rule.requests_per_s + 1e-9:
        return False, max(tat_s, now_s)
    return True, new_tat_s


class RateLimiter:
    """One per process; keys are team ids."""

    def __init__(
        self, url: str, rule: RateRule, stack: AsyncExitStack, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rule = rule
        self._now_s = clock
        # A pool that waits: one that refuses its 17th user would make every burst look like a Redis that is away.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=BUDGET_S,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=0.2,
            socket_connect_timeout=0.2,
        )
        self._client = redis.asyncio.Redis.from_pool(pool)
        stack.push_async_callback(self._client.aclose)
        self._script = self._client.register_script(_GCRA)
        self._local: OrderedDict[str, float] = OrderedDict()
        self._away_until_s = -1.0

    @property
    def redis_answers(self) -> bool:
        """False while the limit is counted by this process alone."""
        return self._away_until_s < 0

    async def take(self, team_id: str) -> Rate:
        """Count one request of the team. Never raises for Redis: it then counts locally."""
        now_s = self._now_s()
        if now_s >= self._away_until_s:
            try:
                async with asyncio.timeout(BUDGET_S):
                    allowed, used_us, wait_us = await self._script(
                        # The hash tag keeps a team's keys on one node of a cluster.
                        keys=[f"roundhouse:{{{team_id}}}:rate"],
                        args=[
                            round(1e6 / self._rule.requests_per_s),
                            round(1e6 * self._rule.burst / self._rule.requests_per_s),
                        ],
                    )
            except (RedisError, OSError, TimeoutError) as error:
                if self._away_until_s < 0:
                    log.warning("rate_limit_local", reason=type(error).__name__)
                self._away_until_s = now_s + AWAY_PAUSE_S
            else:
                if self._away_until_s >= 0:
                    log.info("rate_limit_shared_again")
                self._away_until_s = -1.0
                return self._rate(bool(allowed), used_us / 1e6, wait_us / 1e6)
        return self._take_local(team_id, now_s)

    def _take_local(self, team_id: str, now_s: float) -> Rate:
        allowed, tat_s = take_from(self._local.get(team_id, now_s), now_s, self._rule)
        self._local[team_id] = tat_s
        self._local.move_to_end(team_id)
        if len(self._local) > MAX_LOCAL_TEAMS:
            self._local.popitem(last=False)
        used_s = tat_s - now_s
        wait_s = max(0.0, used_s + (1 - self._rule.burst) / self._rule.requests_per_s)
        return self._rate(allowed, used_s, 0.0 if allowed else wait_s)

    def _rate(self, allowed: bool, used_s: float, wait_s: float) -> Rate:
        used = used_s * self._rule.requests_per_s
        remaining = max(0, int(self._rule.burst - used + 1e-6))
        return Rate(allowed, self._rule.burst, remaining, max(0.0, used_s), wait_s)
