"""What a report changes of a worker's rows, rule by rule."""

from __future__ import annotations

import msgspec
import pytest

from services.scheduler.worker_models import MOST_ROWS, ModelRow, update_rows
from shared.messages import ModelHistory, ResidentModel, WorkerReport

EMPTY = WorkerReport(
    worker_id="wrk_1", resource_id="res_1", place=0, incarnation="inc_1", phase="ready", sent_unix_ms=0
)


def report(*models: ResidentModel, history: tuple[ModelHistory, ...] = (), **more: object) -> WorkerReport:
    return msgspec.structs.replace(EMPTY, models=list(models), history=list(history), **more)


def resident(model_id: str, state: str = "ready", revision: int = 1, **more: object) -> ResidentModel:
    return msgspec.convert(
        {"model_id": model_id, "revision": revision, "state": state, **more}, ResidentModel
    )


def row(model_id: str, state: str = "absent", revision: int = 1, **more: object) -> ModelRow:
    return msgspec.convert({"model_id": model_id, "revision": revision, "state": state, **more}, ModelRow)


def table(*rows: ModelRow) -> dict[tuple[str, int], ModelRow]:
    return {(each.model_id, each.revision): each for each in rows}


COUNTS = {"loads": 3, "load_ms_p50": 10, "load_ms_p95": 20, "hits": 5, "misses": 2}


@pytest.mark.parametrize(
    ("before", "said", "written"),
    [
        pytest.param([], report(), [], id="nothing said, nothing written"),
        pytest.param(
            [],
            report(resident("a", weight_bytes=7)),
            [row("a", "ready", weight_bytes=7)],
            id="1: a new one is written",
        ),
        pytest.param([row("a", "ready")], report(resident("a")), [], id="the same again writes nothing"),
        pytest.param(
            [row("a", "loading", weight_bytes=9)],
            report(resident("a", "failed", reason="no\x00such file")),
            [row("a", "failed", reason="no such file", weight_bytes=9)],
            id="1: why it failed, in text that a table takes",
        ),
        pytest.param(
            [row("a", "failed", reason="no such file")],
            report(resident("a")),
            [row("a", "ready")],
            id="1: the reason goes with the failure",
        ),
        pytest.param(
            [row("a", "ready", weight_bytes=7, **COUNTS), row("b", "ready")],
            report(resident("b")),
            [row("a", "absent", weight_bytes=7, **COUNTS)],
            id="2: what is no longer listed is absent, its numbers stay",
        ),
        pytest.param(
            [row("a", "ready", revision=1)],
            report(resident("a", revision=2)),
            [row("a", "absent", revision=1), row("a", "ready", revision=2)],
            id="revisions are apart",
        ),
        pytest.param(
            [row("a", "ready", loads=1), row("b", "absent", **COUNTS)],
            report(resident("a"), history=(ModelHistory(model_id="a", revision=1, **COUNTS),)),
            [row("a", "ready", **COUNTS)],
            id="3: counts are the report's; a model without any keeps its own",
        ),
        pytest.param(
            [],
            report(history=(ModelHistory(model_id="a", revision=1, hits=1),)),
            [row("a", "absent", hits=1)],
            id="3: a history alone makes a row",
        ),
        pytest.param(
            [],
            report(resident("a"), pinned=[("a", 1), ("b", 1)], preload=[("c", 1)]),
            [row("a", "ready", pinned=True), row("b", pinned=True), row("c", preload=True)],
            id="4: what is wanted there has a row, here or not",
        ),
        pytest.param(
            [row("a", "ready", pinned=True, preload=True)],
            report(resident("a")),
            [row("a", "ready")],
            id="4: and is no longer wanted when it is no longer named",
        ),
    ],
)
def test_update_rows(before: list[ModelRow], said: WorkerReport, written: list[ModelRow]) -> None:
    changes = update_rows(table(*before), said)
    assert changes.written == written
    assert changes.removed == []
    assert changes.after == table(*before) | table(*written)


def test_absent_models_that_changed_longest_ago_are_forgotten() -> None:
    before = table(row("ready", "ready"), *(row(f"old{index}") for index in range(MOST_ROWS - 1)))
    changes = update_rows(before, report(resident("ready"), resident("new1"), resident("new2")))
    assert changes.removed == [("old0", 1), ("old1", 1)]
    assert len(changes.after) == MOST_ROWS
    assert [each.model_id for each in changes.written] == ["new1", "new2"]
    assert list(changes.after)[-2:] == [("new1", 1), ("new2", 1)]


def test_wanted_models_are_not_forgotten() -> None:
    before = table(row("pinned", pinned=True), row("asked", preload=True), row("old"))
    before |= table(*(row(f"m{index}") for index in range(MOST_ROWS - 3)))
    said = report(resident("new"), pinned=[("pinned", 1)], preload=[("asked", 1)])
    changes = update_rows(before, said)
    assert changes.removed == [("old", 1)]


def test_a_report_that_is_far_too_long_makes_no_more_rows_than_are_kept() -> None:
    history = tuple(ModelHistory(model_id=f"m{index}", revision=1, hits=1) for index in range(3 * MOST_ROWS))
    models = [resident(f"r{index}") for index in range(MOST_ROWS)]
    changes = update_rows({}, report(*models, history=history))
    assert len(changes.after) == MOST_ROWS == len(changes.written)
    assert {each.state for each in changes.written} == {"ready"}
