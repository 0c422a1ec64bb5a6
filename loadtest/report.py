"""How every script of `loadtest` reports: a table for people, and with `--json FILE` the same rows for machines."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number. `ratio` is such that more is better; `floor` and `target` are bounds of the ratio."""

    name: str
    unit: str
    ours: float | None
    theirs: float | None = None
    ratio: float | None = None
    floor: float | None = None
    target: float | None = None

    @property
    def is_below_floor(self) -> bool:
        return self.floor is not None and (self.ratio is None or self.ratio < self.floor)


_HEADINGS = tuple(field.name for field in dataclasses.fields(Row))


def print_table(rows: Sequence[Row], file: TextIO | None = None) -> None:
    """Print the rows with aligned columns; what has no value is a dash, and a row below its floor is marked."""
    cells = [_HEADINGS, *(tuple(_cell(getattr(row, name)) for name in _HEADINGS) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    for number, line in enumerate(cells):
        texts = (
            cell.ljust(w) if column < 2 else cell.rjust(w)
            for column, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        mark = "  BELOW FLOOR" if number and rows[number - 1].is_below_floor else ""
        print("  ".join(texts).rstrip() + mark, file=file or sys.stdout)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a JSON list of objects; an existing file is replaced."""
    path.write_text(
        json.dumps([dataclasses.asdict(row) for row in rows], indent=2, allow_nan=False) + "\n",
        encoding="utf-8",
    )


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or value.is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
