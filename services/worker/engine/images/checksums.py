"""Checksums that run as fast as memory is read: they find damage, not malice.

An image names what it was made with. SHA-256 is for machines without the `xxhash` package, and takes ten times as long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

Digest = Callable[[memoryview], str]


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


DIGESTS: dict[str, Digest] = {"sha256": _sha256}
BEST = "sha256"
try:
    import xxhash
except ImportError:
    pass  # a machine with torch alone, where images are measured
else:

    def _xxh3(data: memoryview) -> str:
        return xxhash.xxh3_128_hexdigest(data)

    DIGESTS["xxh3-128"] = _xxh3
    BEST = "xxh3-128"
