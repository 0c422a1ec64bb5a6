"""A month computed from what happened: what belongs to it, that no order matters, and that a difference is seen."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.billing.instants import HOUR_US, MINUTE_US, to_unix_ms, to_unix_us
from services.billing.minutes import LiveInterval
from services.billing.pricing import Price
from services.billing.statement import MonthBill, Sums, TokenLine, bill_from_facts, differences
from shared.calendar_month import CalendarMonth, read_month
from shared.messages import UsageEvent
from tests.unit.billing.builders import make_usage, make_void

RATE = 60_000_000_000  # a dollar a minute
DOLLAR = 10**9
PRICES = [
    Price("price_1", "smollm2-135m", "live", 20, 60, 0),
    Price("price_2", "smollm2-135m", "live", 40, 120, to_unix_ms(datetime(2026, 11, 15, tzinfo=UTC))),
    Price("price_b", "smollm2-135m", "batch", 10, 30, 0),
]


def month_of(text: str) -> CalendarMonth:
    month = read_month(text)
    assert month is not None
    return month


NOVEMBER = month_of("2026-11")


def moment_ms(*at: int) -> int:
    return to_unix_ms(datetime(*at, tzinfo=UTC))  # type: ignore[misc, arg-type]


def bill(
    *jobs: list[UsageEvent], intervals: list[LiveInterval] | None = None, month: CalendarMonth = NOVEMBER
) -> MonthBill:
    return bill_from_facts(month, [(facts[0].job_id, facts) for facts in jobs], intervals or [], PRICES)


def used(job: str = "job_1", at: tuple[int, ...] = (2026, 11, 10), **fields: Any) -> UsageEvent:
    return make_usage(job_id=job, accepted_unix_ms=moment_ms(*at), **fields)


def live(start: tuple[int, ...], end: tuple[int, ...], place: int = 0) -> LiveInterval:
    return LiveInterval(
        "res_a", "team_a", place, RATE, to_unix_us(datetime(*start, tzinfo=UTC)), to_unix_us(datetime(*end, tzinfo=UTC))  # type: ignore[misc, arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("accepted", "in_month"),
    [
        ((2026, 10, 31, 23, 59, 59, 999_000), False),
        ((2026, 11, 1), True),
        ((2026, 11, 30, 23, 59, 59, 999_000), True),
        ((2026, 12, 1), False),
        ((2025, 11, 10), False),
    ],
)
def test_a_job_belongs_to_the_month_that_accepted_it(accepted: tuple[int, ...], in_month: bool) -> None:
    # It ends, and is corrected, a day later: that changes nothing
    fact = used(at=accepted, finished_unix_ms=moment_ms(*accepted) + 86_400_000)
    assert bool(bill([fact]).jobs_nanousd) is in_month


def test_a_year_ends_like_a_month_and_a_leap_second_is_the_next_day_s_first() -> None:
    december, january = month_of("2016-12"), month_of("2017-01")
    # 2016-12-31T23:59:60Z is told by POSIX clocks as 2017-01-01T00:00:00Z
    leap: list[UsageEvent] = [make_usage(accepted_unix_ms=1_483_228_800_000)]
    before: list[UsageEvent] = [make_usage(accepted_unix_ms=1_483_228_799_999)]
    for facts, month in ((before, december), (leap, january)):
        for asked in (december, january):
            assert bool(bill(facts, month=asked).jobs_nanousd) is (asked == month)


def test_minutes_across_the_end_of_a_month_are_parted_at_it() -> None:
    # Half a minute before and after midnight: each month's hour has its own begun minute
    over = [live((2026, 11, 30, 23, 59, 30), (2026, 12, 1, 0, 0, 30))]
    november, december = bill(intervals=over), bill(intervals=over, month=month_of("2026-12"))
    assert (november.total_nanousd, december.total_nanousd) == (DOLLAR, DOLLAR)
    year = [live((2026, 12, 31, 23, 0), (2027, 1, 1, 1, 0), place=3)]
    assert bill(intervals=year, month=month_of("2026-12")).total_nanousd == 60 * DOLLAR
    assert bill(intervals=year, month=month_of("2027-01")).total_nanousd == 60 * DOLLAR
    assert bill(intervals=year, month=month_of("2027-02")).total_nanousd == 0


def test_tokens_have_a_line_for_each_type_class_and_price_version() -> None:
    computed = bill(
        [used("job_1")],
        [used("job_2", (2026, 11, 14, 23, 59, 59, 999_000))],
        [used("job_3", (2026, 11, 15))],
        [used("job_4", work_class="batch")],
        [used("job_5", outcome="failed")],
        [used("job_6", billing="resource")],
        [used("job_7", model_type="without-a-price")],
    )
    assert computed.token_lines == {
        TokenLine("smollm2-135m", "live", "price_1"): Sums(20, 40, 2 * 1400),
        TokenLine("smollm2-135m", "live", "price_2"): Sums(10, 20, 2800),
        TokenLine("smollm2-135m", "batch", "price_b"): Sums(10, 20, 700),
    }
    assert (
        computed.total_nanousd == sum(line.amount_nanousd for line in computed.token_lines.values()) == 6300
    )


def test_facts_that_contradict_each_other_cost_nothing_and_are_named() -> None:
    computed = bill([used(), used(attempt=2, model_type="another")])
    assert (computed.jobs_nanousd, computed.refused) == ({}, ["job_1"])


facts_of_a_job = st.lists(
    st.one_of(
        st.builds(
            lambda attempt, tokens, outcome: used(attempt=attempt, completion_tokens=tokens, outcome=outcome),
            st.integers(1, 3),
            st.integers(0, 50),
            st.sampled_from(["succeeded", "cancelled", "failed", "expired"]),
        ),
        st.builds(
            lambda tokens, reason: make_void(
                delivered_tokens=tokens, reason=reason, accepted_unix_ms=moment_ms(2026, 11, 10)
            ),
            st.integers(0, 50),
            st.sampled_from(["client_gone", "deadline", "failed", "never_published"]),
        ),
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(facts_of_a_job, st.data())
def test_any_order_and_any_repetition_of_facts_gives_the_same_month(
    facts: list[UsageEvent], data: st.DataObject
) -> None:
    again = data.draw(st.permutations(facts + data.draw(st.lists(st.sampled_from(facts), max_size=4))))
    assert bill(facts) == bill(again)


@settings(deadline=None)
@given(st.integers(0, 20 * HOUR_US), st.integers(1, 20 * HOUR_US), st.data())
def test_an_interval_cut_anywhere_costs_the_same(start_us: int, length_us: int, data: st.DataObject) -> None:
    base = to_unix_us(NOVEMBER.end) - 20 * HOUR_US
    cuts = sorted(data.draw(st.lists(st.integers(0, length_us), max_size=5)))
    edges = [0, *cuts, length_us]
    whole = LiveInterval("res_a", "t", 0, RATE, base + start_us, base + start_us + length_us)
    parts = [
        LiveInterval("res_a", "t", 0, RATE, base + start_us + a, base + start_us + b)
        for a, b in pairwise(edges)
    ]
    assert bill(intervals=[whole]) == bill(intervals=data.draw(st.permutations(parts)))
    minutes = bill(intervals=[whole]).total_nanousd // DOLLAR
    assert minutes * MINUTE_US <= length_us + 22 * MINUTE_US


def test_books_that_agree_have_no_difference() -> None:
    computed = bill([used()], intervals=[live((2026, 11, 1), (2026, 11, 1, 0, 1))])
    assert list(differences(computed, computed, computed)) == []


@pytest.mark.parametrize("wrong", ["ledger", "statement"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"jobs_nanousd": {"job_1": 1401}}, "job job_1: 1400 nano-USD from its facts, 1401 in the {0}"),
        ({"jobs_nanousd": {}}, "job job_1: 1400 nano-USD from its facts, 0 in the {0}"),
        (
            {"jobs_nanousd": {"job_1": 1400, "job_9": 5}},
            "job job_9: 0 nano-USD from its facts, 5 in the {0}",
        ),
        ({"hours_nanousd": {}}, "1000000000 nano-USD from its intervals, 0 in the {0}"),
        ({"hours_nanousd": {("res_b", 0, HOUR_US): 1}}, "0 nano-USD from its intervals, 1 in the {0}"),
    ],
)
def test_a_nano_dollar_too_much_or_too_little_is_told(wrong: str, change: dict[str, Any], named: str) -> None:
    computed = bill([used()], intervals=[live((2026, 11, 1), (2026, 11, 1, 0, 1))])
    same: dict[str, Any] = {
        "jobs_nanousd": computed.jobs_nanousd,
        "token_lines": computed.token_lines,
        "hours_nanousd": computed.hours_nanousd,
    }
    books = {
        name: MonthBill(**(same | change if name == wrong else same)) for name in ("ledger", "statement")
    }
    found = list(differences(computed, books["ledger"], books["statement"]))
    assert any(named.format(wrong) in line for line in found), found


def test_a_line_with_other_tokens_for_the_same_money_is_told() -> None:
    computed = bill([used()])
    statement = MonthBill(
        computed.jobs_nanousd, {TokenLine("smollm2-135m", "live", "price_1"): Sums(13, 19, 1400)}
    )
    (found,) = differences(computed, computed, statement)
    assert found.startswith(
        "smollm2-135m / live / price_1: 10 + 20 tokens, 1400 nano-USD from facts, 13 + 19"
    )
