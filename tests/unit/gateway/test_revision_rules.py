from __future__ import annotations

import pytest

from services.gateway.revision_rules import KeptRevision, Room, room_for_another

CURRENT, ADAPTED = "current", "adapted"


@pytest.mark.parametrize(
    ("kept", "room"),
    [
        ({1: CURRENT, 2: ""}, Room(None)),
        ({1: "", 2: "", 3: CURRENT}, Room(1)),
        ({3: CURRENT, 2: "", 1: ""}, Room(1)),
        # People went back to the oldest
        ({1: CURRENT, 2: "", 3: ""}, Room(2)),
        ({1: ADAPTED, 2: "", 3: CURRENT}, Room(2)),
        ({1: ADAPTED, 2: ADAPTED, 3: CURRENT}, None),
        ({1: ADAPTED, 2: CURRENT, 3: ADAPTED}, None),
        # More than the limit, which was higher once
        ({1: "", 2: "", 3: "", 4: CURRENT}, Room(1)),
    ],
)
def test_the_oldest_that_nobody_needs_gives_way(kept: dict[int, str], room: Room | None) -> None:
    revisions = [
        KeptRevision(revision, is_current=why == CURRENT, has_adapters=why == ADAPTED)
        for revision, why in kept.items()
    ]
    assert room_for_another(revisions, limit=3) == room
