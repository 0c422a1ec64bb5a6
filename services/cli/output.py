"""What commands print: tables for people, JSON for programs. Text from elsewhere cannot steer the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Json = Annotated[bool, typer.Option("--json", help="Print the API's JSON instead of a table.")]
"""The parameter that every command has."""
UNBROKEN = 10_000
"""The width of a table that a program reads: no line is folded."""


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """One line for each row; numbers stand to the right. Without a terminal nothing is cut off or coloured."""
    lines = [list(row) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        values = [line[index] for line in lines if line[index] is not None]
        numbers = bool(values) and all(isinstance(value, int) for value in values)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold", no_wrap=not numbers)
    for line in lines:
        table.add_row(*(Text(_shown(value)) for value in line))
    console = Console()
    if not console.is_terminal:
        console = Console(width=UNBROKEN)
    console.print(table)


def print_fields(fields: Iterable[tuple[str, Any]]) -> None:
    """One thing, a line for each of its fields."""
    shown = [(name, _shown(value)) for name, value in fields]
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        sys.stdout.write(f"{name:<{width}}  {value}\n")


def print_error(message: str) -> None:
    sys.stderr.write(f"roundhouse: {plain(message)}\n")


def plain(text: str) -> str:
    """The text without control characters but line ends and tabs: an escape sequence could rewrite the screen."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 0x20 and not 0x7F <= ord(c) <= 0x9F))


def usd(nanousd: int) -> str:
    """A decimal string, at least two places and no more than are needed."""
    whole, rest = divmod(abs(nanousd), 10**9)
    places = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nanousd < 0 else ''}{whole}.{places}"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return plain(str(value)).replace("\n", " ")
