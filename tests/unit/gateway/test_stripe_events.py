"""Stripe's events become facts, nothing, or a refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.gateway.payments.stripe_events import TEAM_KEY, read_event
from shared.inference.errors import ApiError

OURS = {TEAM_KEY: "team_a"}
INTENT = {"id": "pi_1", "amount_received": 1999, "currency": "usd", "metadata": OURS}
SESSION = {
    "payment_status": "paid",
    "payment_intent": "pi_1",
    "amount_total": 1999,
    "currency": "usd",
    "metadata": OURS,
}
CHARGE = {"payment_intent": "pi_1", "amount_refunded": 500, "currency": "usd"}
DISPUTE = {
    "id": "du_1",
    "payment_intent": "pi_1",
    "amount": 1999,
    "currency": "usd",
    "status": "needs_response",
}


def event(kind: str, document: dict[str, Any]) -> bytes:
    return json.dumps({"id": "evt_1", "object": "event", "type": kind, "data": {"object": document}}).encode()


@pytest.mark.parametrize(
    ("kind", "document", "fact"),
    [
        ("payment_intent.succeeded", INTENT, ("paid", 19_990_000_000, "team_a", None)),
        ("checkout.session.completed", SESSION, ("paid", 19_990_000_000, "team_a", None)),
        ("checkout.session.async_payment_succeeded", SESSION, ("paid", 19_990_000_000, "team_a", None)),
        ("charge.refunded", CHARGE, ("refunded", 5_000_000_000, None, None)),
        ("charge.dispute.created", DISPUTE, ("disputed", 19_990_000_000, None, "du_1")),
        ("charge.dispute.funds_withdrawn", DISPUTE, ("disputed", 19_990_000_000, None, "du_1")),
        ("charge.dispute.closed", DISPUTE | {"status": "won"}, ("dispute_won", 19_990_000_000, None, "du_1")),
        ("charge.dispute.funds_reinstated", DISPUTE, ("dispute_won", 19_990_000_000, None, "du_1")),
        ("payment_intent.succeeded", INTENT | {"currency": "USD"}, ("paid", 19_990_000_000, "team_a", None)),
        ("payment_intent.succeeded", INTENT | {"amount_received": 1}, ("paid", 10_000_000, "team_a", None)),
    ],
)
def test_an_event_is_a_fact(kind: str, document: dict[str, Any], fact: tuple[object, ...]) -> None:
    read = read_event(event(kind, document))
    assert read is not None
    assert (read.what, read.amount_nanousd, read.team_id, read.dispute_id) == fact
    assert (read.provider, read.event_id, read.payment_id) == ("stripe", "evt_1", "pi_1")


@pytest.mark.parametrize(
    ("kind", "document"),
    [
        ("invoice.paid", {}),
        ("customer.created", {"anything": [1, {}]}),
        ("payment_intent.succeeded", INTENT | {"metadata": {}}),
        ("payment_intent.succeeded", INTENT | {"metadata": None}),
        ("payment_intent.succeeded", INTENT | {"metadata": {"order": "5"}, "currency": "eur"}),
        ("payment_intent.succeeded", INTENT | {"metadata": {TEAM_KEY: "a b"}}),
        ("checkout.session.completed", SESSION | {"payment_status": "unpaid"}),
        ("checkout.session.completed", SESSION | {"payment_intent": None}),
        ("charge.refunded", CHARGE | {"payment_intent": None}),
        ("charge.dispute.created", DISPUTE | {"status": "warning_needs_response"}),
        ("charge.dispute.closed", DISPUTE | {"status": "lost"}),
        ("charge.dispute.closed", DISPUTE | {"status": "warning_closed"}),
        ("charge.dispute.created", DISPUTE | {"payment_intent": None}),
    ],
)
def test_what_is_not_about_our_money_is_passed_over(kind: str, document: dict[str, Any]) -> None:
    assert read_event(event(kind, document)) is None


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_event"),
        (b"[]", "invalid_event"),
        (b"{}", "invalid_event"),
        (b"\xff", "invalid_event"),
        (b"[" * 100_000, "invalid_event"),
        (event("payment_intent.succeeded", {}), "invalid_event"),
        (event("payment_intent.succeeded", INTENT | {"id": "a b"}), "invalid_event"),
        (event("payment_intent.succeeded", INTENT | {"amount_received": 19.99}), "invalid_event"),
        (event("payment_intent.succeeded", INTENT | {"amount_received": "1999"}), "invalid_event"),
        (event("payment_intent.succeeded", INTENT | {"amount_received": 0}), "invalid_event"),
        (event("payment_intent.succeeded", INTENT | {"amount_received": -1}), "invalid_event"),
        (event("payment_intent.succeeded", INTENT | {"amount_received": 10**9}), "invalid_event"),
        (event("payment_intent.succeeded", INTENT | {"currency": "eur"}), "unsupported_currency"),
        (event("checkout.session.completed", SESSION | {"currency": None}), "unsupported_currency"),
        (event("charge.refunded", CHARGE | {"currency": "jpy"}), "unsupported_currency"),
        (event("charge.dispute.created", DISPUTE | {"currency": "gbp"}), "unsupported_currency"),
        (event("charge.dispute.created", DISPUTE | {"id": "\x00"}), "invalid_event"),
        (event("x", {}).replace(b"evt_1", b"evt 1"), "invalid_event"),
    ],
)
def test_what_no_event_says_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_event(body)
    assert (caught.value.status, caught.value.code) == (400, code)
