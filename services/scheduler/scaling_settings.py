"""Pure: what a team set for the scaling of a resource, and which bounds are in force at a time.

1. Autoscaling off: minimum and maximum are the fixed number. On: as they were set.
2. A window that is open overrides both; of several that are open, the first in the list. Equal bounds are a fixed
   number, so a window can also make a fixed number move, or hold an autoscaled one still.
3. What was found holds until the next opening or end of a window, and is found anew at least once a day.
"""

from __future__ import annotations

from msgspec import Struct

from shared.cron import DAY_S, is_time_zone, latest_start, next_start, parse_cron
from shared.messages import ScalingWindow

MAX_COUNT = 64
MAX_WINDOWS = 16
MAX_WINDOW_MINUTES = 7 * 24 * 60
IDLE_TIMEOUTS_S = range(10, 7 * DAY_S + 1)
TARGET_WAITS_S = range(1, 3601)
MAX_NAME = 100


class Bounds(Struct, frozen=True, kw_only=True):
    """How many places a resource may have now."""

    min_count: int
    max_count: int
    window: str | None = None
    """The name of the window that they come from."""
    until: float | None = None
    """When they have to be found anew; None: when the settings are changed."""


def bounds_at(min_count: int, max_count: int, windows: list[ScalingWindow], now: float) -> Bounds:
    """Return the bounds in force."""
    if not windows:
        return Bounds(min_count=min_count, max_count=max_count)
    until = now + DAY_S
    opened: ScalingWindow | None = None
    for window in windows:
        cron, length_s = parse_cron(window.start), window.duration_minutes * 60.0
        since = latest_start(cron, window.time_zone, now, length_s)
        if since is not None:
            until = min(until, since + length_s)
            opened = opened or window
        begins = next_start(cron, window.time_zone, now, DAY_S)
        until = min(until, begins) if begins is not None else until
    if opened is None:
        return Bounds(min_count=min_count, max_count=max_count, until=until)
    return Bounds(min_count=opened.min_count, max_count=opened.max_count, window=opened.name, until=until)


def settings_problem(
    min_count: int, max_count: int, idle_timeout_s: int, windows: list[ScalingWindow]
) -> str | None:
    """Return what is wrong with the settings, naming the field; None when nothing is."""
    problem = _bounds_problem("", min_count, max_count)
    if problem is not None:
        return problem
    if idle_timeout_s not in IDLE_TIMEOUTS_S:
        return f"idle_timeout_s must be between {IDLE_TIMEOUTS_S.start} and {IDLE_TIMEOUTS_S.stop - 1}"
    if len(windows) > MAX_WINDOWS:
        return f"windows: at most {MAX_WINDOWS}"
    if len({window.name for window in windows}) < len(windows):
        return "windows: each needs a name of its own"
    for index, window in enumerate(windows):
        problem = _window_problem(f"windows[{index}].", window)
        if problem is not None:
            return problem
    return None


def _window_problem(where: str, window: ScalingWindow) -> str | None:
    name = window.name
    if not (1 <= len(name) <= MAX_NAME and name.isprintable() and name == name.strip()):
        return f"{where}name must be 1 to {MAX_NAME} printable characters"
    if not 1 <= window.duration_minutes <= MAX_WINDOW_MINUTES:
        return f"{where}duration_minutes must be between 1 and {MAX_WINDOW_MINUTES}"
    if not is_time_zone(window.time_zone):
        return f"{where}time_zone must be a name such as UTC or Europe/Berlin"
    try:
        parse_cron(window.start)
    except ValueError as error:
        return f"{where}start {error}"
    return _bounds_problem(where, window.min_count, window.max_count)


def _bounds_problem(where: str, min_count: int, max_count: int) -> str | None:
    if not 0 <= max_count <= MAX_COUNT:
        return f"{where}max must be between 0 and {MAX_COUNT}"
    if not 0 <= min_count <= max_count:
        return f"{where}min must be between 0 and max"
    return None
