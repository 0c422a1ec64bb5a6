"""Swaps, hits and misses as a worker reports them: right, and bounded whatever it is asked for."""

from __future__ import annotations

import pytest

from services.worker.model_history import KEPT_LOADS, MOST_MODELS, MOST_REPORTED, ModelHistories, percentile
from shared.messages import ModelHistory, encode
from tests.contract.examples import EXAMPLES

A, B = ("mod_a", 1), ("mod_b", 2)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([], 0.5, 0),
        ([7], 0.5, 7),
        ([7], 0.95, 7),
        ([3, 1, 2], 0.5, 2),
        ([1, 2, 3, 4], 0.5, 2),
        (list(range(1, 21)), 0.95, 19),
        ([1] * 19 + [100], 0.95, 1),
        ([1] * 18 + [100] * 2, 0.95, 100),
    ],
)
def test_percentile(values: list[int], share: float, expected: int) -> None:
    assert percentile(values, share) == expected


def test_loads_hits_and_misses_are_counted_for_each_revision() -> None:
    histories = ModelHistories()
    histories.note_load(A, 0.1)
    histories.note_claim(A, hit=False)
    for _ in range(3):
        histories.note_claim(A, hit=True)
    for load_s in (0.2, 0.4, 1.2345):
        histories.note_load(B, load_s)
    assert histories.report() == [
        ModelHistory(model_id="mod_b", revision=2, loads=3, load_ms_p50=400, load_ms_p95=1234),
        ModelHistory(
            model_id="mod_a", revision=1, loads=1, load_ms_p50=100, load_ms_p95=100, hits=3, misses=1
        ),
    ]


def test_percentiles_are_of_the_latest_loads_and_the_count_is_of_all() -> None:
    histories = ModelHistories()
    for load_s in [9.0] * 100 + [0.5] * KEPT_LOADS:
        histories.note_load(A, load_s)
    (history,) = histories.report()
    assert (history.loads, history.load_ms_p50, history.load_ms_p95) == (100 + KEPT_LOADS, 500, 500)


def test_hundreds_of_models_are_bounded_and_those_that_changed_last_are_told() -> None:
    histories = ModelHistories()
    for index in range(MOST_MODELS + 50):
        histories.note_load((f"mod_{index}", 1), 0.1)
    told = [history.model_id for history in histories.report()]
    assert told == [f"mod_{MOST_MODELS + 49 - index}" for index in range(MOST_REPORTED)]
    histories.note_claim(("mod_60", 1), hit=True)
    first = histories.report()[0]
    assert (first.model_id, first.loads, first.hits) == ("mod_60", 1, 1)
    histories.note_claim(("mod_0", 1), hit=True)
    assert histories.report()[0].loads == 0, "one that was forgotten begins anew"


def test_a_full_report_stays_small() -> None:
    (report,) = [each for each in EXAMPLES if type(each).__name__ == "WorkerReport"]
    model, history = report.models[0], report.history[0]  # type: ignore[attr-defined]
    from msgspec.structs import replace

    full = replace(report, models=[model] * 256, history=[history] * MOST_REPORTED)
    assert len(encode(full)) < 64 * 1024
