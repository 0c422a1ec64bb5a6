from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.statement import Line, LineKey, cell, lines_of, read_line_id, statement_csv

RESOURCE = "res_" + "a" * 32


def tokens(**fields: Any) -> dict[str, Any]:
    return {
        "model_type": "smollm2-135m", "work_class": "live", "price_id": "price_1", "prompt_nanousd": 20,
        "completion_nanousd": 60, "jobs": 3, "prompt_tokens": 30, "completion_tokens": 60, "first_nanousd": 4200,
        "corrected_jobs": 0, "corrected_prompt_tokens": 0, "corrected_completion_tokens": 0, "corrected_nanousd": 0,
        **fields,
    }  # fmt: skip


def minutes(**fields: Any) -> dict[str, Any]:
    return {
        "resource_id": RESOURCE, "name": "main", "hourly_rate_nanousd": 600_000_000, "minutes": 7,
        "amount_nanousd": 70_000_000, **fields,
    }  # fmt: skip


def test_a_month_without_anything_has_no_lines() -> None:
    assert lines_of([], [], []) == []


def test_lines_say_what_they_are_for_and_open_by_their_id() -> None:
    corrected = {"corrected_jobs": 1, "corrected_completion_tokens": -15, "corrected_nanousd": -900}
    lines = lines_of(
        [tokens(**corrected), tokens(work_class="batch", price_id="price_2")],
        [minutes(), minutes(name=None, hourly_rate_nanousd=1, amount_nanousd=0)],
        [
            {"kind": "correction", "postings": 1, "amount_nanousd": -5},
            {"kind": "credit", "postings": 2, "amount_nanousd": 1000},
            {"kind": "payment", "postings": 1, "amount_nanousd": 300},
        ],
    )
    assert [(line.kind, line.quantity, line.amount_nanousd) for line in lines] == [
        ("tokens", 3, 4200),
        ("token_corrections", 1, -900),
        ("tokens", 3, 4200),
        ("minutes", 7, 70_000_000),
        ("minutes", 7, 0),
        ("correction", 1, 5),
        ("credit", 2, -1000),
        ("payment", 1, -300),
    ]
    token = ("smollm2-135m", "live", "price_1")
    assert [read_line_id(line.line_id) for line in lines] == [
        LineKey("tokens", token),
        LineKey("token_corrections", token),
        LineKey("tokens", ("smollm2-135m", "batch", "price_2")),
        LineKey("minutes", resource_id=RESOURCE, rate_nanousd=600_000_000),
        LineKey("minutes", resource_id=RESOURCE, rate_nanousd=1),
        LineKey("correction"),
        LineKey("credit"),
        LineKey("payment"),
    ]
    assert lines[3].text == "main at 0.60 USD an hour" and RESOURCE in lines[4].text


@pytest.mark.parametrize(
    "text",
    ["", "total", "tokens", "tokens:live:x", "tokens:night:x:price_1", "tokens:live:X:price_1", "minutes:res_1:5",
     f"minutes:{RESOURCE}:-1", f"minutes:{RESOURCE}:{2**63}", f"minutes:{RESOURCE}:5:6", "credits", "credit\n"],
)  # fmt: skip
def test_what_can_be_no_line_is_none(text: str) -> None:
    assert read_line_id(text) is None


def read_back(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), strict=True))


def test_the_csv_has_a_header_the_lines_and_their_total() -> None:
    lines = lines_of(
        [tokens()], [minutes(name='the "big", one')], [{"kind": "credit", "postings": 1, "amount_nanousd": 5}]
    )
    text = statement_csv(lines)
    assert text.endswith("\r\n") and text.count("\r\n") == 5 and "\n" not in text.replace("\r\n", "")
    header, *records = read_back(text)
    assert header[-2:] == ["amount_usd", "amount_nanousd"]
    assert [record[-1] for record in records] == ["4200", "70000000", "-5", str(4200 + 70_000_000 - 5)]
    assert records[1][2] == 'the "big", one at 0.60 USD an hour'
    assert records[-1][:2] == ["total", "total"] and records[-1][-2] == "0.070004195"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"), ("+1", "'+1"), ("-1", "'-1"), ("@x", "'@x"), ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"), ("\n=1", "'\n=1"), ("a=1", "a=1"), ("", ""), ("'=1", "'=1"),
    ],
)  # fmt: skip
def test_no_text_is_a_formula(name: str, shown: str) -> None:
    assert cell(name) == shown


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.integers(-(10**15), 10**15)), max_size=5))
def test_whatever_things_are_called_the_csv_reads_back_and_holds_no_formula(
    things: list[tuple[str, int]],
) -> None:
    lines = [Line("credit", "credit", text, 1, "postings", amount) for text, amount in things]
    header, *records = read_back(statement_csv(lines))
    assert [len(record) for record in records] == [len(header)] * (len(things) + 1)
    for record, (text, amount) in zip(records, things, strict=False):
        assert record[2] in (text, f"'{text}") and int(record[-1]) == amount
        assert record[2][:1] not in ("=", "+", "-", "@", "\t", "\r", "\n") or record[2] == ""
