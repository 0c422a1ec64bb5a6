"""Identifiers: UUIDv7 text, so that ids sort by the time they were made and index well.

PostgreSQL below 18 has no uuidv7(), so they are made here.
"""

from __future__ import annotations

import os
import time


def new_id(prefix: str) -> str:
    """Return `<prefix>_<32 hex digits>`: 48 bits of Unix milliseconds, then 74 random bits (RFC 9562, version 7)."""
    stamp = time.time_ns() // 1_000_000
    random_bits = int.from_bytes(os.urandom(10), "big")
    value = (
        (stamp << 80)
        | (0x7 << 76)
        | ((random_bits >> 68 & 0xFFF) << 64)
        | (0b10 << 62)
        | (random_bits & (1 << 62) - 1)
    )
    return f"{prefix}_{value:032x}"
