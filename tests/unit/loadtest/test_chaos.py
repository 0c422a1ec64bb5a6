"""What a round of chaos comes to in the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.audit_checks import Result
from loadtest.chaos import Round, rows_of
from loadtest.report import write_json


def make_round(slowest_end_s: float = 4.0, recovered_s: float = 2.0, wrong_texts: int = 0) -> Round:
    return Round("worker", 48, 1, 1, slowest_end_s, recovered_s, wrong_texts)


@pytest.mark.parametrize(
    ("seen", "below"),
    [
        (make_round(), []),
        (make_round(slowest_end_s=20.0, recovered_s=20.0), []),
        (make_round(slowest_end_s=-0.4), []),
        (make_round(slowest_end_s=0.0), []),
        (make_round(slowest_end_s=20.1), ["last end"]),
        (make_round(recovered_s=20.1), ["new request"]),
        (make_round(recovered_s=float("inf")), ["new request"]),
        (make_round(wrong_texts=1), ["wrong texts"]),
    ],
)
def test_a_row_is_below_its_floor_when_its_limit_is_passed(
    seen: Round, below: list[str], tmp_path: Path
) -> None:
    rows = rows_of([seen], [])
    assert [row.name.rpartition("; ")[2].rpartition(": ")[2] for row in rows if row.is_below_floor] == below
    write_json(rows, tmp_path / "rows.json")  # refuses what is not JSON, such as infinity


def test_a_finding_of_the_audit_is_below_its_floor() -> None:
    rows = rows_of([], [Result("ledger balances", 3, []), Result("errors cost nothing", 2, ["x"])])
    assert [(row.name, row.is_below_floor) for row in rows] == [
        ("audit: ledger balances", False),
        ("audit: errors cost nothing", True),
    ]
