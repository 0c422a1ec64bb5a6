"""Money in JSON: decimal strings of USD outside, integer nano-USD inside. Pure."""

from __future__ import annotations

import re

from services.gateway.errors import bad_request

NANO = 1_000_000_000
TOKENS_PER_PRICE = 1_000_000
MAX_USD = 1_000_000
_AMOUNT = re.compile(r"(0|[1-9][0-9]{0,6})(?:\.([0-9]{1,9}))?")


def parse_usd(text: str, param: str) -> int:
    """Return nano-USD. Only plain decimals of 0 to a million with at most nine places; else 400 `invalid_money`."""
    match = _AMOUNT.fullmatch(text)
    nano = int(match[1]) * NANO + int((match[2] or "").ljust(9, "0")) if match else -1
    if not 0 <= nano <= MAX_USD * NANO:
        message = 'must be a decimal string of USD from 0 to 1000000 with at most nine places, such as "0.60"'
        raise bad_request("invalid_money", f"{param} {message}.", param)
    return nano


def parse_usd_per_million(text: str, param: str) -> int:
    """Return nano-USD per token, which must be whole: three places of USD per million tokens."""
    nano = parse_usd(text, param)
    if nano % TOKENS_PER_PRICE:
        raise bad_request("invalid_money", f"{param} may have at most three places.", param)
    return nano // TOKENS_PER_PRICE


def format_usd(nano: int) -> str:
    """Return a decimal string, at least two places and no more than are needed."""
    whole, rest = divmod(abs(nano), NANO)
    places = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{places}"


def format_usd_per_million(nano_per_token: int) -> str:
    return format_usd(nano_per_token * TOKENS_PER_PRICE)
