"""When a batch's own resource is made, held on, and let go; when it gets more GPUs: tables of the rules."""

from __future__ import annotations

import pytest

from services.batch.own_rules import Seen, choose_option, more_gpus, next_act, refusal_of_size
from services.batch.quote import Answers, Counted, Option, OptionQuote

OVER = ("failed", "finalizing", "completed", "expired", "cancelling", "cancelled")


def seen(wanted: str, state: str, on_for_s: float | None = None) -> Seen:
    return Seen("res_1", wanted, state, on_for_s)


@pytest.mark.parametrize(
    ("state", "stopped", "found", "made", "held_for_s", "act"),
    [
        # 1
        ("validating", False, None, False, 500.0, "wait"),
        ("validating", False, seen("off", "off"), True, 500.0, "wait"),
        # 2
        ("in_progress", False, seen("off", "off"), True, 1.0, "turn_on"),
        ("in_progress", False, seen("off", "draining"), True, 1.0, "turn_on"),
        ("in_progress", False, seen("on", "starting", 600.0), True, 1.0, "wait"),
        ("in_progress", False, seen("on", "live", 301.0), True, 1.0, "wait"),
        ("in_progress", False, seen("on", "live", 299.0), True, 1.0, "turn_on"),
        ("in_progress", False, seen("on", "live", -5.0), True, 1.0, "turn_on"),
        ("in_progress", False, seen("on", "failed", 599.0), True, 1.0, "wait"),
        # somebody turned it on without an end: held on again, so that it has one
        ("in_progress", False, seen("on", "live", None), True, 1.0, "turn_on"),
        ("in_progress", True, seen("on", "live", 600.0), True, 1.0, "turn_off"),
        ("in_progress", True, seen("off", "draining"), True, 1.0, "wait"),
        ("in_progress", True, seen("off", "off"), True, 1.0, "wait"),
        # 4: somebody deleted it; the batch waits, and ends as it would without GPUs
        ("in_progress", False, None, True, 500.0, "wait"),
        # 3
        *[(state, False, seen("on", "live", 600.0), True, 1.0, "turn_off") for state in OVER],
        *[(state, False, seen("off", "draining"), True, 1.0, "wait") for state in OVER],
        *[(state, True, seen("off", "off"), True, 1.0, "delete") for state in OVER],
        # 4
        *[(state, False, None, True, 1.0, "forget") for state in OVER],
        *[(state, False, None, False, 59.0, "wait") for state in OVER],
        *[(state, False, None, False, 61.0, "forget") for state in OVER],
    ],
)
def test_next_act(
    state: str, stopped: bool, found: Seen | None, made: bool, held_for_s: float, act: str
) -> None:
    assert next_act(state, stopped, found, made, held_for_s) == act


@pytest.mark.parametrize(
    ("gpus", "live", "lines_left", "lines_per_s", "left_s", "start_s", "most", "wanted"),
    [
        (2, 1, 1000, 1.0, 100.0, 0.0, 8, 2),  # 1
        (2, 2, 1000, 0.0, 100.0, 0.0, 8, 2),
        (2, 2, 0, 1.0, 100.0, 0.0, 8, 2),
        (2, 2, 90, 1.0, 100.0, 0.0, 8, 2),  # 2
        (2, 2, 91, 1.0, 100.0, 0.0, 8, 3),  # 3
        (1, 1, 400, 1.0, 110.0, 9.0, 8, 5),  # (400 - 9) / (99 - 9) = 4.3
        (1, 1, 400, 1.0, 110.0, 9.0, 3, 3),
        (4, 4, 400, 1.0, 10.0, 9.0, 3, 4),  # never fewer than it has
        (1, 1, 2, 0.001, 10.0, 0.0, 8, 2),  # never more than lines
        (1, 1, 100, 1.0, -50.0, 10.0, 8, 8),
    ],
)
def test_more_gpus(
    gpus: int,
    live: int,
    lines_left: int,
    lines_per_s: float,
    left_s: float,
    start_s: float,
    most: int,
    wanted: int,
) -> None:
    assert more_gpus(gpus, live, lines_left, lines_per_s, left_s, start_s, most) == wanted


COUNTED = Counted(
    lines=100, refused_lines=0, prompt_tokens=0, completion_tokens=10_000, completion_tokens_at_most=10_000,
    answers=Answers(basis="limit"),
)  # fmt: skip


def option(name: str, rate: int, pace: float | None) -> Option:
    return Option(
        option_id=f"opt_{name}", name=name, device_kind="cpu", max_batch=8, max_context_tokens=64,
        hourly_rate_nanousd=rate, tokens_per_s=pace, start_s=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "left_s", "chosen"),
    [
        # in time: the cheapest
        ([option("slow", 60, 10.0), option("fast", 600, 50.0)], 3600, "slow"),
        ([option("slow", 60, 10.0), option("fast", 240, 50.0)], 3600, "fast"),
        # only one is in time
        ([option("slow", 60, 0.1), option("fast", 60_000, 50.0)], 600, "fast"),
        # nobody knows: the cheaper hour; but what is in time goes first
        ([option("a", 90, None), option("b", 60, None)], 3600, "b"),
        ([option("a", 1, None), option("b", 600, 50.0)], 3600, "b"),
        ([option("a", 900, None), option("b", 60, 0.001)], 3600, "a"),
        # none is in time: the one that is over first
        ([option("a", 1, 0.001), option("b", 600, 0.002)], 3600, "b"),
    ],
)
def test_choose_option(options: list[Option], left_s: float, chosen: str) -> None:
    assert choose_option(COUNTED, options, 4, None, left_s, 0)[0].name == chosen
    assert choose_option(COUNTED, options[::-1], 4, None, left_s, 0)[0].name == chosen


def quoted(pace: float | None, deadline_s: float = 3600) -> OptionQuote:
    return choose_option(COUNTED, [option("a", 60_000, pace)], 4, None, deadline_s, 0)[1]


@pytest.mark.parametrize(
    ("quote", "spendable", "budget_spent", "quota", "code"),
    [
        (quoted(10.0), None, False, 4, None),
        (quoted(None), None, False, 4, None),
        (quoted(10.0), None, False, 0, "over_quota"),
        (quoted(10.0), None, True, 4, "budget_exceeded"),
        (quoted(10.0), 0, False, 4, "insufficient_credit"),
        # 1000 s and the release: 17 minutes of 1000 nano-USD
        (quoted(10.0), 17_000, False, 4, "insufficient_credit"),
        (quoted(10.0), 17_001, False, 4, None),
        (quoted(None), 0, False, 4, "insufficient_credit"),
        (quoted(None), 1, False, 4, None),
        (quoted(0.1), None, False, 4, "deadline_unreachable"),
    ],
)
def test_refusal_of_size(
    quote: OptionQuote, spendable: int | None, budget_spent: bool, quota: int, code: str | None
) -> None:
    found = refusal_of_size(quote, spendable, budget_spent, quota)
    assert (None if found is None else found.code) == code
