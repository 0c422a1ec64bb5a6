"""Requests per second of a team, counted in Redis over all gateways; by each process alone while Redis is away.

GCRA ("leaky bucket as a meter", ITU-T I.371 annex A): one number per team, the time at which its bucket is empty
again. Redis is only speed here: losing it forgets at most one burst. Asking it costs a request 0.6 ms on a small
machine, so each process leases a few permits ahead (`rate_lease.py`), and most requests ask nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.gateway.rate_lease import Lease, filled, max_permits, next_step, not_filled

log = structlog.get_logger()

BUDGET_S = 0.05
"""What a request waits for Redis at most; redis-py's own retries took 26 s when it was paused."""
CONNECTIONS = 16
AWAY_PAUSE_S = 1.0
MAX_TEAMS = 10_000
"""Whom this process remembers. A team that is forgotten loses its lease, and its local bucket is full again."""

# KEYS[1]: the team's key; ARGV: emission interval in microseconds, burst, permits wanted. Redis's clock is the only one.
# Grants as many as fit. Returns {granted, microseconds until the bucket is empty, microseconds until one more fits}.
_GCRA = """
local now = redis.call('TIME')
now = now[1] * 1000000 + now[2]
local interval, burst, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local tat = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now)
local tolerance = burst * interval
local granted = math.max(0, math.min(wanted, math.floor((tolerance - (tat - now)) / interval)))
if granted > 0 then
  tat = tat + granted * interval
  redis.call('SET', KEYS[1], string.format('%.0f', tat), 'PX', math.ceil((tat - now) / 1000) + 1000)
end
return {granted, tat - now, math.max(0, tat + interval - tolerance - now)}
"""


@dataclass(frozen=True, slots=True)
class RateRule:
    requests_per_s: float
    burst: int


@dataclass(frozen=True, slots=True)
class Rate:
    """The outcome for one request.

    For one that went by a lease, what other gateways took since Redis was last asked (about a second) is not in it.
    """

    allowed: bool
    limit: int
    remaining: int
    """What fits at once: the permits leased here are in it, those leased by other gateways are not."""
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


@dataclass(frozen=True, slots=True)
class _Answer:
    """What Redis said."""

    granted: int
    wait_s: float
    """Until one more fits."""


@dataclass(slots=True)
class _Team:
    lease: Lease = field(default_factory=Lease)
    empty_s: float = 0.0
    """When its shared bucket is empty again, as Redis last said, by this process's clock."""
    local_tat_s: float = 0.0
    """The same of the bucket that is counted while Redis is away."""
    line: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: list[asyncio.Future[_Answer | None]] = field(default_factory=list)
    """One for each request in line, in order; set when another has asked for it too."""


class RateLimiter:
    """One per process; keys are team ids. `keep_leases` has to run for leases to be filled ahead of need."""

    def __init__(
        self, url: str, rule: RateRule, stack: AsyncExitStack, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rule = rule
        self._max_permits = max_permits(rule.requests_per_s, rule.burst)
        self._now_s = clock
        # A pool that waits: one that refuses its 17th user would make every burst look like a Redis that is away.
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=BUDGET_S,
            retry=Retry(NoBackoff(), 0),
            # `BUDGET_S` bounds each call. With a time-out of its own redis-py sends inside `asyncio.wait_for`, which on
            # Python 3.11 can swallow a cancellation: `keep_leases` would then outlive the service.
            socket_timeout=None,
            socket_connect_timeout=0.2,
        )
        self._client = redis.asyncio.Redis.from_pool(pool)
        stack.push_async_callback(self._client.aclose)
        self._script = self._client.register_script(_GCRA)
        self._teams: OrderedDict[str, _Team] = OrderedDict()
        self._low: dict[str, int] = {}
        """Teams whose leases run low, and the permits that would fill them. Each is in `_teams`."""
        self._some_low = asyncio.Event()
        self._away_until_s: float | None = None

    @property
    def redis_answers(self) -> bool:
        """False while the limit is counted by this process alone."""
        return self._away_until_s is None

    async def take(self, team_id: str) -> Rate:
        """Count one request of the team. Never raises for Redis: it then counts locally."""
        now_s = self._now_s()
        team = self._team(team_id)
        step = next_step(team.lease, now_s, self._max_permits)
        team.lease = step.lease
        if step.spends:
            if step.fills:
                self._low[team_id] = step.ask
                self._some_low.set()
            return self._shared(team, True, 0.0)
        if step.fills:
            answer = await self._fill(team_id, team, step.ask, own=1)
        else:
            answer = await self._ask_together(team_id, team)
        if answer is None:
            return self._take_local(team, now_s)
        allowed = answer.granted > 0
        return self._shared(team, allowed, 0.0 if allowed else answer.wait_s)

    async def keep_leases(self) -> None:
        """Fill the leases that run low, one team after the other, until cancelled.

        One at a time is 1600 fills/s, far more than a process has requests for; a team whose turn comes late asks
        by itself.
        """
        while True:
            await self._some_low.wait()
            self._some_low.clear()
            while self._low:
                team_id = next(iter(self._low))
                permits = self._low.pop(team_id)
                await self._fill(team_id, self._teams[team_id], permits, own=0)

    def _team(self, team_id: str) -> _Team:
        team = self._teams.get(team_id)
        if team is None:
            team = self._teams[team_id] = _Team()
            if len(self._teams) > MAX_TEAMS:
                forgotten, _ = self._teams.popitem(last=False)
                self._low.pop(forgotten, None)
        else:
            self._teams.move_to_end(team_id)
        return team

    async def _fill(self, team_id: str, team: _Team, permits: int, *, own: int) -> _Answer | None:
        """Ask, and put what is granted beyond the `own` requests that wait into the lease."""
        asked_s = self._now_s()
        answer = None
        try:
            answer = await self._ask(team_id, team, permits)
        finally:  # also when the request is cancelled: the next one asks
            if answer is None or answer.granted == 0:
                team.lease = not_filled(team.lease)
            else:
                team.lease = filled(team.lease, answer.granted - own, asked_s)
        return answer

    async def _ask_together(self, team_id: str, team: _Team) -> _Answer | None:
        """Ask for one request, and in the same round trip for all that came while another was under way.

        A hundred requests at once would otherwise be a hundred round trips, whose last takes longer than the budget:
        on a busy machine that looked like a Redis that is away. If not all fit, those that came first do.
        """
        if self._away_until_s is not None:
            # In line the others would wait for the one that finds out.
            return await self._ask(team_id, team, 1)
        own: asyncio.Future[_Answer | None] = asyncio.get_running_loop().create_future()
        team.waiting.append(own)
        try:
            async with team.line:
                if not own.done():
                    together = [each for each in team.waiting if not each.done()]
                    answer = await self._ask(team_id, team, len(together))
                    for place, each in enumerate(together):
                        fits = answer is not None and place < answer.granted
                        each.set_result(answer and _Answer(int(fits), answer.wait_s))
                return own.result()
        finally:  # a request that is cancelled leaves the line; if it was asking, the next one asks
            team.waiting.remove(own)

    async def _ask(self, team_id: str, team: _Team, permits: int) -> _Answer | None:
        """Count up to so many permits in Redis; None if it is away."""
        now_s = self._now_s()
        if self._away_until_s is not None:
            if now_s < self._away_until_s:
                return None
            self._away_until_s = now_s + AWAY_PAUSE_S  # one finds out, the others do not wait for it
        try:
            async with asyncio.timeout(BUDGET_S):
                granted, used_us, wait_us = await self._script(
                    # The hash tag keeps a team's keys on one node of a cluster.
                    keys=[f"roundhouse:{{{team_id}}}:rate"],
                    args=[round(1e6 / self._rule.requests_per_s), self._rule.burst, permits],
                )
        except (RedisError, OSError, TimeoutError) as error:
            if self._away_until_s is None:
                log.warning("rate_limit_local", reason=type(error).__name__)
            self._away_until_s = now_s + AWAY_PAUSE_S
            return None
        if self._away_until_s is not None:
            log.info("rate_limit_shared_again")
            self._away_until_s = None
        team.empty_s = self._now_s() + used_us / 1e6
        return _Answer(granted, wait_us / 1e6)

    def _take_local(self, team: _Team, now_s: float) -> Rate:
        allowed, team.local_tat_s = take_from(team.local_tat_s, now_s, self._rule)
        used_s = team.local_tat_s - now_s
        wait_s = max(0.0, used_s + (1 - self._rule.burst) / self._rule.requests_per_s)
        return self._rate(allowed, used_s, 0.0 if allowed else wait_s)

    def _shared(self, team: _Team, allowed: bool, wait_s: float) -> Rate:
        used_s = max(0.0, team.empty_s - self._now_s())
        return self._rate(allowed, used_s, wait_s, leased=team.lease.permits)

    def _rate(self, allowed: bool, used_s: float, wait_s: float, leased: int = 0) -> Rate:
        free = int(self._rule.burst - used_s * self._rule.requests_per_s + 1e-6)
        remaining = min(self._rule.burst, max(0, free) + leased)
        return Rate(allowed, self._rule.burst, remaining, used_s, wait_s)
