"""What a team may spend, and which terms and credits there can be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.credit import MAX_CREDIT_NANOUSD, Standing, credit_refusal
from services.billing.spendable import (
    MAX_CREDIT_LIMIT_NANOUSD,
    WITHOUT_TERMS,
    Terms,
    spendable_nanousd,
    terms_refusal,
)
from tests.unit.billing.builders import make_credit

PREPAID = Terms("prepaid")
LIMITED = Terms("postpaid", 100)
TERMS = st.sampled_from([PREPAID, LIMITED, WITHOUT_TERMS, Terms("postpaid", 0)])


@pytest.mark.parametrize(
    ("terms", "balance", "spendable"),
    [
        (PREPAID, 7, 7),
        (PREPAID, 0, 0),
        (PREPAID, -7, 0),
        (WITHOUT_TERMS, 0, None),
        (WITHOUT_TERMS, -(10**15), None),
        (LIMITED, 0, 100),
        (LIMITED, 5, 105),
        (LIMITED, -99, 1),
        (LIMITED, -100, 0),
        (LIMITED, -101, 0),
        (Terms("postpaid", 0), 0, 0),
        (Terms("postpaid", 0), 1, 1),
    ],
)
def test_what_a_team_may_spend(terms: Terms, balance: int, spendable: int | None) -> None:
    assert spendable_nanousd(terms, balance) == spendable
    assert Standing(terms, balance).body()["spendable_nanousd"] == spendable


@given(TERMS, st.integers(-(10**15), 10**15))
def test_spending_all_of_it_leaves_nothing_to_spend(terms: Terms, balance: int) -> None:
    spendable = spendable_nanousd(terms, balance)
    if spendable is not None:
        assert spendable_nanousd(terms, balance - spendable) == 0


@pytest.mark.parametrize(
    ("terms", "code"),
    [
        (PREPAID, None),
        (WITHOUT_TERMS, None),
        (Terms("postpaid", 0), None),
        (Terms("postpaid", MAX_CREDIT_LIMIT_NANOUSD), None),
        (Terms("postpaid", MAX_CREDIT_LIMIT_NANOUSD + 1), "invalid_value"),
        (Terms("postpaid", -1), "invalid_value"),
        (Terms("prepaid", 0), "invalid_value"),
    ],
)
def test_terms_are_refused_for_a_reason(terms: Terms, code: str | None) -> None:
    refusal = terms_refusal(terms)
    assert (refusal[0] if refusal else None) == code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, None),
        ({"amount_nanousd": 1}, None),
        ({"amount_nanousd": MAX_CREDIT_NANOUSD}, None),
        ({"amount_nanousd": 0}, "invalid_value"),
        ({"amount_nanousd": -1}, "invalid_value"),
        ({"amount_nanousd": MAX_CREDIT_NANOUSD + 1}, "invalid_value"),
        ({"reason": ""}, "invalid_value"),
        ({"reason": " \t"}, "invalid_value"),
        ({"reason": "x" * 201}, "invalid_value"),
    ],
)
def test_a_credit_is_refused_for_a_reason(fields: dict[str, Any], code: str | None) -> None:
    refusal = credit_refusal(make_credit(**fields))
    assert (refusal[0] if refusal else None) == code
