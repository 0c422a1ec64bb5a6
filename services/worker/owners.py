"""Who waits for this worker's jobs, and whether they still live: what is known of each owner, by its reply queue.

An owner that holds grants beats once a second; one that is silent for long is dead or frozen. One that answers no claim
is looked up at the broker: a killed process loses its consumer at once, a frozen one keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from shared.broker import Broker
from shared.outcomes import Unavailable

SILENCE_S = 6.0
"""Owners beat once a second; the silence counts only while our own connection is up."""
ABSENCE_S = 1.5
"""An owner that reconnects has its consumer back sooner; one whose process ended never has."""
MAX_GONE = 1000
"""Remembered names of dead owners; forgotten all together, which costs a claim or two."""


class Owners:
    """Bookkeeping only: what to do with a lost owner's jobs is the worker's business."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._heard_s: dict[str, float] = {}
        self._absent_s: dict[str, float] = {}
        self._gone: set[str] = set()

    def heard(self, owner_queue: str) -> None:
        """A sign of life."""
        self._heard_s[owner_queue] = time.monotonic()

    def was_lost(self, owner_queue: str) -> bool:
        """Whether its next job should be looked at before it is claimed."""
        return owner_queue in self._gone

    def lost(self, owner_queue: str) -> None:
        """It is taken for dead."""
        self._heard_s.pop(owner_queue, None)
        if len(self._gone) >= MAX_GONE:
            self._gone.clear()
        self._gone.add(owner_queue)

    async def is_gone(self, owner_queue: str) -> bool:
        """Look whether nobody reads its replies; one that is back is no longer taken for dead. Raises `Unavailable`."""
        if await self._broker.consumers(owner_queue) == 0:
            return True
        self._gone.discard(owner_queue)
        return False

    def silent(self, with_grants: Collection[str]) -> list[str]:
        """Of the owners of granted jobs, those not heard for too long; the others are forgotten."""
        now_s, connected_for_s = time.monotonic(), self._broker.connected_for_s()
        for owner_queue in self._heard_s.keys() - set(with_grants):
            del self._heard_s[owner_queue]
        return [
            owner_queue
            for owner_queue, heard_s in self._heard_s.items()
            if min(now_s - heard_s, connected_for_s) > SILENCE_S
        ]

    async def absent(self, unanswering: Collection[str]) -> list[str]:
        """Of the owners that answered no claim, those that had no consumer twice in a row."""
        now_s = time.monotonic()
        for owner_queue in self._absent_s.keys() - set(unanswering):
            del self._absent_s[owner_queue]
        found = []
        for owner_queue in unanswering:
            try:
                gone = await self.is_gone(owner_queue)
            except Unavailable:
                break  # we are the ones who are cut off
            if not gone:
                self._absent_s.pop(owner_queue, None)
                continue
            first_s = self._absent_s.setdefault(owner_queue, now_s)
            if min(now_s - first_s, self._broker.connected_for_s()) > ABSENCE_S:
                found.append(owner_queue)
        return found
