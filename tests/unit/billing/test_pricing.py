"""Which price counts, what it comes to, and that no float gets near it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing import intake, settle
from services.billing.intake import charge_due
from services.billing.ledger import PostedCharges
from services.billing.pricing import (
    LEAD_MS,
    MAX_TOKEN_PRICE_NANOUSD,
    Price,
    minutes_amount_nanousd,
    price_in_force,
    price_refusal,
    tokens_amount_nanousd,
)
from shared.messages import JobUsage
from tests.unit.billing.builders import ACCEPTED_UNIX_MS, make_set_price, make_usage, make_void

ROOT = Path(__file__).resolve().parents[3]


def make_price(price_id: str = "price_1", starts_unix_ms: int = 0, work_class: str = "live") -> Price:
    return Price(
        price_id=price_id,
        model_type="smollm2-135m",
        work_class=work_class,
        prompt_nanousd=20,
        completion_nanousd=60,
        starts_unix_ms=starts_unix_ms,
    )


@pytest.mark.parametrize(
    ("accepted_unix_ms", "expected"), [(99, None), (100, "a"), (199, "a"), (200, "b"), (10**12, "b")]
)
def test_the_version_in_force_at_acceptance_counts(accepted_unix_ms: int, expected: str | None) -> None:
    prices = [make_price("b", 200), make_price("a", 100), make_price("batch", 150, "batch")]
    price = price_in_force(prices, "smollm2-135m", "live", accepted_unix_ms)
    assert (price.price_id if price else None) == expected


def test_no_price_of_another_type_or_class_counts() -> None:
    assert price_in_force([make_price()], "gpt-j-6b", "live", 10) is None
    assert price_in_force([make_price()], "smollm2-135m", "batch", 10) is None


def test_tokens_cost_their_prices() -> None:
    assert tokens_amount_nanousd(make_price(), 10, 20) == 10 * 20 + 20 * 60


def test_the_largest_charge_fits_the_database() -> None:
    price = Price("p", "t", "live", MAX_TOKEN_PRICE_NANOUSD, MAX_TOKEN_PRICE_NANOUSD, 0)
    assert tokens_amount_nanousd(price, settle.MAX_TOKENS, settle.MAX_TOKENS) < 2**63


@pytest.mark.parametrize(
    ("rate", "minutes_", "amount"),
    [
        (0, 60, 0),
        (60, 1, 1),
        (100, 1, 2),
        (90, 1, 2),
        (89, 1, 1),
        (1, 29, 0),
        (1, 30, 1),
        (2_000_000_000, 60, 2 * 10**9),
    ],
)
def test_minutes_are_prorated_and_rounded_half_up(rate: int, minutes_: int, amount: int) -> None:
    assert minutes_amount_nanousd(rate, minutes_) == amount


@given(st.integers(0, 10**15))
def test_a_full_hour_costs_exactly_the_hourly_rate(rate: int) -> None:
    assert minutes_amount_nanousd(rate, 60) == rate


# ---- what is posted for a job


def test_the_first_charge_has_the_jobs_own_key() -> None:
    charge = charge_due("job_1", settle.settle([make_usage()]), make_price(), None, "ab" * 16)
    assert charge is not None
    assert (charge.unique_key, charge.kind, charge.amount_nanousd) == ("tokens:job_1", "tokens", 1400)
    assert charge.trace_id == "ab" * 16


def test_a_correction_posts_the_difference_under_a_numbered_key() -> None:
    settlement = settle.settle([make_usage(), make_void()])
    charge = charge_due("job_1", settlement, make_price(), PostedCharges(1400, 1), None)
    assert charge is not None
    assert (charge.unique_key, charge.kind, charge.amount_nanousd) == (
        "tokens:job_1:1",
        "correction",
        500 - 1400,
    )


def test_nothing_is_posted_when_the_ledger_is_right() -> None:
    assert (
        charge_due("job_1", settle.settle([make_usage()]), make_price(), PostedCharges(1400, 3), None) is None
    )


@pytest.mark.parametrize(
    "fact", [make_usage(billing="resource"), make_usage(outcome="failed"), make_void(reason="deadline")]
)
def test_what_is_free_is_not_posted(fact: JobUsage) -> None:
    assert charge_due("job_1", settle.settle([fact]), make_price(), None, None) is None


def test_without_a_price_nothing_is_posted_and_the_row_says_so() -> None:
    settlement = settle.settle([make_usage()])
    assert charge_due("job_1", settlement, None, None, None) is None
    row = intake.request_row("job_1", settlement, None)
    assert (row.charged_nanousd, row.price_id, row.completion_tokens) == (0, None, 20)


def test_the_row_of_a_dedicated_job_names_no_price() -> None:
    row = intake.request_row("job_1", settle.settle([make_usage(billing="resource")]), make_price())
    assert (row.charged_nanousd, row.price_id, row.billing_mode) == (0, None, "resource")


# ---- setting prices

NOW_UNIX_MS = ACCEPTED_UNIX_MS


@pytest.mark.parametrize(
    ("fields", "versions", "code"),
    [
        ({}, [], None),
        ({"starts_unix_ms": NOW_UNIX_MS + LEAD_MS}, [make_price(starts_unix_ms=5)], None),
        (
            {"starts_unix_ms": NOW_UNIX_MS + LEAD_MS - 1},
            [make_price(starts_unix_ms=5)],
            "price_starts_in_past",
        ),
        ({"starts_unix_ms": NOW_UNIX_MS - 1}, [make_price(starts_unix_ms=5)], "price_starts_in_past"),
        ({"starts_unix_ms": 5}, [make_price(starts_unix_ms=5)], "price_overlaps"),
        ({"prompt_nanousd": -1}, [], "invalid_price"),
        ({"completion_nanousd": -1}, [], "invalid_price"),
        ({"completion_nanousd": MAX_TOKEN_PRICE_NANOUSD + 1}, [], "invalid_price"),
        ({"starts_unix_ms": -1}, [], "invalid_price"),
        ({"starts_unix_ms": 10**15}, [], "invalid_price"),
        ({"model_type": ""}, [], "invalid_price"),
        ({"model_type": "x\x00"}, [], "invalid_price"),
    ],
)
def test_a_price_is_refused_for_a_reason(
    fields: dict[str, Any], versions: list[Price], code: str | None
) -> None:
    refusal = price_refusal(make_set_price(**fields), versions, NOW_UNIX_MS)
    assert (refusal[0] if refusal else None) == code


# ---- no float near money


FLOATS_FOR_TIME = {
    "handlers.py": "pauses of batches and retries, and the lag that is measured, in seconds",
    "settings.py": "intervals in seconds, and bounds of numbers",
}
"""Modules that count seconds. Amounts are handed through them and computed in none of them."""

MONEY_MODULES = sorted(
    path for path in (ROOT / "services/billing").glob("*.py") if path.name not in FLOATS_FOR_TIME
) + [
    ROOT / "shared/usd.py",
    ROOT / "shared/budgets/caps.py",
    ROOT / "shared/budgets/period.py",
    ROOT / "services/batch/paying.py",
    *(ROOT / "services/cli" / name for name in ("billing.py", "budgets.py", "prices.py", "usage.py")),
    *(
        ROOT / "services/gateway" / name
        for name in (
            "money.py",
            "paying.py",
            "statement.py",
            "management/advice.py",
            "management/billing_usage.py",
            "management/budgets.py",
            "management/credit.py",
            "management/deposits.py",
            "management/prices.py",
            "management/statements.py",
            "management/usage.py",
            "payments/stripe_events.py",
        )
    ),
]


@pytest.mark.parametrize("path", MONEY_MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_float_gets_near_money(path: Path) -> None:
    assert find_float_arithmetic(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("name", FLOATS_FOR_TIME)
def test_where_seconds_are_counted_no_amount_is_computed(name: str) -> None:
    """Line by line: none that has a float also names an amount."""
    text = (ROOT / "services/billing" / name).read_text(encoding="utf-8")
    lines = text.splitlines()
    found = find_float_arithmetic(ast.parse(text))
    assert found, f"{name} needs no exception"
    assert [
        number for number in found if "nanousd" in lines[number - 1] or "amount" in lines[number - 1]
    ] == []


@pytest.mark.parametrize(
    "code", ["x = 1.5", "x = float(y)", "x = a / b", "x /= 2", "x = round(y)", "import math"]
)
def test_the_search_for_floats_finds_them(code: str) -> None:
    assert find_float_arithmetic(ast.parse(code)) != []


def find_float_arithmetic(tree: ast.AST) -> list[int]:
    """Lines with a float literal, true division, `float(...)`, `round(...)`, or `math`."""
    lines = []
    for node in ast.walk(tree):
        suspicious = (
            (isinstance(node, ast.Constant) and isinstance(node.value, float | complex))
            or (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div))
            or (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("float", "round")
            )
            or (isinstance(node, ast.Import) and any(alias.name == "math" for alias in node.names))
            or (isinstance(node, ast.ImportFrom) and node.module == "math")
        )
        if suspicious:
            lines.append(getattr(node, "lineno", 0))
    return lines
