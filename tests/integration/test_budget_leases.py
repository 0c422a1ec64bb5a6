"""Hard caps on a real broker and database: three gateways at the edge of a cap, one of them killed; billing silent."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import msgspec
import pytest

from services.billing import budget_leases
from services.billing.budget_leases import LeaseHandler, LeaseRound
from services.billing.commands import ACTIONS
from services.billing.handlers import EventHandler
from services.billing.payments_store import PaymentIntake
from shared import topology
from shared.broker import Broker
from shared.budgets.gate import BudgetGate
from shared.budgets.slices import DENIED_S
from shared.budgets.table import BudgetTable
from shared.database import Database
from shared.inference.errors import ApiError
from shared.messages import AskBudget, Command, CreateBudget, DeleteBudget, GenerateJob
from tests.conftest import Vhost
from tests.integration.billing_stand import Stand, open_stand, until
from tests.integration.budget_gateway import WORST_NANOUSD, make_job, usage_of, void_of
from tests.unit.billing.builders import COMMAND, make_credit, make_terms

ROOT = Path(__file__).resolve().parents[2]


async def insert_budget(
    admin: asyncpg.Connection[asyncpg.Record],
    limit_nanousd: int,
    scope: str = "team",
    scope_id: str = "team_a",
    period: str = "month",
) -> str:
    budget_id = f"bud_{scope}_{scope_id}_{period}"
    await admin.execute(
        "INSERT INTO billing.budgets (budget_id, team_id, scope, scope_id, period, limit_nanousd, alert_percents, actions)"
        " VALUES ($1, 'team_a', $2, $3, $4, $5, '{}', '{refuse_ppt}')",
        budget_id,
        scope,
        scope_id,
        period,
        limit_nanousd,
    )
    return budget_id


async def stands(admin: asyncpg.Connection[asyncpg.Record], budget_id: str) -> tuple[int, int]:
    """Posted and reserved."""
    row = await admin.fetchrow(
        "SELECT posted_nanousd, reserved_nanousd FROM billing_api.budgets_v1 WHERE budget_id = $1", budget_id
    )
    assert row is not None
    return row["posted_nanousd"], row["reserved_nanousd"]


@asynccontextmanager
async def running_billing(vhost: Vhost, stand: Stand) -> AsyncIterator[Broker]:
    """Facts are settled and slices leased, until the end."""
    async with AsyncExitStack() as stack:
        broker = await Broker.open(vhost.amqp_url, "billing", stack)
        events = EventHandler(
            broker, stand.intake, PaymentIntake(stand.database, stand.instruments), stand.instruments
        )
        leases = LeaseHandler(broker, stand.database)
        tasks = [
            asyncio.create_task(events.run(asyncio.Event())),
            asyncio.create_task(
                broker.consume(topology.BILLING_BUDGETS, AskBudget, leases.on_ask, prefetch=4)
            ),
        ]
        try:
            yield broker
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def running_gate(vhost: Vhost, database_url: str) -> AsyncIterator[BudgetGate]:
    async with AsyncExitStack() as stack:
        database = await Database.open(database_url, "roundhouse_gateway", stack)
        broker = await Broker.open(vhost.amqp_url, "gateway", stack)
        table = BudgetTable(database)
        await table.refresh()
        gate = BudgetGate(broker, table, "gw_1", 300)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        await gate.start(group)
        yield gate
        for task in group._tasks.copy():
            task.cancel()


@dataclass
class Gateway:
    """A gateway process, and all that it said."""

    process: asyncio.subprocess.Process
    accepted: dict[str, int] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def decided(self) -> int:
        return len(self.accepted) + self.refused.total()

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            word, *rest = line.decode().split()
            if word == "accepted":
                self.accepted[rest[0]] = int(rest[1])
            elif word == "refused":
                self.refused[" ".join(rest)] += 1


async def start_gateway(vhost: Vhost, database: str, requests: int, completion_tokens: int) -> Gateway:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.integration.budget_gateway",
        database, vhost.amqp_url, str(requests), str(completion_tokens),
        cwd=ROOT, env={**os.environ}, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return Gateway(process)


def tell_to_go(gateways: Sequence[Gateway]) -> None:
    for gateway in gateways:
        assert gateway.process.stdin is not None
        gateway.process.stdin.write(b"go\n")


async def watch(
    admin: asyncpg.Connection[asyncpg.Record], budget_id: str, limit: int, seen: list[int]
) -> None:
    while True:
        posted, reserved = await stands(admin, budget_id)
        seen.append(posted + reserved)
        assert posted + reserved <= limit
        await asyncio.sleep(0.005)


async def test_a_hundred_requests_at_the_edge_of_a_cap_get_exactly_what_is_left(
    vhost: Vhost, database: str
) -> None:
    fitting = 50
    limit = fitting * WORST_NANOUSD + WORST_NANOUSD // 2
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(open_stand(database))
        budget_id = await insert_budget(stand.admin, limit)
        await stack.enter_async_context(running_billing(vhost, stand))
        gateways = [await start_gateway(vhost, database, count, 20) for count in (33, 33, 34)]
        reading = [asyncio.create_task(gateway.read()) for gateway in gateways]
        seen: list[int] = []
        watcher = await asyncpg.connect(database)
        stack.push_async_callback(watcher.close)
        watching = asyncio.create_task(watch(watcher, budget_id, limit, seen))
        tell_to_go(gateways)
        await asyncio.gather(*reading)
        # Slices that were not used up are back, and every job is posted
        await until(lambda: _is(stand, budget_id, (fitting * WORST_NANOUSD, 0)))
        assert not watching.done(), "there was an overshoot"
        watching.cancel()
    assert sum(len(gateway.accepted) for gateway in gateways) == fitting
    assert sum(gateway.decided for gateway in gateways) == 100
    assert {why for gateway in gateways for why in gateway.refused} == {"402 budget_exceeded false"}
    assert max(seen) <= limit


async def _is(stand: Stand, budget_id: str, expected: tuple[int, int]) -> bool:
    return await stands(stand.admin, budget_id) == expected


@pytest.mark.parametrize("after_s", [0.005, 0.03, 0.1])
async def test_no_overshoot_when_one_of_three_gateways_is_killed(
    vhost: Vhost, database: str, monkeypatch: pytest.MonkeyPatch, after_s: float
) -> None:
    limit = 50 * WORST_NANOUSD
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(open_stand(database))
        budget_id = await insert_budget(stand.admin, limit)
        broker = await stack.enter_async_context(running_billing(vhost, stand))
        gateways = [await start_gateway(vhost, database, 34, 20) for _ in range(3)]
        reading = [asyncio.create_task(gateway.read()) for gateway in gateways]
        watcher = await asyncpg.connect(database)
        stack.push_async_callback(watcher.close)
        watching = asyncio.create_task(watch(watcher, budget_id, limit, []))
        tell_to_go(gateways)
        await until(lambda: _began(gateways))
        await asyncio.sleep(after_s)
        gateways[0].process.send_signal(signal.SIGKILL)
        await asyncio.gather(*reading)
        assert sum(gateway.decided for gateway in gateways[1:]) == 68
        # Whatever the killed one had let in is covered: posted, or held for as long as it may come to be posted
        accepted = {job_id: amount for gateway in gateways for job_id, amount in gateway.accepted.items()}
        assert sum(accepted.values()) <= limit
        await until(lambda: queue_is_empty(broker))
        posted, reserved = await stands_at_last(stand, budget_id)
        unposted = sum(accepted.values()) - posted
        assert 0 <= unposted <= reserved <= limit - posted
        # Its slice is back once no job of it can run any more and all facts are read
        monkeypatch.setattr(budget_leases, "SETTLED_AFTER_MS", 200)
        lease_round = LeaseRound(broker, stand.database)
        await lease_round.once()
        await asyncio.sleep(0.3)
        await lease_round.once()
        assert await stands(stand.admin, budget_id) == (posted, reserved), "before its horizon it is held"
        await stand.admin.execute("UPDATE billing.budget_leases SET horizon_at = now() - interval '1 s'")
        await lease_round.once()
        await asyncio.sleep(0.3)
        await lease_round.once()
        assert await stands(stand.admin, budget_id) == (posted, 0)
        assert not watching.done(), "there was an overshoot"
        watching.cancel()


async def stands_at_last(stand: Stand, budget_id: str) -> tuple[int, int]:
    """Once it has been the same for a second: facts that were taken off the queue may still be on their way."""
    found, since_s = await stands(stand.admin, budget_id), time.monotonic()
    while time.monotonic() - since_s < 1:
        await asyncio.sleep(0.05)
        now = await stands(stand.admin, budget_id)
        if now != found:
            found, since_s = now, time.monotonic()
    return found


async def _began(gateways: Sequence[Gateway]) -> bool:
    return any(gateway.decided for gateway in gateways)


async def queue_is_empty(broker: Broker) -> bool:
    return await broker.depth(topology.BILLING_EVENTS) == 0


async def test_what_a_job_did_not_use_is_free_when_it_is_posted(vhost: Vhost, database: str) -> None:
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(open_stand(database))
        budget_id = await insert_budget(stand.admin, WORST_NANOUSD + 300)
        broker = await stack.enter_async_context(running_billing(vhost, stand))
        gate = await stack.enter_async_context(running_gate(vhost, database))
        job = await reserve(gate)
        with pytest.raises(ApiError) as refused:
            await gate.reserve([make_job()])
        assert (refused.value.status, refused.value.code) == (402, "budget_exceeded")
        assert refused.value.headers == {"x-should-retry": "true", "Retry-After": "2"}
        await broker.publish_event(usage_of(job, 0))  # 200 for its prompt
        await until(lambda: _is(stand, budget_id, (200, 0)))
        second = await reserve(gate)
        await broker.publish_event(usage_of(second, 20))
        await until(lambda: _is(stand, budget_id, (200 + WORST_NANOUSD, 0)))
        with pytest.raises(ApiError) as refused:
            await gate.reserve([make_job()])
        assert refused.value.headers == {"x-should-retry": "false"}
        # Whoever hammers at a spent budget loads nobody
        asked = await stand.admin.fetchval("SELECT count(*) FROM billing.budget_leases")
        for _ in range(20):
            with pytest.raises(ApiError, match="Less is left"):
                await gate.reserve([make_job()])
            await asyncio.sleep(0.02)
        assert await stand.admin.fetchval("SELECT count(*) FROM billing.budget_leases") == asked


@pytest.mark.parametrize(("had_worker", "held"), [(True, 200), (False, 0)])
async def test_a_client_that_leaves_while_its_prompt_is_read_makes_room_for_no_more_than_is_sure(
    vhost: Vhost, database: str, had_worker: bool, held: int
) -> None:
    """The gateway's word comes first, and says nothing of the prompt; the worker's, that it was read, makes it cost."""
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(open_stand(database))
        budget_id = await insert_budget(stand.admin, WORST_NANOUSD)
        broker = await stack.enter_async_context(running_billing(vhost, stand))
        gate = await stack.enter_async_context(running_gate(vhost, database))
        job = await reserve(gate)
        await broker.publish_event(void_of(job, had_worker=had_worker))
        await until(lambda: _is(stand, budget_id, (0, held)))
        if not had_worker:
            await reserve(gate)
            return
        with pytest.raises(ApiError, match="reserved by requests that run"):
            await gate.reserve([make_job()])
        usage = usage_of(job, 0)
        await broker.publish_event(msgspec.structs.replace(usage, outcome="cancelled"))
        await until(lambda: _is(stand, budget_id, (200, 0)))


async def test_a_budget_that_is_deleted_in_use_leaves_nothing_held_and_what_ran_is_posted(
    vhost: Vhost, database: str
) -> None:
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(open_stand(database))
        budget_id = await insert_budget(stand.admin, WORST_NANOUSD)
        broker = await stack.enter_async_context(running_billing(vhost, stand))
        gate = await stack.enter_async_context(running_gate(vhost, database))
        job = await reserve(gate)
        await carry_out(stand, DeleteBudget(**COMMAND, team_id="team_a", budget_id=budget_id))
        # A gateway that has not heard of it yet is told that nothing is to be had, and to ask again
        with pytest.raises(ApiError) as refused:
            await gate.reserve([make_job()])
        assert refused.value.headers["x-should-retry"] == "true"
        fresh = await stack.enter_async_context(running_gate(vhost, database))
        assert (await fresh.reserve([make_job()])).jobs[0].lease_ids == []
        await broker.publish_event(usage_of(job, 20))
        await until(lambda: _spent_on(stand, job.accepted_unix_ms, WORST_NANOUSD))
        await until(lambda: _nothing_held(stand))
        # Made anew it counts what was spent, and a cap below that is refused
        again = CreateBudget(
            **COMMAND | {"command_id": "cmd_again"},
            team_id="team_a",
            scope="team",
            scope_id="team_a",
            period="month",
            limit_nanousd=WORST_NANOUSD - 1,
            alert_percents=[],
            actions=["refuse_ppt"],
        )
        async with stand.database.transaction() as connection:
            assert (await ACTIONS[CreateBudget](connection, again)).code == "cap_below_spent"


async def _nothing_held(stand: Stand) -> bool:
    return not await stand.admin.fetchval("SELECT count(*) FROM billing.budget_leases WHERE held_nanousd > 0")


async def reserve(gate: BudgetGate) -> GenerateJob:
    reservation = await gate.reserve([make_job()])
    reservation.published(0)
    reservation.resolve()
    job = reservation.jobs[0]
    assert isinstance(job, GenerateJob)
    return job


async def test_a_request_counts_in_every_budget_that_it_is_under(vhost: Vhost, database: str) -> None:
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(open_stand(database))
        team = await insert_budget(stand.admin, 10 * WORST_NANOUSD)
        key = await insert_budget(stand.admin, 2 * WORST_NANOUSD, "key", "key_a", "day")
        model = await insert_budget(stand.admin, 10 * WORST_NANOUSD, "model", "mod_other")
        broker = await stack.enter_async_context(running_billing(vhost, stand))
        gate = await stack.enter_async_context(running_gate(vhost, database))
        for _ in range(2):
            job = await reserve(gate)
            assert len(job.lease_ids) == 2
            await broker.publish_event(usage_of(job, 20))
        with pytest.raises(ApiError, match="the key's budget of this day"):
            await gate.reserve([make_job()])
        other_key = (await gate.reserve([make_job(key_id="key_b")])).jobs[0]
        assert len(other_key.lease_ids) == 1
        own_gpus = (await gate.reserve([make_job(billing="resource")])).jobs[0]
        assert own_gpus.lease_ids == []
        await until(lambda: _posted(stand, key, 2 * WORST_NANOUSD))
        await until(lambda: _posted(stand, team, 2 * WORST_NANOUSD))
        assert await stands(stand.admin, model) == (0, 0)


async def _posted(stand: Stand, budget_id: str, amount: int) -> bool:
    return (await stands(stand.admin, budget_id))[0] == amount


async def test_with_a_cap_a_silent_billing_refuses_and_without_one_nobody_waits(
    vhost: Vhost, database: str
) -> None:
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(open_stand(database))
        gate = await stack.enter_async_context(running_gate(vhost, database))
        began_s = time.monotonic()
        assert (await gate.reserve([make_job()])).jobs[0].lease_ids == []
        assert time.monotonic() - began_s < 0.1
        await insert_budget(stand.admin, 10 * WORST_NANOUSD)
        capped = await stack.enter_async_context(running_gate(vhost, database))
        began_s = time.monotonic()
        with pytest.raises(ApiError) as refused:
            await capped.reserve([make_job()])
        assert 1.5 < time.monotonic() - began_s < 2.5
        assert (refused.value.status, refused.value.code) == (503, "billing_unavailable")
        # Billing is back: what was asked while it was away is not held for anybody
        await stack.enter_async_context(running_billing(vhost, stand))
        await reserve(capped)


async def test_credit_is_never_overdrawn_by_requests(vhost: Vhost, database: str) -> None:
    """A prepaid team's balance is one more cap, for which no budget has to be made."""
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(open_stand(database))
        await carry_out(stand, make_terms())
        await carry_out(stand, make_credit(amount_nanousd=3 * WORST_NANOUSD + 5))
        broker = await stack.enter_async_context(running_billing(vhost, stand))
        gate = await stack.enter_async_context(running_gate(vhost, database))
        outcomes = await asyncio.gather(*(reserve(gate) for _ in range(20)), return_exceptions=True)
        jobs = [job for job in outcomes if isinstance(job, GenerateJob)]
        refusals = [error for error in outcomes if isinstance(error, ApiError)]
        assert (len(jobs), len(refusals)) == (3, 17)
        assert {(e.status, e.code, e.headers["x-should-retry"]) for e in refusals} == {
            (402, "insufficient_credit", "true")
        }
        for job in jobs:
            await broker.publish_event(usage_of(job, 20))
        await until(lambda: _balance_is(stand, 5))
        with pytest.raises(ApiError) as refused:
            await gate.reserve([make_job()])
        assert (refused.value.code, refused.value.headers["x-should-retry"]) == (
            "insufficient_credit",
            "false",
        )
        await carry_out(stand, make_credit(command_id="cmd_more", amount_nanousd=WORST_NANOUSD))
        await asyncio.sleep(DENIED_S)
        await reserve(gate)
        # A team that is given credit without a bound is not asked for any
        await carry_out(stand, make_terms(pays="postpaid", command_id="cmd_terms"))
        free = await stack.enter_async_context(running_gate(vhost, database))
        assert (await free.reserve([make_job()])).jobs[0].lease_ids == []


async def carry_out(stand: Stand, command: Command) -> None:
    async with stand.database.transaction() as connection:
        assert (await ACTIONS[type(command)](connection, command)).ok


async def _balance_is(stand: Stand, balance: int) -> bool:
    row = await stand.admin.fetchrow("SELECT * FROM billing_api.spendable_v1 WHERE team_id = 'team_a'")
    return row is not None and row["balance_nanousd"] == balance


async def test_a_period_begins_anew_and_late_facts_count_where_they_belong(
    vhost: Vhost, database: str
) -> None:
    """A job is reserved and posted in the period in which it was accepted, whatever the time of its fact."""
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(open_stand(database))
        budget_id = await insert_budget(stand.admin, WORST_NANOUSD, period="day")
        broker = await stack.enter_async_context(running_billing(vhost, stand))
        gate = await stack.enter_async_context(running_gate(vhost, database))
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        yesterday_ms = int(today.timestamp() * 1000) - 1
        old = (await gate.reserve([make_job(accepted_unix_ms=yesterday_ms)])).jobs[0]
        new = await reserve(gate)
        assert old.lease_ids != new.lease_ids
        assert isinstance(old, GenerateJob)
        await broker.publish_event(usage_of(old, 20))
        await until(lambda: _spent_on(stand, yesterday_ms, WORST_NANOUSD))
        assert await stands(stand.admin, budget_id) == (0, WORST_NANOUSD)
        with pytest.raises(ApiError, match="reserved by requests that run"):
            await gate.reserve([make_job()])


async def _spent_on(stand: Stand, unix_ms: int, amount: int) -> bool:
    day = datetime.fromtimestamp(unix_ms / 1000, UTC).date()
    return bool(
        amount
        == await stand.admin.fetchval(
            "SELECT posted_nanousd FROM billing.spend_days WHERE scope = 'team' AND day = $1", day
        )
    )
