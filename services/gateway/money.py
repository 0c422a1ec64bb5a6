"""Money in the API's JSON: what `shared.usd` reads and writes, with the API's refusals. Pure."""

from __future__ import annotations

from shared import usd
from shared.inference.errors import bad_request
from shared.usd import MAX_USD, NANO, format_usd, format_usd_per_million

__all__ = ["MAX_USD", "NANO", "format_usd", "format_usd_per_million", "parse_usd", "parse_usd_per_million"]


def parse_usd(text: str, param: str) -> int:
    """Return nano-USD. Only plain decimals of 0 to a million with at most nine places; else 400 `invalid_money`."""
    nano = usd.parse_usd(text)
    if nano is None:
        message = 'must be a decimal string of USD from 0 to 1000000 with at most nine places, such as "0.60"'
        raise bad_request("invalid_money", f"{param} {message}.", param)
    return nano


def parse_usd_per_million(text: str, param: str) -> int:
    """Return nano-USD per token, which must be whole: three places of USD per million tokens."""
    parse_usd(text, param)
    nano = usd.parse_usd_per_million(text)
    if nano is None:
        raise bad_request("invalid_money", f"{param} may have at most three places.", param)
    return nano
