"""Traces, goodput, and when a side has shown its best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from loadtest.hotswap_climb import Climb, climb
from loadtest.hotswap_traffic import (
    ANSWER_TOKENS,
    PATIENCE_S,
    PROMPT_TOKENS,
    Arrival,
    best_rate,
    goodput,
    is_past_its_best,
    make_trace,
)


def test_a_trace_is_the_same_each_time_and_another_for_another_seed_or_rate() -> None:
    trace = make_trace(5.0, 20.0, 20, 1000, seed=1)
    assert trace == make_trace(5.0, 20.0, 20, 1000, seed=1)
    assert trace != make_trace(5.0, 20.0, 20, 1000, seed=2)
    assert trace[:5] != make_trace(6.0, 20.0, 20, 1000, seed=1)[:5]


def test_arrivals_come_at_the_rate_and_ask_models_by_zipfs_law() -> None:
    trace = make_trace(50.0, 200.0, 20, 1000, seed=1)
    assert len(trace) / 200 == pytest.approx(50, rel=0.05)
    assert [arrival.at_s for arrival in trace] == sorted(arrival.at_s for arrival in trace)
    assert 0 <= trace[0].at_s and trace[-1].at_s < 200
    asked = Counter(arrival.model for arrival in trace)
    assert set(asked) == set(range(20))
    assert asked[0] / asked[1] == pytest.approx(2**1.1, rel=0.1)
    assert asked[0] / asked[9] == pytest.approx(10**1.1, rel=0.25)
    for arrival in trace:
        assert PROMPT_TOKENS[0] <= len(arrival.prompt) <= PROMPT_TOKENS[1]
        assert ANSWER_TOKENS[0] <= arrival.answer_tokens <= ANSWER_TOKENS[1]


def test_what_came_late_or_never_is_no_good() -> None:
    assert goodput([0.1, PATIENCE_S, PATIENCE_S + 0.01, None], 2.0) == 1.0


@pytest.mark.parametrize(
    ("curve", "past"),
    [
        ({}, False),
        ({1: 1.0, 2: 0.5}, False),
        ({1: 1.0, 2: 0.5, 4: 0.4}, True),
        ({4: 0.4, 1: 1.0, 2: 0.5}, True),
        ({1: 1.0, 2: 0.5, 4: 1.1}, False),
        ({1: 0.5, 2: 1.0, 4: 0.9}, False),
        ({1: 0.5, 2: 1.0, 4: 0.9, 8: 0.95}, True),
    ],
)
def test_a_side_climbs_until_two_rates_in_turn_were_below_its_best(
    curve: dict[float, float], past: bool
) -> None:
    assert is_past_its_best(curve) is past


async def test_each_side_gets_the_same_arrivals_and_is_measured_again_at_its_own_best() -> None:
    seen: dict[str, list[list[Arrival]]] = {"fast": [], "slow": []}

    async def serve(name: str, most: int, trace: Sequence[Arrival]) -> list[float | None]:
        """So many in time; under more than twice that, none."""
        seen[name].append(list(trace))
        in_time = most if len(trace) <= 2 * most else 0
        return [1.0 if index < in_time else None for index in range(len(trace))]

    found = await climb(
        {"fast": lambda trace: serve("fast", 100, trace), "slow": lambda trace: serve("slow", 10, trace)},
        {"fast": (4.0, 8.0, 16.0, 32.0), "slow": (1.0, 2.0, 4.0, 8.0, 16.0)},
        trace_s=10.0,
        repeats=3,
        models=5,
        vocab_size=100,
        say=lambda line: None,
    )
    assert sorted(found["fast"].curve) == [4.0, 8.0, 16.0, 32.0]
    assert 16.0 not in found["slow"].curve, "it fell twice"
    shared = [trace for trace in seen["fast"] if trace in seen["slow"]]
    assert len(shared) >= 1
    assert best_rate(found["fast"].curve) in (8.0, 16.0)
    assert best_rate(found["slow"].curve) <= 2.0
    assert len(found["fast"].at_best) == len(found["slow"].at_best) == 3
    assert isinstance(found["fast"], Climb) and min(found["fast"].at_best) > max(found["slow"].at_best)
