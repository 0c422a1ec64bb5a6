"""Pure: what an hour costs at each moment, and which rates may be set. A rate belongs to a performance option."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from services.billing.instants import MAX_UNIX_MS
from services.billing.minutes import LiveInterval

MAX_HOURLY_RATE_NANOUSD = 10**15
"""A million USD an hour, which a year of minutes cannot bring beyond a bigint."""
_US_PER_MS = 1000


@dataclass(frozen=True, slots=True)
class Rate:
    """One version of an option's hourly rate, in force from its start until the next one starts."""

    rate_id: str
    option_id: str
    hourly_rate_nanousd: int
    starts_unix_ms: int


def rate_pieces(interval: LiveInterval, versions: Iterable[Rate]) -> list[LiveInterval]:
    """Cut live time where its option's rate changes, so that each piece has the rate in force in it. Pure.

    1. Each piece lies within one version; together they are the interval.
    2. What lies before the first version has the first version's rate: an option's first rate holds since ever.
    3. An option without any version -> the interval as it is: it carries what the option was made with.

    Whose a minute is that two rates share is decided in `minutes.billed_minutes`: the earlier one's.

    versions: of the interval's option, in any order.
    """
    ordered = sorted(versions, key=lambda version: version.starts_unix_ms)
    pieces = []
    for number, version in enumerate(ordered):
        start_us = version.starts_unix_ms * _US_PER_MS if number else interval.started_us
        end_us = interval.proved_us
        if number + 1 < len(ordered):
            end_us = min(end_us, ordered[number + 1].starts_unix_ms * _US_PER_MS)
        start_us = max(start_us, interval.started_us)
        if start_us < end_us:
            pieces.append(
                replace(
                    interval,
                    hourly_rate_nanousd=version.hourly_rate_nanousd,
                    started_us=start_us,
                    proved_us=end_us,
                )
            )
    return pieces or [interval]


def rate_refusal(
    hourly_rate_nanousd: int, starts_unix_ms: int, versions: Sequence[Rate], now_unix_ms: int
) -> tuple[str, str] | None:
    """Why this rate cannot be set for an option, as (code, message); None if it can. Pure.

    versions: all that the option has; none means that there is no such option, for each is made with a first rate.

    1. A number out of range -> invalid_rate.
    2. No such option -> option_not_found.
    3. Another version starts at the same moment -> rate_overlaps.
    4. A start in the past would change what minutes cost that are over -> rate_starts_in_past.
    """
    if not 0 <= hourly_rate_nanousd <= MAX_HOURLY_RATE_NANOUSD:
        return "invalid_rate", f"hourly_rate_nanousd: must be between 0 and {MAX_HOURLY_RATE_NANOUSD}"
    if not 0 <= starts_unix_ms <= MAX_UNIX_MS:
        return "invalid_rate", "starts_unix_ms: out of range"
    if not versions:
        return "option_not_found", "there is no such performance option"
    if any(version.starts_unix_ms == starts_unix_ms for version in versions):
        return "rate_overlaps", "a rate of this option starts at the same moment"
    if starts_unix_ms < now_unix_ms:
        return "rate_starts_in_past", "a rate cannot start in the past"
    return None
