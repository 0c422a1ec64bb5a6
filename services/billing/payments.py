"""Pure: what all that is known of a payment comes to, and what is still to be posted of it.

Like the facts of a job, those of a payment decide as a set: their order, repeats and delays change nothing. What was
paid is one row; refunds and disputes are corrections that name it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.billing.ledger import Charge, payments_account
from shared.messages import PaymentReported

MAX_PAYMENT_NANOUSD = 10**15
"""A million USD, which is more than the provider takes at once."""


class BadPayment(ValueError):
    """The fact cannot be true: an amount out of range, a payment of nobody."""


class PaymentsDisagree(ValueError):
    """Facts about one payment name different teams or amounts: somebody is wrong, so nothing is posted."""


@dataclass(frozen=True, slots=True)
class PostedPayment:
    """What the ledger has of a payment: the net amount that the team got, and in how many transactions."""

    amount_nanousd: int
    transactions: int


def check_payment(fact: PaymentReported) -> None:
    """Refuse what no provider can truthfully say. Raises `BadPayment`."""
    if not 0 < fact.amount_nanousd <= MAX_PAYMENT_NANOUSD:
        raise BadPayment("amount_nanousd is out of range")
    if fact.what == "paid" and not fact.team_id:
        raise BadPayment("a payment without a team")
    if fact.what in ("disputed", "dispute_won") and not fact.dispute_id:
        raise BadPayment("a dispute without an id")


def kept_nanousd(facts: Iterable[PaymentReported]) -> int | None:
    """What the team has of a payment after refunds and disputes; None while nobody has said that it was paid.

    1. Every word that it was paid must name one team and one amount; twice the same is once.
    2. Refunds are told as the sum of all so far: the largest counts.
    3. A disputed amount is taken back, once for each dispute, until the dispute is won.
    4. Never more is taken back than was paid.
    """
    known = list(facts)
    paid = {(fact.team_id, fact.amount_nanousd) for fact in known if fact.what == "paid"}
    if not paid:
        return None
    if len(paid) > 1:  # 1
        raise PaymentsDisagree(f"{len(paid)} different payments under one id")
    ((_, amount),) = paid
    refunded = max((fact.amount_nanousd for fact in known if fact.what == "refunded"), default=0)  # 2
    won = {fact.dispute_id for fact in known if fact.what == "dispute_won"}
    disputes: dict[str | None, int] = {}
    for fact in known:
        if fact.what == "disputed" and fact.dispute_id not in won:  # 3
            disputes[fact.dispute_id] = max(disputes.get(fact.dispute_id, 0), fact.amount_nanousd)
    return max(amount - refunded - sum(disputes.values()), 0)  # 4


def postings_due(
    payment_id: str, facts: Iterable[PaymentReported], posted: PostedPayment | None
) -> list[Charge]:
    """The transactions that make the ledger say what the facts come to; none if it does already.

    The payment itself is posted as it was paid, and all that was taken back since as a correction of it.
    """
    known = list(facts)
    kept = kept_nanousd(known)
    if kept is None:
        return []
    paid = next(fact for fact in known if fact.what == "paid")
    key = f"payment:{paid.provider}:{payment_id}"
    account = payments_account(paid.provider)
    due = []
    before = posted
    if before is None:
        before = PostedPayment(paid.amount_nanousd, 1)
        due.append(
            Charge(
                unique_key=key,
                kind="payment",
                team_id=paid.team_id or "",
                other_account=account,
                amount_nanousd=-paid.amount_nanousd,
                words=f"paid by {paid.provider}, {payment_id}",
            )
        )
    if kept != before.amount_nanousd:
        back = kept < before.amount_nanousd
        due.append(
            Charge(
                unique_key=f"{key}:{before.transactions}",
                kind="correction",
                team_id=paid.team_id or "",
                other_account=account,
                amount_nanousd=before.amount_nanousd - kept,
                words=f"{'refunded or disputed' if back else 'given back after a dispute'}, {payment_id}",
                corrects_key=key,
            )
        )
    return due
