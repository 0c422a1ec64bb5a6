"""The rate limit on a real Redis: shared by gateways, leased ahead, and counted by each alone while Redis is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from services.gateway import rate_limit
from services.gateway.rate_lease import LEASE_S, max_permits
from services.gateway.rate_limit import AWAY_PAUSE_S, BUDGET_S, Rate, RateLimiter, RateRule
from tests.tcp_proxy import TcpProxy

WIDE = RateRule(requests_per_s=200.0, burst=400)
SLACK_S = 0.1
"""What a busy machine adds to a time-out."""


class Clock:
    """The limiter's clock, which stands still until a test moves it; Redis has its own."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def real_budget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Until a test calls this the budget is so long that a machine that stalls is no Redis that is away."""
    monkeypatch.setattr(rate_limit, "BUDGET_S", 5.0)
    return lambda: monkeypatch.setattr(rate_limit, "BUDGET_S", BUDGET_S)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as held:
        yield held


@asynccontextmanager
async def keeping(*limiters: RateLimiter) -> AsyncIterator[None]:
    """Their leases are filled, as in a gateway."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(limiter.keep_leases()) for limiter in limiters]
        yield
        for task in tasks:
            task.cancel()


async def lease_many(limiter: RateLimiter, team_id: str = "team_a") -> None:
    """Take until the team's lease is well over its low mark, so that the next request starts no fill."""
    async with asyncio.timeout(20):
        while True:
            assert (await limiter.take(team_id)).allowed
            await asyncio.sleep(0.005)
            lease = limiter._teams[team_id].lease
            if lease.permits > 8 and not lease.asking:
                return


def count_asked(limiter: RateLimiter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The permits that Redis is asked for from now on, one entry for each round trip."""
    asked: list[int] = []
    ask = limiter._ask

    async def count(team_id: str, team: Any, permits: int) -> Any:
        asked.append(permits)
        return await ask(team_id, team, permits)

    monkeypatch.setattr(limiter, "_ask", count)
    return asked


# ---- shared


async def test_two_gateways_share_a_teams_rate_and_teams_do_not(redis_db: str, stack: AsyncExitStack) -> None:
    rule = RateRule(requests_per_s=0.01, burst=5)
    first, second = RateLimiter(redis_db, rule, stack), RateLimiter(redis_db, rule, stack)
    async with keeping(first, second):
        rates = [await limiter.take("team_a") for limiter in (first, second) * 3]
        assert [rate.allowed for rate in rates] == [True] * 5 + [False]
        assert [rate.remaining for rate in rates] == [4, 3, 2, 1, 0, 0]
        assert 0 < rates[-1].retry_after_s <= 100
        assert (await second.take("team_b")).allowed
        assert first.redis_answers and second.redis_answers


async def test_the_shared_rate_refills(redis_db: str, stack: AsyncExitStack) -> None:
    limiter = RateLimiter(redis_db, RateRule(requests_per_s=0.5, burst=1), stack)
    assert (await limiter.take("team_a")).allowed
    refused = await limiter.take("team_a")
    assert not refused.allowed
    await asyncio.sleep(refused.retry_after_s + 0.02)
    assert (await limiter.take("team_a")).allowed


async def test_a_burst_of_requests_is_counted_to_the_last_in_three_round_trips(
    redis_db: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = RateLimiter(redis_db, RateRule(requests_per_s=0.01, burst=40), stack)
    await limiter.take("team_b")  # connects
    asked = count_asked(limiter, monkeypatch)
    rates = await asyncio.gather(*(limiter.take("team_a") for _ in range(100)))
    assert limiter.redis_answers
    assert asked == [1, 1, 98]
    # Those that came first, and the others learn when the next one fits.
    assert [rate.allowed for rate in rates] == [True] * 40 + [False] * 60
    assert all(98 < rate.retry_after_s <= 100 for rate in rates[40:])


async def test_requests_in_line_are_counted_although_those_before_them_are_cancelled(
    redis_db: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = RateLimiter(redis_db, RateRule(requests_per_s=0.01, burst=40), stack)
    await limiter.take("team_b")  # connects
    asked = count_asked(limiter, monkeypatch)
    tasks = [asyncio.ensure_future(limiter.take("team_a")) for _ in range(10)]
    await asyncio.sleep(0)  # the first two ask, the others are in line
    for task in tasks[:5]:
        task.cancel()
    rates = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(rate, asyncio.CancelledError) for rate in rates] == [True] * 5 + [False] * 5
    assert asked == [1, 1, 5]
    assert all(isinstance(rate, Rate) and rate.allowed for rate in rates[5:])
    assert limiter.redis_answers


async def test_a_burst_fits_where_the_interval_is_no_whole_microsecond(
    redis_db: str, stack: AsyncExitStack
) -> None:
    limiter = RateLimiter(redis_db, RateRule(requests_per_s=0.15, burst=2), stack)
    assert [(await limiter.take("team_a")).allowed for _ in range(3)] == [True, True, False]


async def test_two_gateways_under_a_flood_let_in_no_more_than_burst_and_rate(
    redis_db: str, stack: AsyncExitStack
) -> None:
    rule = RateRule(requests_per_s=100.0, burst=160)
    most = max_permits(rule.requests_per_s, rule.burst)
    assert most > 1
    limiters = [RateLimiter(redis_db, rule, stack) for _ in range(2)]
    started_s = time.monotonic()
    assert (await limiters[0].take("team_a")).allowed  # from now on the bucket is filled up again
    first_s = time.monotonic()
    over = False

    async def flood(limiter: RateLimiter) -> int:
        """Until somebody is refused after 1.5 s: then all that there was by that time was taken."""
        nonlocal over
        admitted = 0
        while not over:
            asked_s = time.monotonic()
            allowed = (await limiter.take("team_a")).allowed
            admitted += allowed
            over = over or (not allowed and asked_s - first_s > 1.5)
            await asyncio.sleep(0.002)
        return admitted

    async with keeping(*limiters):
        admitted = 1 + sum(await asyncio.gather(*(flood(limiter) for limiter in limiters * 6)))
    elapsed_s = time.monotonic() - started_s
    assert all(limiter.redis_answers for limiter in limiters)
    assert admitted <= rule.burst + rule.requests_per_s * elapsed_s
    # And not much less: only what is still leased, and one refused round, is missing.
    assert admitted >= rule.burst + rule.requests_per_s * 1.5 - 2 * most - 20


# ---- leased


async def test_a_leased_request_asks_nobody(
    redis_db: str, stack: AsyncExitStack, real_budget: Callable[[], None]
) -> None:
    async with TcpProxy.before(redis_db) as proxy:
        limiter = RateLimiter(proxy.url(redis_db), WIDE, stack, Clock())
        async with keeping(limiter):
            await lease_many(limiter)
            real_budget()
            proxy.blackhole()
            assert (await limiter.take("team_a")).allowed
            await asyncio.sleep(2 * BUDGET_S)
            assert limiter.redis_answers


async def test_a_lease_ends(redis_db: str, stack: AsyncExitStack, real_budget: Callable[[], None]) -> None:
    clock = Clock()
    async with TcpProxy.before(redis_db) as proxy:
        limiter = RateLimiter(proxy.url(redis_db), WIDE, stack, clock)
        async with keeping(limiter):
            await lease_many(limiter)
            real_budget()
            proxy.blackhole()
            clock.now_s += LEASE_S
            assert (await limiter.take("team_a")).allowed
            assert not limiter.redis_answers  # so it was asked


async def test_a_team_that_sends_steadily_seldom_asks(
    redis_db: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = RateLimiter(redis_db, WIDE, stack)
    asked = count_asked(limiter, monkeypatch)
    async with keeping(limiter):
        for _ in range(100):
            assert (await limiter.take("team_a")).allowed
            await asyncio.sleep(0.005)
    assert asked[:3] == [1, 2, 4]
    assert len(asked) <= 25
    assert sum(asked) <= 100 + 16


async def test_what_remains_is_told_as_if_nothing_were_leased(redis_db: str, stack: AsyncExitStack) -> None:
    limiter = RateLimiter(redis_db, WIDE, stack)
    async with keeping(limiter):
        started_s = time.monotonic()
        for taken in range(1, 61):
            rate = await limiter.take("team_a")
            regained = WIDE.requests_per_s * (time.monotonic() - started_s)
            assert WIDE.burst - taken - 1 <= rate.remaining <= WIDE.burst - taken + regained + 1
            assert 0 <= rate.reset_s <= (taken + 16) / WIDE.requests_per_s
            await asyncio.sleep(0.001)


async def test_a_cancelled_request_does_not_keep_its_team_from_leasing(
    redis_db: str, stack: AsyncExitStack
) -> None:
    async with TcpProxy.before(redis_db) as proxy:
        limiter = RateLimiter(proxy.url(redis_db), WIDE, stack)
        async with keeping(limiter):
            await limiter.take("team_b")  # connects
            proxy.blackhole()
            asking = asyncio.ensure_future(limiter.take("team_a"))
            await asyncio.sleep(BUDGET_S / 10)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await proxy.pass_on()
            await lease_many(limiter)
            assert limiter.redis_answers


async def test_filling_ends_when_it_is_cancelled_at_any_point(redis_db: str, stack: AsyncExitStack) -> None:
    limiter = RateLimiter(redis_db, WIDE, stack)
    await limiter.take("team_a")
    for turns in range(12):
        limiter._low["team_a"] = 1
        limiter._some_low.set()
        keeping_leases = asyncio.ensure_future(limiter.keep_leases())
        for _ in range(turns):
            await asyncio.sleep(0)
        keeping_leases.cancel()
        done, _ = await asyncio.wait([keeping_leases], timeout=10)
        assert done, f"it goes on after a cancellation at turn {turns}"
        assert keeping_leases.cancelled()


async def test_teams_are_forgotten_when_there_are_too_many(
    redis_db: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_limit, "MAX_TEAMS", 3)
    limiter = RateLimiter(redis_db, WIDE, stack)
    for _ in range(3):
        await limiter.take("team_a")
    assert limiter._low == {"team_a": 4}
    for index in range(10):
        await limiter.take(f"team_{index}")
    assert list(limiter._teams) == ["team_7", "team_8", "team_9"]
    assert limiter._low == {}
    async with keeping(limiter):  # which was woken for a team that is gone
        await lease_many(limiter, "team_7")


# ---- away


async def test_without_redis_the_rate_is_counted_here_and_nobody_waits(
    stack: AsyncExitStack, real_budget: Callable[[], None]
) -> None:
    real_budget()
    limiter = RateLimiter("redis://127.0.0.1:1/0", RateRule(requests_per_s=1.0, burst=3), stack)
    started_s = time.monotonic()
    rates = [await limiter.take("team_a") for _ in range(5)]
    assert time.monotonic() - started_s < 0.5
    assert [rate.allowed for rate in rates] == [True] * 3 + [False] * 2
    assert not limiter.redis_answers
    assert 0 < rates[-1].retry_after_s <= 1.0


async def test_a_redis_that_freezes_costs_its_budget_once_and_comes_back(
    redis_db: str, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, real_budget: Callable[[], None]
) -> None:
    clock = Clock()
    async with TcpProxy.before(redis_db) as proxy:
        limiter = RateLimiter(proxy.url(redis_db), WIDE, stack, clock)
        async with keeping(limiter):
            await lease_many(limiter)
            real_budget()
            proxy.blackhole()
            started_s = time.monotonic()
            rates = [await limiter.take("team_a") for _ in range(100)]
            assert time.monotonic() - started_s < BUDGET_S + SLACK_S
            assert all(rate.allowed for rate in rates)
            answers = [limiter.redis_answers]

            # When the pause is over one request finds out; those beside it do not wait.
            clock.now_s += AWAY_PAUSE_S
            monkeypatch.setattr(rate_limit, "BUDGET_S", 3.0)
            asking = [asyncio.create_task(limiter.take("team_a")) for _ in range(20)]
            await asyncio.wait(asking, timeout=1.5)
            assert sum(not each.done() for each in asking) <= 1
            assert all(rate.allowed for rate in await asyncio.gather(*asking))
            monkeypatch.setattr(rate_limit, "BUDGET_S", 5.0)
            answers.append(limiter.redis_answers)

            await proxy.pass_on()
            clock.now_s += AWAY_PAUSE_S
            assert (await limiter.take("team_a")).allowed
            answers.append(limiter.redis_answers)
            assert answers == [False, False, True]
            await lease_many(limiter)


async def test_a_redis_that_is_gone_is_noticed_by_the_fill_and_found_again(
    redis_db: str, stack: AsyncExitStack
) -> None:
    clock = Clock()
    async with TcpProxy.before(redis_db) as proxy:
        limiter = RateLimiter(proxy.url(redis_db), WIDE, stack, clock)
        async with keeping(limiter):
            await lease_many(limiter)
            proxy.refuse()
            async with asyncio.timeout(20):
                while limiter.redis_answers:
                    assert (await limiter.take("team_a")).allowed
                    await asyncio.sleep(0.01)
            assert limiter._teams["team_a"].lease.permits > 0  # no request had to wait to find out
            await proxy.pass_on()
            clock.now_s += AWAY_PAUSE_S
            await lease_many(limiter)
            assert limiter.redis_answers


async def test_a_redis_that_never_answered_costs_its_budget_once(
    stack: AsyncExitStack, real_budget: Callable[[], None]
) -> None:
    real_budget()

    async def accept_and_say_nothing(_reader: Any, _writer: Any) -> None:
        await asyncio.sleep(60)

    silent = await asyncio.start_server(accept_and_say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    limiter = RateLimiter(f"redis://127.0.0.1:{port}/0", RateRule(100.0, 100), stack)
    started_s = time.monotonic()
    for _ in range(20):
        assert (await limiter.take("team_a")).allowed
    assert time.monotonic() - started_s < 0.3
    silent.close()
