"""How many revisions of a model are kept, and which one gives way to another. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REVISIONS_PER_MODEL = 10
"""Each is a folder on the store's disk: enough to go back to, not enough to fill it."""


@dataclass(frozen=True, slots=True)
class KeptRevision:
    revision: int
    is_current: bool
    has_adapters: bool
    """Whether an adapter stands on it, of whichever team."""


@dataclass(frozen=True, slots=True)
class Room:
    """gives_way: the revision that is removed for the new one, if any."""

    gives_way: int | None


def room_for_another(kept: Sequence[KeptRevision], limit: int) -> Room | None:
    """Say what must go before a model gets one more revision; None when it may not get one.

    1. Fewer than the limit are kept -> none.
    2. The oldest that is not the current one (what people go back to) and that no adapter stands on gives way.
    3. There is no such -> the new one is refused.
    """
    if len(kept) < limit:  # 1
        return Room(None)
    free = [each.revision for each in kept if not each.is_current and not each.has_adapters]
    return Room(min(free)) if free else None  # 2, 3
