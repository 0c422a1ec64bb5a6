"""What the adviser says of traffic: each rule as a table, and that it never says a dearer way is cheaper."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.billing.adviser import (
    FEWEST_REQUESTS,
    MAX_GPUS,
    Advice,
    Minute,
    Seen,
    Way,
    advise,
    break_even_milli,
    by_token_nanousd,
    capacity_milli,
    cheapest,
    needed,
    needed_by_hour,
    needed_by_hour_of_day,
)
from services.billing.instants import HOUR_US, MINUTE_US
from services.billing.pricing import Price

MIDNIGHT = 20_000 * 24 * HOUR_US
RATE = 6_000_000_000  # six dollars an hour, ten cents a minute
PRICES = [
    Price("price_1", "t", "live", 1000, 3000, 0),
    Price("price_2", "t", "live", 2000, 6000, (MIDNIGHT + 12 * HOUR_US) // 1000),
    Price("price_b", "t", "batch", 500, 1500, 0),
]
SEEN = Seen(requests=1000, gpu_us=100 * MINUTE_US, best_minute_milli=0)  # ten a minute


def minute(at_min: int, requests: int, work_class: str = "live") -> Minute:
    """Requests of 100 prompt and 100 completion tokens each: 400,000 nano-USD by the first price."""
    return Minute(MIDNIGHT + at_min * MINUTE_US, work_class, requests, 100 * requests, 100 * requests)


def advice(
    minutes: list[Minute], paid: int = 0, hours: int = 24, rate: int | None = RATE, seen: Seen = SEEN
) -> Advice:
    return advise(minutes, paid, PRICES, "t", rate, seen, MIDNIGHT, hours)


@pytest.mark.parametrize(
    ("minutes", "cost"),
    [
        ([], 0),
        ([minute(0, 1)], 400_000),
        ([minute(0, 1, "batch")], 200_000),
        ([minute(719, 1), minute(720, 1)], 400_000 + 800_000),  # the price rises at noon
        ([minute(0, 1), Minute(MIDNIGHT, "night", 1, 1, 1)], None),  # no such price: nothing is said
    ],
)
def test_by_token(minutes: list[Minute], cost: int | None) -> None:
    assert by_token_nanousd(minutes, PRICES, "t") == cost


@pytest.mark.parametrize(
    ("seen", "milli"),
    [
        (SEEN, 10_000),
        (Seen(FEWEST_REQUESTS, 20 * MINUTE_US, 0), 1000),
        (Seen(FEWEST_REQUESTS - 1, 20 * MINUTE_US, 90_000), None),  # too few
        (Seen(1000, 0, 5000), None),  # no GPU time known
        (Seen(1000, 100 * MINUTE_US, 25_500), 25_500),  # batching was seen to do better
        (Seen(1000, 10**18, 0), 1),
    ],
)
def test_what_one_gpu_serves(seen: Seen, milli: int | None) -> None:
    assert capacity_milli(seen) == milli


@pytest.mark.parametrize(
    ("demand", "gpus"),
    [
        ([], 0),
        ([1], 1),
        ([10], 1),
        ([11], 2),
        ([10] * 95 + [100] * 5, 1),  # in 95 of 100 minutes one is enough
        ([10] * 94 + [100] * 6, 10),
        ([10] * 19 + [30], 1),
        ([10] * 18 + [30] * 2, 3),
        ([10**6], MAX_GPUS),
    ],
)
def test_needed(demand: list[int], gpus: int) -> None:
    assert needed(demand, 10_000) == gpus


def test_hours_and_hours_of_the_day() -> None:
    first = MIDNIGHT + 22 * HOUR_US
    demand = {
        first - 1: 10**6,  # before
        first: 15,
        first + HOUR_US: 5,
        first + 24 * HOUR_US: 35,
        first + 26 * HOUR_US: 10**6,  # after
    }
    needs = needed_by_hour(demand, 10_000, first, 26)
    assert (needs[0], needs[1], needs[24], sum(needs)) == (2, 1, 4, 7)
    assert needed_by_hour_of_day(needs, first) == [0] * 22 + [4, 1]


def test_traffic_by_day_is_cheapest_with_autoscaling() -> None:
    # Given two hours of the day with fifteen requests a minute, and none in the rest
    told = advice([minute(at, 15) for at in range(60, 180)], paid=2 * 24 * RATE)
    assert told.by_token_nanousd == 120 * 15 * 400_000
    assert told.fixed == Way(2 * 24 * RATE, 2)
    assert told.autoscaled == Way(2 * 2 * RATE, 2)
    assert told.windows == Way(2 * 2 * RATE, 2, (0, 2, 2) + (0,) * 21)
    assert told.cheapest == "by_token"
    # A dollar and more for a thousand tokens: then the GPUs win
    dear = [Price("p", "t", "live", 10**6, 10**6, 0)]
    other = advise(
        [minute(at, 15) for at in range(60, 180)], 2 * 24 * RATE, dear, "t", RATE, SEEN, MIDNIGHT, 24
    )
    assert other.cheapest == "autoscaled"


def test_a_quiet_day_after_a_busy_one_tells_windows_from_autoscaling() -> None:
    told = advice([minute(at, 15) for at in range(60)], hours=48)
    assert told.autoscaled is not None and told.windows is not None
    assert (told.autoscaled.cost_nanousd, told.windows.cost_nanousd) == (2 * RATE, 2 * 2 * RATE)


def test_without_records_or_an_option_nothing_is_said_of_gpus() -> None:
    for told in (advice([minute(0, 1)], seen=Seen(1, 1, 0)), advice([minute(0, 1)], rate=None)):
        assert (told.fixed, told.autoscaled, told.windows) == (None, None, None)
    assert advice([], paid=5).cheapest == "by_token"  # nothing was asked for, so tokens cost nothing
    assert advice([], paid=5).fixed == Way(0, 0)


@pytest.mark.parametrize(
    ("rate", "by_token", "requests", "milli"),
    [
        (RATE, 400_000, 1, 250_000),  # ten cents a minute buy 250 requests of 0.0004
        (RATE, 400_000 * 7, 7, 250_000),
        (1, 60, 1, 1),  # rounded up: a little less would not pay
        (0, 5, 1, None),
        (None, 5, 1, None),
        (RATE, None, 1, None),
        (RATE, 0, 3, None),
        (RATE, 0, 0, None),
    ],
)
def test_break_even(rate: int | None, by_token: int | None, requests: int, milli: int | None) -> None:
    assert break_even_milli(rate, by_token, requests) == milli


def test_a_break_even_beyond_one_gpu_is_said_to_be() -> None:
    assert advice([minute(0, 1)]).break_even_within_one_gpu is False  # 250 a minute; it serves ten
    quick = Seen(1000, 1000 * MINUTE_US // 300, 0)
    assert advice([minute(0, 1)], seen=quick).break_even_within_one_gpu is True
    assert advice([minute(0, 1)], seen=Seen(0, 0, 0)).break_even_within_one_gpu is None


@pytest.mark.parametrize(
    ("paid", "ways", "name"),
    [
        (10, {"by_token": 5, "fixed": 4}, "fixed"),
        (10, {"by_token": 4, "fixed": 4}, "by_token"),
        (4, {"by_token": 4, "fixed": 5}, "paid"),
        (10, {"by_token": None, "fixed": None}, "paid"),
        (10, {"by_token": None, "fixed": 9}, "fixed"),
    ],
)
def test_cheapest(paid: int, ways: dict[str, int | None], name: str) -> None:
    assert cheapest(paid, ways) == name


@settings(deadline=None)
@given(
    st.lists(st.builds(minute, st.integers(0, 47 * 60), st.integers(0, 100)), max_size=60),
    st.integers(0, 10**12),
)
def test_scaling_never_costs_more_than_windows_and_what_is_cheapest_is(
    minutes: list[Minute], paid: int
) -> None:
    told = advice(minutes, paid, hours=48)
    assert told.fixed is not None and told.autoscaled is not None and told.windows is not None
    assert told.autoscaled.cost_nanousd <= told.windows.cost_nanousd
    costs = {
        "paid": paid, "by_token": told.by_token_nanousd, "fixed": told.fixed.cost_nanousd,
        "autoscaled": told.autoscaled.cost_nanousd, "windows": told.windows.cost_nanousd,
    }  # fmt: skip
    assert costs[told.cheapest] == min(cost for cost in costs.values() if cost is not None)
