"""Pure: which price is in force, which may be set, and what tokens and minutes cost: all amounts are computed here.

All amounts are integers in nano-USD. Token prices are per token, so a token charge needs no rounding; a minute charge
is rounded once, half up, to the nano-USD.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.billing.instants import MAX_UNIX_MS
from shared.messages import SetPrice

MAX_TOKEN_PRICE_NANOUSD = 1_000_000_000
"""1 USD for one token. Times the largest token count (2^31 - 1), prompt and completion, it still fits a bigint."""

LEAD_MS = 1_000
"""A version that follows another one begins no sooner from now: no job that it counts for may be charged, or reserved for,
by the one before it, and until it is committed, and half a second longer at gateways, nobody knows it."""

_MODEL_TYPE = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")


@dataclass(frozen=True, slots=True)
class Price:
    """One version of a model type's token prices, in force from `starts_unix_ms` until the next version starts."""

    price_id: str
    model_type: str
    work_class: str
    prompt_nanousd: int
    completion_nanousd: int
    starts_unix_ms: int


def price_in_force(
    prices: Iterable[Price], model_type: str, work_class: str, accepted_unix_ms: int
) -> Price | None:
    """The version that counts for a job accepted at this time: the last one that had started. None if none had."""
    started = [
        price
        for price in prices
        if (price.model_type, price.work_class) == (model_type, work_class)
        and price.starts_unix_ms <= accepted_unix_ms
    ]
    return max(started, key=lambda price: price.starts_unix_ms, default=None)


def tokens_amount_nanousd(price: Price, prompt_tokens: int, completion_tokens: int) -> int:
    return price.prompt_nanousd * prompt_tokens + price.completion_nanousd * completion_tokens


def minutes_amount_nanousd(hourly_rate_nanousd: int, minutes: int) -> int:
    """The hourly rate, prorated to whole minutes, rounded half up."""
    return (hourly_rate_nanousd * minutes + 30) // 60


def price_refusal(command: SetPrice, versions: Sequence[Price], now_unix_ms: int) -> tuple[str, str] | None:
    """Why this price cannot be set, as (code, message); None if it can. Pure.

    versions: all versions that the type and class have.

    1. A name or number out of range -> invalid_price.
    2. Another version starts at the same moment -> price_overlaps.
    3. A start in the past, or before everybody knows of it, would change what jobs cost that were charged already, or
       reserved for -> price_starts_in_past. It is allowed for the first version: there is no charge that it could
       contradict.
    """
    if not _MODEL_TYPE.fullmatch(command.model_type):
        return "invalid_price", "model_type: not the name of a model type"
    for field in ("prompt_nanousd", "completion_nanousd"):
        if not 0 <= getattr(command, field) <= MAX_TOKEN_PRICE_NANOUSD:
            return "invalid_price", f"{field}: must be between 0 and {MAX_TOKEN_PRICE_NANOUSD}"
    if not 0 <= command.starts_unix_ms <= MAX_UNIX_MS:
        return "invalid_price", "starts_unix_ms: out of range"
    if any(version.starts_unix_ms == command.starts_unix_ms for version in versions):
        return "price_overlaps", "a price of this model type and class starts at the same moment"
    if versions and command.starts_unix_ms < now_unix_ms + LEAD_MS:
        return "price_starts_in_past", "a new version of a price starts a second from now at the earliest"
    return None
