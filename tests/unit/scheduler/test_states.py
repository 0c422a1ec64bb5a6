"""The transition tables, and that the database has the same ones."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from services.scheduler.states import (
    PLACE_TRANSITIONS,
    RESOURCE_TRANSITIONS,
    IllegalTransition,
    PlaceState,
    ResourceState,
    advance_place,
    advance_resource,
    next_towards,
)

MIGRATION = Path(__file__).resolve().parents[3] / "infra/migrations/20261101000003_scheduler.sql"


def sql_pairs(function: str) -> set[tuple[str, str]]:
    body = MIGRATION.read_text().split(f"FUNCTION scheduler.{function}()", 1)[1].split("$$;", 1)[0]
    return {(a, b) for a, b in re.findall(r"'(\w+)>(\w+)'", body)}


def test_the_database_has_the_same_table_of_resource_states() -> None:
    ours = {(str(a), str(b)) for a, targets in RESOURCE_TRANSITIONS.items() for b in targets}
    assert ours == sql_pairs("check_resource_state")


def test_the_database_has_the_same_table_of_place_states() -> None:
    ours = {(str(a), str(b)) for a, targets in PLACE_TRANSITIONS.items() for b in targets}
    assert ours == sql_pairs("check_place")


@pytest.mark.parametrize("state", ResourceState)
@pytest.mark.parametrize("to", ResourceState)
def test_each_illegal_move_of_a_resource_raises(state: ResourceState, to: ResourceState) -> None:
    if to == state or to in RESOURCE_TRANSITIONS[state]:
        assert advance_resource(state, to) == to
    else:
        with pytest.raises(IllegalTransition):
            advance_resource(state, to)


@pytest.mark.parametrize(("state", "to"), list(itertools.product(PlaceState, PlaceState)))
def test_each_illegal_move_of_a_place_raises(state: PlaceState, to: PlaceState) -> None:
    if to == state or to in PLACE_TRANSITIONS[state]:
        assert advance_place(state, to) == to
    else:
        with pytest.raises(IllegalTransition):
            advance_place(state, to)


@pytest.mark.parametrize(("state", "target"), list(itertools.product(ResourceState, ResourceState)))
def test_every_state_is_reached_from_every_other_by_legal_steps(
    state: ResourceState, target: ResourceState
) -> None:
    steps = 0
    while state != target:
        state = advance_resource(state, next_towards(state, target))
        steps += 1
        assert steps <= 3
