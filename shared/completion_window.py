"""`completion_window`: minutes or hours such as `30m` or `24h`. Pure."""

from __future__ import annotations

import re

_WINDOW = re.compile(r"([1-9][0-9]{0,3})([mh])")
MAX_WINDOW_S = 7 * 24 * 3600
WORDS = "must be minutes or hours such as 30m or 24h, at most 168h"


def window_s(text: str) -> int | None:
    """The window in seconds, or None for what is none."""
    found = _WINDOW.fullmatch(text)
    if found is None:
        return None
    seconds = int(found[1]) * (60 if found[2] == "m" else 3600)
    return seconds if seconds <= MAX_WINDOW_S else None
