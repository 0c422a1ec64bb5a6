"""Pure: reads a platform's price list (TOML), and says everything that is wrong with it at once, with line numbers.

Amounts are decimal strings of USD. TOML's own numbers are refused, for 0.1 is not a tenth there.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from services.billing.instants import to_unix_ms
from shared.usd import parse_usd, parse_usd_per_million

MAX_BYTES = 1024 * 1024
MAX_ENTRIES = 2000

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_TABLE = re.compile(r"\s*\[\[\s*(\w+)\s*\]\]")
TOKEN_FIELDS = ("model_type", "work_class", "prompt_usd_per_million", "completion_usd_per_million")
RATE_FIELDS = ("model_type", "option", "hourly_rate_usd")


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """What tokens of a type cost: from a moment on, or (None) from now on."""

    line: int
    model_type: str
    work_class: str
    prompt_nanousd: int
    completion_nanousd: int
    starts_unix_ms: int | None


@dataclass(frozen=True, slots=True)
class HourlyRate:
    """What an hour on a performance option costs: from a moment on, or (None) from now on."""

    line: int
    model_type: str
    option: str
    hourly_rate_nanousd: int
    starts_unix_ms: int | None


@dataclass(frozen=True, slots=True)
class PriceList:
    tokens: tuple[TokenPrice, ...] = ()
    rates: tuple[HourlyRate, ...] = ()


class BadPriceList(ValueError):
    """The list cannot be used; `problems` are all reasons that were found, each with its line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def read_price_list(content: bytes) -> PriceList:
    """Return the list. Raises `BadPriceList` with every problem.

    1. Too large, no UTF-8 or no TOML -> that alone.
    2. A currency that is not USD, or a part that is unknown.
    3. For each entry: fields that are missing or unknown, and values of another kind or out of range.
    4. Two entries for the same thing and moment: they contradict each other, or one is too many.
    """
    document = _document(content)  # 1
    lines = _lines_of_tables(content.decode())
    problems: list[str] = []
    if document.get("currency") != "USD":  # 2
        problems.append('line 1: currency must be "USD": all amounts are')
    problems += [
        f"line 1: there is no part '{name}'"
        for name in sorted(set(document) - {"currency", "tokens", "rates"})
    ]
    tokens: list[TokenPrice] = []
    rates: list[HourlyRate] = []
    for part, fields in (("tokens", TOKEN_FIELDS), ("rates", RATE_FIELDS)):
        entries = document.get(part, [])
        if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
            problems.append(f"line 1: {part} must be tables [[{part}]], at most {MAX_ENTRIES}")
            continue
        for number, entry in enumerate(entries):
            line = lines[part][number] if number < len(lines[part]) else 1
            reader = _Entry(line, f"{part}[{number}]", entry, fields)
            if part == "tokens":
                tokens.append(reader.token_price())
            else:
                rates.append(reader.hourly_rate())
            problems += reader.problems  # 3
    problems += _repeats(
        [(t.line, ("tokens", t.model_type, t.work_class, t.starts_unix_ms)) for t in tokens]
    )  # 4
    problems += _repeats([(r.line, ("rates", r.model_type, r.option, r.starts_unix_ms)) for r in rates])
    if problems:
        raise BadPriceList(problems)
    return PriceList(tuple(tokens), tuple(rates))


def _document(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_BYTES:
        raise BadPriceList([f"line 1: the file is over {MAX_BYTES} bytes"])
    try:
        return tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BadPriceList([f"line {line}: not UTF-8"]) from error
    except tomllib.TOMLDecodeError as error:
        raise BadPriceList([f"not TOML: {error}"]) from error


def _lines_of_tables(text: str) -> dict[str, list[int]]:
    """The line numbers of `[[tokens]]` and `[[rates]]`, in order: the parser does not tell them."""
    lines: dict[str, list[int]] = {"tokens": [], "rates": []}
    for number, line in enumerate(text.splitlines(), start=1):
        found = _TABLE.match(line)
        if found and found[1] in lines:
            lines[found[1]].append(number)
    return lines


class _Entry:
    """Reads one table; what is wrong becomes a problem, and a value that is never used."""

    def __init__(self, line: int, place: str, entry: Any, fields: tuple[str, ...]) -> None:
        self.problems: list[str] = []
        self._line = line
        self._place = place
        self._values: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
        for name in fields:
            if name not in self._values:
                self._problem(name, "is missing")
        for name in sorted(set(self._values) - {*fields, "starts_at"}):
            self._problem(name, "is not a field of this table")

    def _problem(self, name: str, what: str) -> None:
        self.problems.append(f"line {self._line}: {self._place}.{name} {what}")

    def token_price(self) -> TokenPrice:
        work_class = self._text("work_class")
        if "work_class" in self._values and work_class not in ("live", "batch"):
            self._problem("work_class", 'must be "live" or "batch"')
        return TokenPrice(
            self._line,
            self._name("model_type"),
            work_class,
            self._amount("prompt_usd_per_million"),
            self._amount("completion_usd_per_million"),
            self._start(),
        )

    def hourly_rate(self) -> HourlyRate:
        return HourlyRate(
            self._line,
            self._name("model_type"),
            self._name("option"),
            self._amount("hourly_rate_usd"),
            self._start(),
        )

    def _text(self, name: str) -> str:
        value = self._values.get(name, "")
        return value if isinstance(value, str) else ""

    def _name(self, name: str) -> str:
        value = self._text(name)
        if name in self._values and not _NAME.fullmatch(value):
            self._problem(name, "must be a name: lower-case letters, digits, dots and hyphens")
        return value

    def _amount(self, name: str) -> int:
        if name not in self._values:
            return 0
        text = self._values[name]
        if not isinstance(text, str):
            self._problem(name, 'must be a decimal in quotes, such as "0.60"')
            return 0
        per_token = name.endswith("_per_million")
        amount = parse_usd_per_million(text) if per_token else parse_usd(text)
        if amount is None:
            places = "three" if per_token else "nine"
            self._problem(name, f"must be USD from 0 to 1000000 with at most {places} places")
        return amount or 0

    def _start(self) -> int | None:
        if "starts_at" not in self._values:
            return None
        value = self._values["starts_at"]
        if not isinstance(value, datetime) or value.tzinfo is None:
            kind = (
                "a date without a time"
                if isinstance(value, date) and not isinstance(value, datetime)
                else "this"
            )
            self._problem(
                "starts_at", f"must be a time with its offset, such as 2027-01-01T00:00:00Z, not {kind}"
            )
            return None
        if not 2000 <= value.year <= 2999:
            self._problem("starts_at", "must lie between the years 2000 and 2999")
            return None
        return to_unix_ms(value)


def _repeats(entries: list[tuple[int, tuple[Any, ...]]]) -> list[str]:
    first: dict[tuple[Any, ...], int] = {}
    problems = []
    for line, key in entries:
        if key in first:
            problems.append(f"line {line}: says again what line {first[key]} is about, for the same moment")
        else:
            first[key] = line
    return problems
