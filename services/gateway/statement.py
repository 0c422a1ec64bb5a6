"""Pure: a month's statement as lines that sum to its total, their names in URLs, and the same as CSV.

Signs are a bill's: what is charged is positive, what the team got (credits, payments, corrections in its favour) is
negative. So `total` is what the month adds to what the team owes, and the ledger moved its balance by minus that.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from services.gateway.money import format_usd

Fields = Any
"""A row by the names of its columns: asyncpg's records are no mappings to a type checker."""
LineKind = Literal["tokens", "token_corrections", "minutes", "credit", "payment", "correction"]

_TOKENS = re.compile(r"(tokens|token_corrections):(live|batch):([a-z0-9][a-z0-9.-]{0,62}):([a-z0-9_]{1,64})")
_MINUTES = re.compile(r"minutes:(res_[0-9a-f]{32}):([0-9]{1,19})")
MONEY_IN: tuple[LineKind, ...] = ("credit", "payment", "correction")
CSV_COLUMNS = (
    "line_id", "kind", "text", "quantity", "unit", "prompt_tokens", "completion_tokens", "minutes", "amount_usd",
    "amount_nanousd",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """`quantity` counts what the line opens to: jobs, minutes, postings."""

    line_id: str
    kind: LineKind
    text: str
    quantity: int
    unit: str
    amount_nanousd: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    minutes: int | None = None


@dataclass(frozen=True, slots=True)
class LineKey:
    """What a line id says. tokens: (type, class, price); minutes: resource and rate; the rest: nothing more."""

    kind: LineKind
    token: tuple[str, str, str] | None = None
    resource_id: str = ""
    rate_nanousd: int = 0


def read_line_id(text: str) -> LineKey | None:
    """Return what the id names; None if it can be none of ours."""
    if match := _TOKENS.fullmatch(text):
        kind: LineKind = "tokens" if match[1] == "tokens" else "token_corrections"
        return LineKey(kind, (match[3], match[2], match[4]))
    if match := _MINUTES.fullmatch(text):
        rate = int(match[2])
        return LineKey("minutes", resource_id=match[1], rate_nanousd=rate) if rate < 2**63 else None
    return next((LineKey(kind) for kind in MONEY_IN if text == kind), None)


def lines_of(tokens: Iterable[Fields], minutes: Iterable[Fields], money_in: Iterable[Fields]) -> list[Line]:
    """Return the lines of a month.

    1. For each model type, class and price version: what its jobs were charged first: tokens times the price.
    2. For each of these that later facts corrected (a client that was gone, say): the differences, a line of their own.
    3. For each resource and hourly rate: minutes, and what they came to hour by hour.
    4. For credits, payments and their corrections: one line each, as what the team got, so with the other sign.
    """
    lines: list[Line] = []
    for row in tokens:
        name = f"{row['work_class']}:{row['model_type']}:{row['price_id']}"
        prices = f"{row['prompt_nanousd']} / {row['completion_nanousd']} nano-USD a token"
        what = f"{row['model_type']}, {row['work_class']}, prompt / completion at {prices}"
        lines.append(  # 1
            Line(
                f"tokens:{name}", "tokens", what, row["jobs"], "requests", row["first_nanousd"],
                prompt_tokens=row["prompt_tokens"], completion_tokens=row["completion_tokens"],
            )
        )  # fmt: skip
        if row["corrected_jobs"]:  # 2
            lines.append(
                Line(
                    f"token_corrections:{name}", "token_corrections", f"corrections to {what}", row["corrected_jobs"],
                    "requests", row["corrected_nanousd"], prompt_tokens=row["corrected_prompt_tokens"],
                    completion_tokens=row["corrected_completion_tokens"],
                )
            )  # fmt: skip
    for row in minutes:  # 3
        rate = format_usd(row["hourly_rate_nanousd"])
        lines.append(
            Line(
                f"minutes:{row['resource_id']}:{row['hourly_rate_nanousd']}", "minutes",
                f"{row['name'] or row['resource_id']} at {rate} USD an hour", row["minutes"], "minutes",
                row["amount_nanousd"], minutes=row["minutes"],
            )
        )  # fmt: skip
    words = {
        "credit": "credit granted",
        "payment": "payments",
        "correction": "corrections of credit and payments",
    }
    for row in money_in:  # 4
        kind = row["kind"]
        lines.append(Line(kind, kind, words[kind], row["postings"], "postings", -row["amount_nanousd"]))
    return lines


def statement_csv(lines: Sequence[Line]) -> str:
    """Return the statement as RFC 4180: a header, a record for each line, one for the total; CRLF at each end."""
    total = Line("total", "tokens", "total", len(lines), "lines", sum(line.amount_nanousd for line in lines))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(CSV_COLUMNS)
    for line in (*lines, total):
        kind = "total" if line is total else line.kind
        writer.writerow(
            (
                cell(line.line_id), kind, cell(line.text), line.quantity, line.unit, line.prompt_tokens,
                line.completion_tokens, line.minutes, format_usd(line.amount_nanousd), line.amount_nanousd,
            )
        )  # fmt: skip
    return text.getvalue()


def cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula: one that begins like it gets an apostrophe in front.

    Names in it are what people called their things. Numbers do not go through here: a minus begins them rightly.
    """
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else text
