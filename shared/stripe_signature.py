"""Stripe's signature of webhooks: `Stripe-Signature: t=<Unix seconds>,v1=<HMAC-SHA256 of "t.body">`. Pure.

Source: https://docs.stripe.com/webhooks#verify-manually. We differ in one thing: a time ahead of ours by more than the
tolerance is refused too.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

HEADER = "Stripe-Signature"
TOLERANCE_S = 300
"""Older ones are refused: who has caught a signed request can only repeat it for so long."""
MAX_HEADER_CHARS = 4096
_TIMESTAMP = re.compile(r"[0-9]{1,12}")


def sign(body: bytes, secret: str, timestamp_s: int) -> str:
    """Return the header's value."""
    return f"t={timestamp_s},v1={_digest(body, secret, str(timestamp_s))}"


def signature_refusal(body: bytes, header: str | None, secrets: Sequence[str], now_s: int) -> str | None:
    """Why the body is not what the holder of a secret sent just now; None if it is.

    1. No header, or one without a time and a signature of the scheme v1 -> refused. Other schemes are passed over.
    2. No signature is that of one of the secrets (several while a secret is being changed) -> refused.
    3. The time is further from now than the tolerance -> refused.
    """
    if header is None or len(header) > MAX_HEADER_CHARS:  # 1
        return "there is no signature"
    parts = [part.partition("=") for part in header.split(",")]
    times = [value.strip() for name, _, value in parts if name.strip() == "t"]
    given = [value.strip() for name, _, value in parts if name.strip() == "v1"]
    if len(times) != 1 or not _TIMESTAMP.fullmatch(times[0]) or not given:
        return "the signature is not of the form t=...,v1=..."
    # Every pair is compared, and in constant time: how long it took tells nothing.
    matches = [
        hmac.compare_digest(_digest(body, secret, times[0]).encode(), signature.encode(errors="replace"))
        for secret in secrets
        for signature in given
    ]
    if not any(matches):  # 2
        return "the signature is wrong"
    if abs(int(times[0]) - now_s) > TOLERANCE_S:  # 3
        return f"the signature was made more than {TOLERANCE_S} seconds from now"
    return None


def _digest(body: bytes, secret: str, timestamp: str) -> str:
    return hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
