"""How the engine's measurement becomes rows: rates, ratios, and what an int8 row needs in order to count."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from loadtest.engine import EXIT_BELOW_FLOOR, ROWS, parse_arguments
from loadtest.engine_comparisons import (
    SHAPES,
    Field,
    list_gptj_comparisons,
    list_llamacpp_comparisons,
    list_smollm2_comparisons,
    make_ratio_row,
    rates_of,
    withhold_ratio,
)
from loadtest.engine_models import BenchModel
from loadtest.engine_quality import (
    Quality,
    count_common_beginning,
    cut_windows,
    list_quality_rows,
    perplexity_of,
)
from loadtest.engine_sides import Timing
from loadtest.engine_workloads import ALL_AT_ONCE, ONE_BY_ONE, Request
from loadtest.report import Row

MODEL = BenchModel(Path("model"), 100, (1, 2, 3))
FIELD = Field(2, SHAPES)
COMPARISONS = [
    *list_smollm2_comparisons(FIELD, MODEL),
    *list_llamacpp_comparisons(FIELD, MODEL, {"Q4_1": Path("a.gguf"), "Q8_0": Path("b.gguf")}),
    *list_gptj_comparisons(FIELD, MODEL),
]


def test_only_the_tokens_that_were_asked_for_count() -> None:
    requests = [Request((1, 2), 10), Request((1,), 30)]
    rates = rates_of(requests, Timing(4.0, 0.0, []))
    assert (rates.end_to_end, rates.decoding) == (10.0, None)
    # Alone, the first token of each is the prompt's.
    assert rates_of(requests, Timing(4.0, 1.9, [])).decoding == pytest.approx(20.0)


def test_a_ratio_is_the_median_of_the_pairs_ratios() -> None:
    row = make_ratio_row("x", [(10, 1), (20, 10), (30, 10)], 2, 4)
    assert (row.ours, row.theirs, row.ratio, row.floor, row.target) == (20, 10, 3, 2, 4)


@pytest.mark.parametrize(("perplexity_ratio", "counts"), [(0.99, True), (1.02, True), (1.021, False)])
def test_an_int8_row_counts_only_at_its_perplexity(perplexity_ratio: float, counts: bool) -> None:
    row = withhold_ratio(Row("speed", "tokens/s", 10, 5, 2.0, 1.5), perplexity_ratio)
    assert (row.ratio == 2.0 and row.name == "speed") is counts
    assert row.is_below_floor is not counts
    assert row.ours == 10


def test_the_bounds_are_those_agreed() -> None:
    assert {each.key: (each.floor, each.target) for each in COMPARISONS} == {
        "static-bf16": (1.5, 2.5),
        "one-by-one": (4, 6),
        "int8-fp32": (4, 6),
        "int8-bf16": (2, 3.5),
        "continuous": (3, 8),
        "stream": (2, 3.5),
        "stream-llamacpp": (0.8, 1.1),
        "ragged-llamacpp": (1.5, 2.5),
        "gptj": (2, 4),
    }
    assert {each.key for each in COMPARISONS} < set(ROWS)


def test_each_int8_row_is_bound_to_quality_and_both_sides_have_the_same_threads() -> None:
    for each in COMPARISONS:
        assert each.is_quality_bound is (each.ours.precision == "int8"), each.key
        assert {spec.threads for spec in each.specs} == {2}, each.key


def test_one_stream_is_asked_one_by_one_of_everybody() -> None:
    for each in COMPARISONS:
        if each.shape.is_one_by_one:
            assert {plan for opponent in each.opponents for plan in opponent.plans} == {ONE_BY_ONE}, each.key
    (ragged,) = (each for each in COMPARISONS if each.key == "ragged-llamacpp")
    assert [(opponent.plans, opponent.spec.parallel) for opponent in ragged.opponents] == [
        ((ALL_AT_ONCE,), 16)
    ] * 2


def test_perplexity_is_over_all_tokens_not_over_windows() -> None:
    assert perplexity_of([[math.log(0.5)] * 3, [math.log(0.125)]]) == pytest.approx(2 ** (6 / 4))


def test_windows_are_disjoint_and_whole() -> None:
    assert cut_windows(range(7), 3) == [[0, 1, 2], [3, 4, 5]]
    assert cut_windows(range(8), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("ours", "theirs", "common"), [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 5, 3], 1), ([1], [2], 0)]
)
def test_the_common_beginning_ends_at_the_first_difference(
    ours: list[int], theirs: list[int], common: int
) -> None:
    assert count_common_beginning(ours, theirs) == common


def test_quality_rows_say_who_is_compared_with_whom() -> None:
    answers = {
        "fp32": [[1] * 64],
        "bf16": [[1] * 32 + [2] * 32],
        "int8": [[2] * 64],
        "huggingface": [[1] * 64],
    }
    quality = Quality({"fp32": 10.0, "bf16": 10.1, "int8": 10.5}, 10.0, answers)
    rows = {row.name: row for row in list_quality_rows(quality)}
    assert rows["perplexity, int8 | fp32"].is_below_floor
    assert not rows["perplexity, fp32 | HF fp32"].is_below_floor
    assert rows["greedy tokens equal, fp32 | HF fp32"].ratio == 1
    assert rows["greedy tokens equal, bf16 | fp32"].ours == 32
    assert rows["greedy common beginning, bf16 | fp32"].ratio == 0.5
    assert rows["greedy tokens equal, int8 | fp32"].ours == 0


def test_arguments_are_checked() -> None:
    assert parse_arguments([]).rows == ROWS
    with pytest.raises(SystemExit) as refused:
        parse_arguments(["--rows", "faster"])
    assert refused.value.code not in (0, EXIT_BELOW_FLOOR)
    with pytest.raises(SystemExit):
        parse_arguments(["--pairs", "0"])
