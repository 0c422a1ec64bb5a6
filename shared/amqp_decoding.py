"""Makes the AMQP library read whatever strangers put into a message's properties.

The library gives up a whole connection, and with it what everybody else sent, at a short string that is not UTF-8, a date
that no calendar has, or headers that are nested too deep; it reads large headers in quadratic time; and it hands no message
over whose delivery mode is neither 1 nor 2. The broker takes and delivers all of these. Nothing that such a value says is
of use to us, so that it is left out, or what can be read of it is kept.
"""

from __future__ import annotations

import struct
from typing import Any

from pamqp import commands, decode

MAX_HEADERS_BYTES = 16 * 1024
"""Longer ones are left out, unread. Our own are a few hundred bytes."""
_UNREADABLE = (ValueError, OverflowError, OSError, RecursionError, IndexError, struct.error)

_table, _timestamp = decode.field_table, decode.timestamp
_properties = commands.Basic.Properties.unmarshal


def read_whatever_comes() -> None:
    """From now on, for all of this process. Idempotent."""
    decode.METHODS.update(shortstr=_short_string, table=_some_table, timestamp=_some_timestamp)
    commands.Basic.Properties.unmarshal = _some_properties  # type: ignore[method-assign]


def _short_string(value: bytes) -> tuple[int, str]:
    end = 1 + value[0]
    return end, value[1:end].decode("utf-8", "ignore")


def _some_table(value: bytes) -> tuple[int, Any]:
    end = 4 + int.from_bytes(value[:4], "big")
    if end > 4 + MAX_HEADERS_BYTES:
        return end, {}
    try:
        return end, _table(value[:end])[1]
    except _UNREADABLE:
        return end, {}


def _some_timestamp(value: bytes) -> tuple[int, Any]:
    try:
        return _timestamp(value)
    except _UNREADABLE:
        return 8, None


def _some_properties(self: Any, flags: int, data: bytes) -> None:
    _properties(self, flags, data)
    if self.delivery_mode not in (1, 2):
        self.delivery_mode = None
