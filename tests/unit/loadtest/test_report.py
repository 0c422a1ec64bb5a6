"""The report that all measuring scripts share."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from loadtest.report import Row, print_table, write_json


def test_json_rows_have_exactly_the_agreed_keys(tmp_path: Path) -> None:
    write_json([Row("path p50", "ms", 4.2, ratio=1.43, floor=1)], tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {
            "name": "path p50",
            "unit": "ms",
            "ours": 4.2,
            "theirs": None,
            "ratio": 1.43,
            "floor": 1,
            "target": None,
        }
    ]


@pytest.mark.parametrize(
    ("ratio", "floor", "below"), [(0.9, 1, True), (1, 1, False), (None, 1, True), (0, None, False)]
)
def test_a_row_below_its_floor_is_marked(ratio: float | None, floor: float | None, below: bool) -> None:
    table = io.StringIO()
    print_table([Row("x", "s", 1.5, ratio=ratio, floor=floor)], table)
    assert ("BELOW FLOOR" in table.getvalue()) is below


def test_the_table_shows_every_value_and_a_dash_for_none() -> None:
    table = io.StringIO()
    print_table([Row("rate", "tokens/s", 40123.0, theirs=None, ratio=1.25)], table)
    heading, line = table.getvalue().splitlines()
    assert heading.split() == ["name", "unit", "ours", "theirs", "ratio", "floor", "target"]
    assert line.split() == ["rate", "tokens/s", "40,123", "-", "1.25", "-", "-"]
