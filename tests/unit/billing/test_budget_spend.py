"""Where an amount counts, what facts free, and what billing takes from a gateway's ask."""

from __future__ import annotations

import itertools
from datetime import UTC, date, datetime
from typing import Any

import pytest

from services.billing.budget_leases import (
    MAX_JOB_DEADLINE_S,
    MAX_NEEDS,
    ask_refusal,
    facts_read_until,
    is_running,
)
from services.billing.budget_spend import (
    SpendKey,
    add_up,
    minutes_spend,
    reservations_freed,
    sure_nanousd,
    tokens_spend,
)
from services.billing.intake import amount_nanousd
from services.billing.pricing import Price
from services.billing.settle import settle
from shared.budgets.period import Period, credit_budget_id, credit_team, day_of, period_end, period_start
from shared.messages import AskBudget, LeaseClosed, UsageEvent
from tests.unit.billing.builders import make_usage, make_void


def unix_ms(*moment: int) -> int:
    return int(datetime(*moment, tzinfo=UTC).timestamp() * 1000)  # type: ignore[misc, arg-type]


@pytest.mark.parametrize(
    ("at", "day"),
    [
        (unix_ms(2026, 11, 28), date(2026, 11, 28)),
        (unix_ms(2026, 11, 28) - 1, date(2026, 11, 27)),
        (unix_ms(2028, 2, 29, 23, 59, 59), date(2028, 2, 29)),
        (unix_ms(2026, 10, 25, 0, 30), date(2026, 10, 25)),  # a night of 25 hours in Europe
    ],
)
def test_days_are_utc(at: int, day: date) -> None:
    assert day_of(at) == day


@pytest.mark.parametrize(
    ("period", "day", "start", "end"),
    [
        ("day", date(2026, 12, 31), date(2026, 12, 31), date(2027, 1, 1)),
        ("month", date(2026, 12, 31), date(2026, 12, 1), date(2027, 1, 1)),
        ("month", date(2026, 2, 1), date(2026, 2, 1), date(2026, 3, 1)),
        ("month", date(2028, 2, 29), date(2028, 2, 1), date(2028, 3, 1)),
    ],
)
def test_periods_begin_and_end(period: Period, day: date, start: date, end: date) -> None:
    assert period_start(period, day) == start
    assert period_end(period, start) == end


def test_credit_is_a_budget_without_an_end() -> None:
    assert period_start("ever", date(2026, 12, 31)) == date(1970, 1, 1)
    assert period_end("ever", date(1970, 1, 1)) == date.max
    assert credit_team(credit_budget_id("team_a")) == "team_a"
    assert credit_team("bud_1") is None


def test_tokens_count_for_four_things_on_the_day_of_acceptance() -> None:
    fact = make_usage(accepted_unix_ms=unix_ms(2026, 11, 28) - 1, finished_unix_ms=unix_ms(2026, 11, 28, 1))
    day = date(2026, 11, 27)
    assert tokens_spend(fact, 50) == {
        SpendKey("team_a", "team", "team_a", day): 50,
        SpendKey("team_a", "resource", "res_pool", day): 50,
        SpendKey("team_a", "model", "model_a", day): 50,
        SpendKey("team_a", "key", "key_a", day): 50,
    }


def test_minutes_count_for_team_and_resource_in_their_hour() -> None:
    spend = minutes_spend("team_a", "res_a", unix_ms(2026, 11, 27, 23) * 1000, 70)
    day = date(2026, 11, 27)
    assert spend == {
        SpendKey("team_a", "team", "team_a", day): 70,
        SpendKey("team_a", "resource", "res_a", day): 70,
    }
    both = add_up([spend, spend, {SpendKey("team_a", "key", "key_a", day): -3}])
    assert both[SpendKey("team_a", "team", "team_a", day)] == 140
    assert both[SpendKey("team_a", "key", "key_a", day)] == -3


RESERVED: dict[str, Any] = {"lease_ids": ["lease_1", "lease_2"], "reserved_nanousd": 1400}
PRICES = [Price("price_1", "smollm2-135m", "live", 20, 60, 0)]
SUCCEEDED, NOTHING, READ, LATER = (
    make_usage(**RESERVED, **fields)
    for fields in (
        {},
        {"outcome": "cancelled", "completion_tokens": 0, "prefill_ran": False},
        {"outcome": "cancelled", "completion_tokens": 0},
        {"outcome": "cancelled", "completion_tokens": 7},
    )
)
GONE_BEFORE, GONE_IN_QUEUE, GONE_LATER = (
    make_void(**RESERVED, delivered_tokens=tokens, had_worker=had)
    for tokens, had in ((0, True), (0, False), (5, True))
)
FAILED = make_void(**RESERVED, reason="failed", delivered_tokens=0)


@pytest.mark.parametrize(
    ("facts", "sure"),
    [
        ([], 0),
        ([SUCCEEDED], 1400),
        ([READ], 1400),
        ([NOTHING], 0),
        ([GONE_BEFORE], 1200),
        ([GONE_BEFORE, READ], 1400),
        ([GONE_BEFORE, NOTHING], 1400),
        ([GONE_IN_QUEUE], 1400),
        ([GONE_LATER], 1400),
        ([FAILED], 1400),
        ([NOTHING, FAILED], 1400),
    ],
)
def test_how_much_of_a_reservation_no_fact_can_need_any_more(facts: list[UsageEvent], sure: int) -> None:
    assert sure_nanousd(facts, PRICES) == sure


@pytest.mark.parametrize(
    ("usage", "void"),
    [
        *itertools.product([SUCCEEDED, NOTHING, READ, LATER], [GONE_BEFORE, FAILED]),
        *itertools.product([SUCCEEDED, NOTHING, LATER], [GONE_LATER]),
        (NOTHING, GONE_IN_QUEUE),
    ],
)
def test_in_any_order_what_is_posted_and_reserved_of_a_job_never_grows_and_ends_at_its_cost(
    usage: UsageEvent, void: UsageEvent
) -> None:
    for order in ([usage, void], [void, usage]):
        known: list[UsageEvent] = []
        covered = [1400]
        freed = 0
        for fact in order:
            known.append(fact)
            freed += reservations_freed({"job_1": known}, {fact.event_id}, PRICES)["lease_1"]
            posted = amount_nanousd(settle(known), PRICES[0])
            covered.append(posted + 1400 - freed)
        assert covered == sorted(covered, reverse=True), "room was made that was taken back"
        assert freed == 1400


def test_a_job_frees_its_reservation_once() -> None:
    first, later = make_usage(**RESERVED), make_void(**RESERVED)
    other = make_usage(job_id="job_2", lease_ids=["lease_1"], reserved_nanousd=5)
    plain = make_usage(job_id="job_3")
    facts: dict[str, list[UsageEvent]] = {"job_1": [first, later], "job_2": [other], "job_3": [plain]}
    everything = {fact.event_id for of_job in facts.values() for fact in of_job}
    both_at_once = reservations_freed(facts, everything, PRICES)
    assert both_at_once == {"lease_1": 1405, "lease_2": 1400}
    assert reservations_freed(facts, {later.event_id}, PRICES) == {}, "it was freed with the first fact"
    assert reservations_freed(facts, set(), PRICES) == {}, "settled again, for its price came late"


@pytest.mark.parametrize(
    ("seen", "expected"),
    [([], 0), ([100_000], 0), ([70_000], 70_000), ([10_000, 70_000, 70_001, 99_000], 70_000)],
)
def test_facts_are_read_when_what_was_taken_from_the_queue_had_its_time(
    seen: list[int], expected: int
) -> None:
    assert facts_read_until(seen, 100_000) == expected


def ask(**fields: Any) -> AskBudget:
    values: dict[str, Any] = {
        "lease_id": "lease_1",
        "budget_id": "bud_1",
        "period_start": date(2026, 11, 28),
        "gateway_id": "gw_1",
        "reply_queue": "replies.v1.gw_1",
        "deadline_unix_ms": 0,
        "needs_nanousd": [1],
        "wanted_nanousd": 1,
        "unit_nanousd": 1,
        "job_deadline_s": 300,
        **fields,
    }
    return AskBudget(**values)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({}, False),
        ({"needs_nanousd": [], "wanted_nanousd": 0}, False),
        ({"needs_nanousd": [1] * MAX_NEEDS}, False),
        ({"needs_nanousd": [1] * (MAX_NEEDS + 1)}, True),
        ({"needs_nanousd": [1, -1]}, True),
        ({"wanted_nanousd": -1}, True),
        ({"unit_nanousd": 2**62 + 1}, True),
        ({"closed": [LeaseClosed(lease_id="l", spent_nanousd=-1)]}, True),
        ({"job_deadline_s": MAX_JOB_DEADLINE_S + 1}, True),
        ({"job_deadline_s": -1}, True),
    ],
)
def test_what_no_gateway_asks_is_refused(fields: dict[str, Any], refused: bool) -> None:
    assert (ask_refusal(ask(**fields)) is not None) is refused


@pytest.mark.parametrize(
    ("period", "start", "running"),
    [
        ("day", date(2026, 11, 29), False),
        ("day", date(2026, 11, 30), True),
        ("day", date(2026, 12, 1), True),
        ("day", date(2026, 12, 2), True),
        ("day", date(2026, 12, 3), False),
        ("month", date(2026, 11, 1), True),  # yesterday was in it
        ("month", date(2026, 12, 1), True),
        ("month", date(2026, 12, 2), False),
        ("month", date(2027, 1, 1), False),
        ("ever", date(1970, 1, 1), True),
        ("ever", date(2026, 12, 1), False),
    ],
)
def test_slices_are_of_running_periods(period: Period, start: date, running: bool) -> None:
    assert is_running(period, ask(period_start=start), unix_ms(2026, 12, 1, 12)) is running
