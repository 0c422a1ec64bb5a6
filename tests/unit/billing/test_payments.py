"""What a payment's facts come to, in any order, and what is posted of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.payments import (
    MAX_PAYMENT_NANOUSD,
    BadPayment,
    PaymentsDisagree,
    PostedPayment,
    check_payment,
    kept_nanousd,
    postings_due,
)
from shared.messages import PaymentReported
from tests.unit.billing.builders import make_payment

PAID = make_payment("paid", amount_nanousd=100)
PAID_TWICE = make_payment("paid", amount_nanousd=100)


def refunded(amount: int) -> PaymentReported:
    return make_payment("refunded", amount_nanousd=amount)


def disputed(amount: int, dispute_id: str = "du_1", what: str = "disputed") -> PaymentReported:
    return make_payment(what, amount_nanousd=amount, dispute_id=dispute_id)


WON = disputed(100, what="dispute_won")


@pytest.mark.parametrize(
    ("facts", "kept"),
    [
        ([], None),
        ([refunded(30)], None),
        ([disputed(100)], None),
        ([PAID], 100),
        ([PAID, PAID_TWICE], 100),
        ([PAID, refunded(30)], 70),
        ([PAID, refunded(30), refunded(50)], 50),
        ([PAID, refunded(50), refunded(30)], 50),
        ([PAID, refunded(100)], 0),
        ([PAID, refunded(1000)], 0),
        ([PAID, disputed(100)], 0),
        ([PAID, disputed(40), disputed(40)], 60),
        ([PAID, disputed(40), disputed(40, "du_2")], 20),
        ([PAID, refunded(50), disputed(100)], 0),
        ([PAID, disputed(100), WON], 100),
        ([PAID, WON], 100),
        ([PAID, refunded(10), disputed(100), WON], 90),
        ([PAID, disputed(40, "du_2"), disputed(100), WON], 60),
    ],
)
def test_what_a_team_keeps_of_a_payment(facts: list[PaymentReported], kept: int | None) -> None:
    assert kept_nanousd(facts) == kept
    assert kept_nanousd(reversed(facts)) == kept


@pytest.mark.parametrize("change", [{"amount_nanousd": 99}, {"team_id": "team_b"}])
def test_of_payments_that_disagree_nothing_is_posted(change: dict[str, Any]) -> None:
    with pytest.raises(PaymentsDisagree):
        kept_nanousd([PAID, make_payment("paid", **({"amount_nanousd": 100} | change))])


FACTS = st.one_of(
    st.just(PAID),
    st.integers(1, 120).map(refunded),
    st.tuples(st.integers(1, 120), st.sampled_from(["du_1", "du_2"])).map(lambda pair: disputed(*pair)),
    st.just(WON),
)


@given(st.lists(FACTS, max_size=8), st.randoms(use_true_random=False))
def test_any_order_and_any_repeats_come_to_the_same_balance(
    facts: list[PaymentReported], shuffler: Any
) -> None:
    shuffled = facts + facts[:3]
    shuffler.shuffle(shuffled)
    assert post_one_by_one(shuffled) == (kept_nanousd(facts) or 0)


def post_one_by_one(facts: list[PaymentReported]) -> int:
    """The net amount in the ledger after each fact was posted as it came."""
    known: list[PaymentReported] = []
    posted: PostedPayment | None = None
    keys = set()
    for fact in facts:
        known.append(fact)
        for charge in postings_due("pi_1", known, posted):
            assert charge.unique_key not in keys
            assert (charge.kind == "correction") == (charge.corrects_key == "payment:stripe:pi_1")
            keys.add(charge.unique_key)
            before = posted or PostedPayment(0, 0)
            posted = PostedPayment(before.amount_nanousd - charge.amount_nanousd, before.transactions + 1)
        assert postings_due("pi_1", known, posted) == []
    return posted.amount_nanousd if posted is not None else 0


def test_a_refund_that_came_first_is_a_correction_of_the_payment_all_the_same() -> None:
    due = postings_due("pi_1", [refunded(30), PAID], None)
    assert [(c.kind, c.unique_key, c.corrects_key, c.amount_nanousd, c.other_account) for c in due] == [
        ("payment", "payment:stripe:pi_1", None, -100, "payments:stripe"),
        ("correction", "payment:stripe:pi_1:1", "payment:stripe:pi_1", 30, "payments:stripe"),
    ]


@pytest.mark.parametrize(
    "fact",
    [
        make_payment("paid", amount_nanousd=0),
        make_payment("paid", amount_nanousd=-1),
        make_payment("paid", amount_nanousd=MAX_PAYMENT_NANOUSD + 1),
        make_payment("paid", team_id=None),
        make_payment("disputed", dispute_id=None),
        make_payment("dispute_won", dispute_id=None),
    ],
)
def test_what_cannot_be_true_is_refused(fact: PaymentReported) -> None:
    with pytest.raises(BadPayment):
        check_payment(fact)
