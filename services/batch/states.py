"""The moves that a batch and a line may make. The database says the same (a test compares them).

    validating -> failed
    validating -> in_progress -> finalizing -> completed | expired
    validating | in_progress -> cancelling -> cancelled

A line is queued, running when a job of it is with the broker, queued again when that job is lost, and ends once.
"""

from __future__ import annotations

from typing import Literal

BatchState = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
LineEnd = Literal["succeeded", "failed", "cancelled", "expired"]

BATCH_TRANSITIONS: dict[str, frozenset[str]] = {
    "validating": frozenset({"failed", "in_progress", "cancelling"}),
    "in_progress": frozenset({"finalizing", "cancelling"}),
    "finalizing": frozenset({"completed", "expired"}),
    "cancelling": frozenset({"cancelled"}),
    "failed": frozenset(),
    "completed": frozenset(),
    "expired": frozenset(),
    "cancelled": frozenset(),
}
OPEN_STATES = tuple(state for state, moves in BATCH_TRANSITIONS.items() if moves)
ENDING_STATES = ("finalizing", "cancelling")
"""All lines have ended, or will at once; then the files are written and named."""
