"""Facts become money exactly once, on a real database, whatever their order and number of deliveries."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AsyncExitStack

import asyncpg
import pytest

from services.billing import ledger, store
from services.billing.price_versions import set_price
from services.billing.rounds import SweepRound
from services.billing.settle import BadFact, FactsDisagree
from shared.messages import Timings, UsageEvent
from shared.outcomes import Unavailable
from tests.integration.billing_stand import CHARGE_NANOUSD, insert_price, job_charges, open_stand
from tests.unit.billing.builders import make_set_price, make_usage, make_void


async def test_a_fact_becomes_a_request_and_a_balanced_charge(database: str) -> None:
    async with open_stand(database) as stand:
        await stand.record(make_usage())
        request = await stand.admin.fetchrow("SELECT * FROM billing.requests")
        entries = await stand.admin.fetch("SELECT * FROM billing_api.ledger_v1 ORDER BY account_id")
    assert request is not None
    assert (request["outcome"], request["charged_nanousd"], request["price_id"]) == (
        "succeeded",
        CHARGE_NANOUSD,
        "price_1",
    )
    assert (request["prompt_tokens"], request["completion_tokens"], request["prefill_ms"]) == (10, 20, 20.0)
    assert [(e["account_id"], e["amount_nanousd"]) for e in entries] == [
        ("revenue:tokens", CHARGE_NANOUSD),
        ("team:team_a", -CHARGE_NANOUSD),
    ]
    assert {e["unique_key"] for e in entries} == {"tokens:job_1"}


async def test_a_fact_told_again_by_another_worker_is_no_conflict_and_another_count_is(database: str) -> None:
    told = make_usage(event_id="use_job_1_1")
    again = make_usage(
        event_id="use_job_1_1",
        worker_id="other",
        finished_unix_ms=told.finished_unix_ms + 5000,
        timings=Timings(),
    )
    other = make_usage(event_id="use_job_1_1", completion_tokens=21)
    async with open_stand(database) as stand:
        await stand.record(told)
        async with stand.database.transaction() as connection:
            assert await store.find_conflicts(connection, [again]) == []
            assert await store.find_conflicts(connection, [other]) == ["use_job_1_1"]
        # Whatever came later: the first one stays.
        await stand.record(again, other)
        assert await job_charges(stand.admin) == {"job_1": (CHARGE_NANOUSD, 1)}


async def test_any_order_and_repetition_of_facts_ends_in_the_same_state(database: str) -> None:
    # Given the same story of a job, told in every order, one by one and repeated
    stories = list(itertools.permutations(["zombie", "usage", "void"]))
    async with open_stand(database) as stand:
        for number, story in enumerate(stories):
            job_id = f"job_{number}"
            facts: dict[str, UsageEvent] = {
                "zombie": make_usage(job_id=job_id, attempt=1, completion_tokens=3, worker_id="zombie"),
                "usage": make_usage(job_id=job_id, attempt=2),
                "void": make_void(job_id=job_id),
            }
            for name in (*story, *story):
                await stand.record(facts[name])
            # And in one batch, which changes nothing any more
            await stand.record(*facts.values())
        charges = await job_charges(stand.admin)
        requests = await stand.admin.fetch(
            "SELECT DISTINCT outcome, attempt, prompt_tokens, completion_tokens, charged_nanousd FROM billing.requests"
        )
        events = await stand.admin.fetchval("SELECT count(*) FROM billing.usage_events")
    # Then every job has been charged for the five tokens that were delivered
    assert {amount for amount, _ in charges.values()} == {10 * 20 + 5 * 60}
    assert [tuple(row) for row in requests] == [("cancelled", 2, 10, 5, 500)]
    assert events == 3 * len(stories)


async def test_eight_racing_processes_charge_each_job_once(database: str) -> None:
    facts: list[UsageEvent] = [make_usage(job_id=f"job_{n}", team_id=f"team_{n % 5}") for n in range(60)]
    async with AsyncExitStack() as stack:
        stands = [await stack.enter_async_context(open_stand(database, priced=(n == 0))) for n in range(8)]
        orders = [facts[n * 7 :] + facts[: n * 7] for n in range(8)]
        await asyncio.gather(
            *(s.record(*order[:40]) for s, order in zip(stands, orders, strict=True)),
            *(s.record(*order[30:]) for s, order in zip(stands, orders, strict=True)),
        )
        charges = await job_charges(stands[0].admin)
    assert charges == {f"job_{n}": (CHARGE_NANOUSD, 1) for n in range(60)}


async def test_different_facts_of_one_job_in_racing_processes_are_settled_together(database: str) -> None:
    numbers = range(40)
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(open_stand(database))
        other = await stack.enter_async_context(open_stand(database, priced=False))
        for first in numbers[::10]:
            jobs = [f"job_{n}" for n in numbers[first : first + 10]]
            await asyncio.gather(
                one.record(*(make_usage(job_id=job) for job in jobs)),
                other.record(*(make_void(job_id=job) for job in reversed(jobs))),
            )
        charges = await job_charges(one.admin)
        rows = await one.admin.fetch(
            "SELECT DISTINCT outcome, attempt, charged_nanousd FROM billing.requests"
        )
    assert {job: amount for job, (amount, _) in charges.items()} == {f"job_{n}": 500 for n in numbers}
    assert [tuple(row) for row in rows] == [("cancelled", 1, 500)]


async def test_a_late_void_posts_the_difference_as_one_correction(database: str) -> None:
    async with open_stand(database) as stand:
        await stand.record(make_usage())
        await stand.record(make_void())
        await stand.record(make_void())
        rows = await stand.admin.fetch(
            "SELECT unique_key, kind, amount_nanousd FROM billing_api.ledger_v1 "
            "WHERE account_id = 'team:team_a' ORDER BY transaction_id"
        )
        corrected = await stand.admin.fetch(
            "SELECT c.unique_key, t.unique_key FROM billing.transactions c "
            "JOIN billing.transactions t ON t.transaction_id = c.corrects"
        )
        balance = await stand.admin.fetchval("SELECT balance_nanousd FROM billing_api.balances_v1")
    assert [tuple(row) for row in rows] == [
        ("tokens:job_1", "tokens", -1400),
        ("tokens:job_1:1", "correction", 900),
    ]
    assert [tuple(row) for row in corrected] == [("tokens:job_1:1", "tokens:job_1")]
    assert balance == -500


async def test_dedicated_work_is_recorded_and_not_charged_by_the_token(database: str) -> None:
    async with open_stand(database) as stand:
        await stand.record(make_usage(billing="resource"))
        assert await job_charges(stand.admin) == {}
        assert await stand.admin.fetchval("SELECT charged_nanousd FROM billing.requests") == 0


async def test_a_job_without_a_price_is_charged_once_its_price_exists(database: str) -> None:
    async with open_stand(database, priced=False) as stand:
        sweep = SweepRound(stand.database, stand.intake, stand.instruments, 3650)
        await stand.record(make_usage())
        await sweep.once()
        assert await job_charges(stand.admin) == {}
        await insert_price(stand.admin)
        await sweep.once()
        await sweep.once()
        assert await job_charges(stand.admin) == {"job_1": (CHARGE_NANOUSD, 1)}
        assert await stand.admin.fetchval("SELECT price_id FROM billing.requests") == "price_1"


@pytest.mark.parametrize(
    ("fact", "error"),
    [
        (make_usage(completion_tokens=-1), BadFact),
        (make_usage(event_id="other", team_id="team_b"), FactsDisagree),
        (make_usage(job_id="job\x00"), asyncpg.DataError),
    ],
)
async def test_a_fact_that_cannot_be_taken_changes_nothing(
    database: str, fact: UsageEvent, error: type[Exception]
) -> None:
    async with open_stand(database) as stand:
        await stand.record(make_usage())
        with pytest.raises(error):
            await stand.record(make_usage(job_id="job_2"), fact)
        assert await job_charges(stand.admin) == {"job_1": (CHARGE_NANOUSD, 1)}
        assert await stand.admin.fetchval("SELECT count(*) FROM billing.usage_events") == 1


async def test_a_server_that_refuses_to_write_is_away_not_a_bad_fact(database: str) -> None:
    async with open_stand(database) as stand:
        await stand.admin.execute("ALTER TABLE billing.usage_events RENAME TO elsewhere")
        with pytest.raises(Unavailable):
            await stand.record(make_usage())
        await stand.admin.execute("ALTER TABLE billing.elsewhere RENAME TO usage_events")
        await stand.record(make_usage())
        assert await job_charges(stand.admin) == {"job_1": (CHARGE_NANOUSD, 1)}


async def test_old_request_records_go_and_what_they_cost_stays(database: str) -> None:
    async with open_stand(database) as stand:
        await stand.record(
            make_usage(accepted_unix_ms=1_000), make_usage(job_id="job_2", accepted_unix_ms=2_000)
        )
        await SweepRound(stand.database, stand.intake, stand.instruments, 30).once()
        assert await stand.admin.fetchval("SELECT count(*) FROM billing.requests") == 0
        # A fact that comes once more charges nothing a second time
        await stand.record(make_void(reason="client_gone", delivered_tokens=20, accepted_unix_ms=1_000))
        assert await job_charges(stand.admin) == {
            "job_1": (CHARGE_NANOUSD, 1),
            "job_2": (CHARGE_NANOUSD, 1),
        }


@pytest.mark.parametrize("table", ["usage_events", "transactions", "entries", "prices"])
async def test_rows_of_money_cannot_be_changed_by_anybody(database: str, table: str) -> None:
    change = {
        "usage_events": "team_id = 'x'",
        "transactions": "words = 'x'",
        "entries": "amount_nanousd = -amount_nanousd",
        "prices": "completion_nanousd = 0",
    }[table]
    async with open_stand(database) as stand:
        await stand.record(make_usage())
        for statement in (f"UPDATE billing.{table} SET {change}", f"DELETE FROM billing.{table}"):
            with pytest.raises(asyncpg.RestrictViolationError):
                await stand.admin.execute(statement)
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await stand.database.pool.execute(statement)


async def test_the_database_refuses_a_transaction_that_does_not_balance(database: str) -> None:
    async with open_stand(database) as stand:
        await stand.record(make_usage())
        with pytest.raises(asyncpg.CheckViolationError):
            await stand.admin.execute(
                "WITH t AS (INSERT INTO billing.transactions (transaction_id, unique_key, kind, team_id, words) "
                "VALUES ('txn_x', 'x', 'credit', 'team_a', '') RETURNING transaction_id) "
                "INSERT INTO billing.entries SELECT transaction_id, 'revenue:tokens', 1 FROM t"
            )


async def test_an_unbalanced_ledger_is_noticed(database: str) -> None:
    async with open_stand(database) as stand:
        await stand.record(make_usage())
        assert await ledger.count_unbalanced(stand.admin, 0) == 0
        await stand.admin.execute("SET session_replication_role = replica")
        await stand.admin.execute("UPDATE billing.entries SET amount_nanousd = amount_nanousd + 1")
        assert await ledger.count_unbalanced(stand.admin, 0) == 1


async def test_of_racing_prices_for_one_moment_one_is_set(database: str) -> None:
    async with open_stand(database, priced=False) as stand:

        async def set_one(number: int) -> str:
            async with stand.database.transaction() as connection:
                result = await set_price(connection, make_set_price(command_id=f"cmd_{number}"))
            return result.code

        codes = await asyncio.gather(*(set_one(n) for n in range(4)))
        assert sorted(codes) == ["ok", "price_overlaps", "price_overlaps", "price_overlaps"]
        assert await stand.admin.fetchval("SELECT count(*) FROM billing.prices") == 1
