"""How many GPUs a batch gets, and what they cost: tables of the rules."""

from __future__ import annotations

import pytest

from services.batch.quote import Answers, Counted, Option, TokenPrice, make_quote, most_gpus
from services.batch.sizing import Size, Work, gpus_cost_nanousd, minutes_of, offers, size, tokens_cost_nanousd

HOUR = 3600
WORK = Work(lines=1000, prompt_tokens=100_000, completion_tokens=90_000)  # 100,000 tokens' worth


@pytest.mark.parametrize(
    ("work", "rate", "start_s", "left_s", "most", "expected"),
    [
        # 1: nothing measured
        (WORK, None, 60.0, HOUR, 8, Size(1, None, None)),
        (WORK, 0.0, 60.0, HOUR, 8, Size(1, None, None)),
        # 2, 3: 100,000 / (100 x (0.9 x 3600 - 60)) = 0.31
        (WORK, 100.0, 60.0, HOUR, 8, Size(1, 1000.0, True)),
        # 100,000 / (10 x 3180) = 3.14
        (WORK, 10.0, 60.0, HOUR, 8, Size(4, 2500.0, True)),
        # exactly 2 GPUs are needed: no third for a rounding error
        (Work(9, 0, 2000), 1.0, 0.0, 1000 / 0.9, 8, Size(2, 1000.0, True)),
        (Work(9, 0, 2001), 1.0, 0.0, 1000 / 0.9, 8, Size(3, 667.0, True)),
        # never more than lines
        (Work(2, 0, 100_000), 10.0, 60.0, HOUR, 8, Size(2, 5000.0, False)),
        (Work(1, 0, 10), 10.0, 0.0, HOUR, 8, Size(1, 1.0, True)),
        # no lines at all (all are refused): one, done at once
        (Work(0, 0, 0), 10.0, 5.0, HOUR, 8, Size(1, 0.0, True)),
        # 4: more than there may be
        (WORK, 10.0, 60.0, HOUR, 2, Size(2, 5000.0, False)),
        # the spare tenth is not enough, the deadline itself is
        (WORK, 10.0, 60.0, HOUR, 3, Size(3, 100_000 / 30, True)),
        # no time but for the start
        (WORK, 1000.0, 60.0, 60.0, 4, Size(4, 25.0, False)),
        # most is one at least
        (WORK, 100.0, 60.0, HOUR, 0, Size(1, 1000.0, True)),
    ],
)
def test_size(
    work: Work, rate: float | None, start_s: float, left_s: float, most: int, expected: Size
) -> None:
    found = size(work, rate, start_s, left_s, most)
    assert (found.gpus, found.in_time) == (expected.gpus, expected.in_time)
    assert found.run_s == pytest.approx(expected.run_s) if expected.run_s is not None else found.run_s is None


def test_a_prompt_token_is_a_tenth_of_an_answer_s() -> None:
    assert Work(1, 100, 5).tokens == pytest.approx(15)


@pytest.mark.parametrize(
    ("most", "chosen", "shown"),
    [(1, 1, [1]), (8, 3, [1, 2, 3, 4, 8]), (6, 1, [1, 2, 4, 6]), (2, 2, [1, 2]), (0, 1, [1])],
)
def test_offers(most: int, chosen: int, shown: list[int]) -> None:
    assert offers(max(most, 1), chosen) == shown


@pytest.mark.parametrize(
    ("live_from", "live_s", "minutes"),
    [
        (0, 0.0, []),
        (0, 0.5, [1]),
        (0, 60.0, [1]),
        (0, 60.5, [2]),
        (HOUR - 30, 90.0, [1, 1]),
        (HOUR - 60, 60.0, [1]),
        (HOUR - 90, 2 * HOUR, [2, 60, 59]),
        (0, float(HOUR), [60]),
    ],
)
def test_minutes_are_those_of_each_hour(live_from: int, live_s: float, minutes: list[int]) -> None:
    assert minutes_of(live_from, live_s) == minutes


def test_costs_are_rounded_as_billing_rounds_them() -> None:
    # 100 nano-USD an hour: a minute is 1.67, rounded half up for each GPU and hour by itself
    assert gpus_cost_nanousd(100, 1, [1]) == 2
    assert gpus_cost_nanousd(100, 3, [1, 1]) == 12
    assert gpus_cost_nanousd(600_000_000, 2, [60, 1]) == 2 * (600_000_000 + 10_000_000)
    assert tokens_cost_nanousd(20, 60, Work(1, 1000, 10)) == 20_600


def option(**values: object) -> Option:
    known: dict[str, object] = {
        "option_id": "opt_1", "name": "cpu", "device_kind": "cpu", "max_batch": 16, "max_context_tokens": 2048,
        "hourly_rate_nanousd": 600_000_000, "tokens_per_s": 100.0, "pace_basis": "batches", "start_s": 20.0,
    }  # fmt: skip
    return Option(**(known | values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("free", "quota", "max_gpus", "most"),
    [
        (None, 64, None, 64),
        (3, 64, None, 3),
        (3, 2, None, 2),
        (3, 64, 1, 1),
        (0, 64, None, 1),
        (None, 0, None, 1),
    ],
)
def test_most_gpus(free: int | None, quota: int, max_gpus: int | None, most: int) -> None:
    assert most_gpus(option(free_gpus=free), quota, max_gpus) == most


COUNTED = Counted(
    lines=1010, refused_lines=10, prompt_tokens=100_000, completion_tokens=90_000, completion_tokens_at_most=1_000_000,
    answers=Answers(basis="mean", mean_tokens=90.0, requests=500),
)  # fmt: skip


def test_a_quote_says_what_each_number_of_gpus_takes_and_costs() -> None:
    price = TokenPrice(price_id="price_1", prompt_nanousd=20, completion_nanousd=60)
    quote = make_quote("acme/tiny", COUNTED, price, [option()], 4, None, 700, now_unix_s=0)
    assert quote.tokens is not None and quote.tokens.cost_nanousd == 100_000 * 20 + 90_000 * 60
    assert quote.tokens.cost_usd == "0.0074"
    (resource,) = quote.resources
    # 100,000 / (100 x (630 - 20)) = 1.64
    assert (resource.gpus, resource.in_time, resource.gpus_at_most, resource.start_basis) == (
        2,
        True,
        4,
        "measured",
    )
    assert [(o.gpus, o.finish_s, o.minutes, o.cost_nanousd) for o in resource.offers] == [
        (1, 1020, 17, 170_000_000),  # 1005 s live
        (2, 520, 18, 180_000_000),  # 505 s live, nine minutes each
        (4, 270, 20, 200_000_000),
    ]


def test_what_is_not_known_is_not_said() -> None:
    unknown = option(tokens_per_s=None, pace_basis="unknown", start_s=None)
    quote = make_quote("acme/tiny", COUNTED, None, [unknown], 4, None, 700, now_unix_s=0)
    assert quote.tokens is None
    (resource,) = quote.resources
    assert (resource.gpus, resource.in_time, resource.start_basis) == (1, None, "assumed")
    assert [(o.gpus, o.finish_s, o.cost_nanousd) for o in resource.offers] == [
        (1, None, None),
        (2, None, None),
        (4, None, None),
    ]
