"""Exact conversion between Unix integers and UTC datetimes; no float comes in between."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MINUTE_US = 60 * 1_000_000
HOUR_US = 60 * MINUTE_US
MAX_UNIX_MS = 253_402_300_799_999
"""The last millisecond of the year 9999: beyond it neither Python nor a reader can follow."""

_MILLISECOND = timedelta(milliseconds=1)
_MICROSECOND = timedelta(microseconds=1)


def from_unix_ms(unix_ms: int) -> datetime:
    return EPOCH + timedelta(milliseconds=unix_ms)


def to_unix_ms(moment: datetime) -> int:
    return (moment - EPOCH) // _MILLISECOND


def from_unix_us(unix_us: int) -> datetime:
    return EPOCH + timedelta(microseconds=unix_us)


def to_unix_us(moment: datetime) -> int:
    return (moment - EPOCH) // _MICROSECOND
