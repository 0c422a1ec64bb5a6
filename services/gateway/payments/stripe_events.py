"""Pure: reads Stripe's events into facts about payments. What is not about a payment of ours is passed over.

Shapes: https://docs.stripe.com/api/events/types. Only the fields that decide are read; all others may come and go.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar

import msgspec

from shared.inference.errors import ApiError, bad_request
from shared.messages import PaymentReported

PROVIDER = "stripe"
CURRENCY = "usd"
TEAM_KEY = "roundhouse_team_id"
"""The metadata by which a payment is known as ours, and whose it is."""
NANOUSD_PER_CENT = 10_000_000
MAX_CENTS = 100_000_000
"""A million USD; Stripe itself takes less at once."""
_ID = re.compile(r"[A-Za-z0-9_]{1,255}")
T = TypeVar("T")
What = Literal["paid", "refunded", "disputed", "dispute_won"]


class _Data(msgspec.Struct):
    object: msgspec.Raw


class _Event(msgspec.Struct):
    id: str
    type: str
    data: _Data
    created: int = 0


class _Session(msgspec.Struct):
    payment_status: str
    payment_intent: str | None = None
    amount_total: int | None = None
    currency: str | None = None
    metadata: dict[str, Any] | None = None


class _Intent(msgspec.Struct):
    id: str
    amount_received: int
    currency: str
    metadata: dict[str, Any] | None = None


class _Charge(msgspec.Struct):
    amount_refunded: int
    currency: str
    payment_intent: str | None = None


class _Dispute(msgspec.Struct):
    id: str
    amount: int
    currency: str
    status: str = ""
    payment_intent: str | None = None


def read_event(body: bytes) -> PaymentReported | None:
    """Return the fact, or None for an event that changes nothing here. Raises `ApiError` 400.

    1. Not an event of Stripe's shape -> invalid_event.
    2. A checkout that is paid, or a payment that succeeded, with our metadata -> paid. Both come for one payment.
    3. A charge that was refunded -> refunded: Stripe tells the sum of all refunds so far.
    4. A dispute that took money (mere inquiries do not) -> disputed; won, or its money reinstated -> dispute_won.
    5. Any of these in another currency than USD -> unsupported_currency.
    6. Other types, and what has no payment -> None.
    """
    event = _decode(body, _Event)
    if not _ID.fullmatch(event.id):
        raise _invalid("id")
    document = event.data.object
    match event.type:
        case "checkout.session.completed" | "checkout.session.async_payment_succeeded":  # 2
            session = _decode(document, _Session)
            team_id = _team(session.metadata)
            if session.payment_status != "paid" or session.payment_intent is None or team_id is None:
                return None
            return _fact(
                event,
                "paid",
                session.payment_intent,
                session.amount_total or 0,
                session.currency,
                team_id=team_id,
            )
        case "payment_intent.succeeded":
            intent = _decode(document, _Intent)
            team_id = _team(intent.metadata)
            if team_id is None:
                return None
            return _fact(event, "paid", intent.id, intent.amount_received, intent.currency, team_id=team_id)
        case "charge.refunded":  # 3
            charge = _decode(document, _Charge)
            if charge.payment_intent is None:
                return None
            return _fact(event, "refunded", charge.payment_intent, charge.amount_refunded, charge.currency)
        case "charge.dispute.created" | "charge.dispute.funds_withdrawn":  # 4
            dispute = _decode(document, _Dispute)
            if event.type == "charge.dispute.created" and dispute.status.startswith("warning_"):
                return None
            return _dispute_fact(event, "disputed", dispute)
        case "charge.dispute.closed" | "charge.dispute.funds_reinstated":
            dispute = _decode(document, _Dispute)
            if event.type == "charge.dispute.closed" and dispute.status != "won":
                return None
            return _dispute_fact(event, "dispute_won", dispute)
    return None  # 6


def _dispute_fact(event: _Event, what: What, dispute: _Dispute) -> PaymentReported | None:
    if dispute.payment_intent is None:
        return None
    if not _ID.fullmatch(dispute.id):
        raise _invalid("data.object.id")
    return _fact(event, what, dispute.payment_intent, dispute.amount, dispute.currency, dispute_id=dispute.id)


def _fact(
    event: _Event,
    what: What,
    payment_id: str,
    cents: int,
    currency: str | None,
    *,
    team_id: str | None = None,
    dispute_id: str | None = None,
) -> PaymentReported:
    if (currency or "").lower() != CURRENCY:  # 5
        raise bad_request("unsupported_currency", "Payments are taken in USD alone.", "currency")
    if not _ID.fullmatch(payment_id):
        raise _invalid("payment_intent")
    if not 0 < cents <= MAX_CENTS:
        raise _invalid("amount")
    return PaymentReported(
        provider=PROVIDER,
        event_id=event.id,
        what=what,
        payment_id=payment_id,
        amount_nanousd=cents * NANOUSD_PER_CENT,
        team_id=team_id,
        dispute_id=dispute_id,
    )


def _team(metadata: dict[str, Any] | None) -> str | None:
    team_id = (metadata or {}).get(TEAM_KEY)
    return team_id if isinstance(team_id, str) and _ID.fullmatch(team_id) else None


def _decode(body: bytes | msgspec.Raw, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _invalid("body") from error


def _invalid(param: str) -> ApiError:
    return bad_request("invalid_event", "This is not an event as Stripe sends it.", param)
