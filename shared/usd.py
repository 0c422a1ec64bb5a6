"""Money as text: decimal strings of USD outside, integer nano-USD inside. Pure; no float comes in between."""

from __future__ import annotations

import re

NANO = 1_000_000_000
TOKENS_PER_PRICE = 1_000_000
"""Prices of tokens are said for a million of them."""
MAX_USD = 1_000_000
_AMOUNT = re.compile(r"(0|[1-9][0-9]{0,6})(?:\.([0-9]{1,9}))?")


def parse_usd(text: str) -> int | None:
    """Return nano-USD; None for anything but a plain decimal of 0 to a million with at most nine places."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        return None
    nano = int(match[1]) * NANO + int((match[2] or "").ljust(9, "0"))
    return nano if nano <= MAX_USD * NANO else None


def parse_usd_per_million(text: str) -> int | None:
    """Return nano-USD for one token, which must be whole: three places of USD per million tokens."""
    nano = parse_usd(text)
    if nano is None or nano % TOKENS_PER_PRICE:
        return None
    return nano // TOKENS_PER_PRICE


def format_usd(nano: int) -> str:
    """Return a decimal string, at least two places and no more than are needed."""
    whole, rest = divmod(abs(nano), NANO)
    places = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{places}"


def format_usd_per_million(nano_per_token: int) -> str:
    return format_usd(nano_per_token * TOKENS_PER_PRICE)
