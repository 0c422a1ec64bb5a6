"""Our signatures are Stripe's: its own package accepts ours, and we accept its."""

from __future__ import annotations

import json
import time

import pytest
import stripe
from hypothesis import given
from hypothesis import strategies as st

from shared.stripe_signature import MAX_HEADER_CHARS, TOLERANCE_S, sign, signature_refusal

SECRET = "whsec_test"
BODY = json.dumps(
    {"id": "evt_1", "object": "event", "type": "x", "data": {"object": {"name": "Zoë"}}}
).encode()
NOW_S = 1_800_000_000


def test_stripe_s_package_accepts_our_signature() -> None:
    event = stripe.Webhook.construct_event(BODY, sign(BODY, SECRET, int(time.time())), SECRET)
    assert event.id == "evt_1"


def test_stripe_s_package_refuses_what_we_refuse() -> None:
    for header in (
        sign(BODY, "other", int(time.time())),
        sign(BODY, SECRET, int(time.time()) - TOLERANCE_S - 5),
    ):
        with pytest.raises(stripe.SignatureVerificationError):
            stripe.Webhook.construct_event(BODY, header, SECRET)
        assert signature_refusal(BODY, header, [SECRET], int(time.time())) is not None


@given(st.text().filter(lambda text: text.isprintable()), st.text(min_size=1, max_size=50))
def test_we_accept_the_signature_of_stripe_s_package(text: str, secret: str) -> None:
    try:
        body = text.encode()
        secret.encode()
    except UnicodeEncodeError:
        return
    header = stripe.WebhookSignature.generate_signature_header(text, secret, NOW_S)
    assert signature_refusal(body, header, [secret], NOW_S) is None
    assert sign(body, secret, NOW_S) == header


GOOD = sign(BODY, SECRET, NOW_S)
DIGEST = GOOD.partition("v1=")[2]


@pytest.mark.parametrize(
    ("header", "secrets", "refused"),
    [
        (GOOD, [SECRET], False),
        (GOOD, ["other", SECRET], False),
        (f"t={NOW_S},v1={'0' * 64},v1={DIGEST}", [SECRET], False),
        (f"t={NOW_S},v0=abc,v1={DIGEST}", [SECRET], False),
        (f"t={NOW_S}, v1={DIGEST}", [SECRET], False),
        (GOOD, ["other"], True),
        (GOOD, [], True),
        (None, [SECRET], True),
        ("", [SECRET], True),
        (f"v1={DIGEST}", [SECRET], True),
        (f"t={NOW_S}", [SECRET], True),
        (f"t={NOW_S},v0={DIGEST}", [SECRET], True),
        (f"t={NOW_S},v1=", [SECRET], True),
        (f"t={NOW_S},v1=é", [SECRET], True),
        (f"t={NOW_S},v1=\udcff", [SECRET], True),
        (f"t={NOW_S}0,v1={DIGEST}", [SECRET], True),
        (f"t=-1,v1={DIGEST}", [SECRET], True),
        (f"t=now,v1={DIGEST}", [SECRET], True),
        (f"t={NOW_S},t={NOW_S},v1={DIGEST}", [SECRET], True),
        (GOOD.upper(), [SECRET], True),
        ("t=1," + "v1=0," * MAX_HEADER_CHARS, [SECRET], True),
    ],
)
def test_a_header_is_taken_or_refused(header: str | None, secrets: list[str], refused: bool) -> None:
    assert (signature_refusal(BODY, header, secrets, NOW_S) is not None) == refused


@pytest.mark.parametrize(("off_s", "refused"), [(-300, False), (300, False), (-301, True), (301, True)])
def test_a_signature_is_good_for_five_minutes(off_s: int, refused: bool) -> None:
    assert (signature_refusal(BODY, GOOD, [SECRET], NOW_S + off_s) is not None) == refused


def test_another_body_is_refused() -> None:
    assert signature_refusal(BODY + b" ", GOOD, [SECRET], NOW_S) == "the signature is wrong"
