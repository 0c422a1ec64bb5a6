"""The two state machines, each one table. The database says the same tables again in its triggers.

Resource:  off → starting → live → draining → off, with asleep (on, nothing wanted) and failed (starts keep failing).
Place:     free → starting → ready → draining → free, and lost (not heard of, not known to be gone). Free is no row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar


class ResourceState(StrEnum):
    OFF = "off"
    STARTING = "starting"
    LIVE = "live"
    DRAINING = "draining"
    ASLEEP = "asleep"
    FAILED = "failed"


class PlaceState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


RESOURCE_TRANSITIONS: Mapping[ResourceState, frozenset[ResourceState]] = {
    ResourceState.OFF: frozenset({ResourceState.STARTING, ResourceState.ASLEEP}),
    ResourceState.STARTING: frozenset(
        {
            ResourceState.LIVE,
            ResourceState.DRAINING,
            ResourceState.FAILED,
            ResourceState.OFF,
            ResourceState.ASLEEP,
        }
    ),
    ResourceState.LIVE: frozenset(
        {ResourceState.DRAINING, ResourceState.STARTING, ResourceState.FAILED, ResourceState.ASLEEP}
    ),
    ResourceState.DRAINING: frozenset(
        {ResourceState.OFF, ResourceState.LIVE, ResourceState.STARTING, ResourceState.ASLEEP}
    ),
    ResourceState.ASLEEP: frozenset({ResourceState.STARTING, ResourceState.OFF}),
    ResourceState.FAILED: frozenset(
        {ResourceState.STARTING, ResourceState.OFF, ResourceState.DRAINING, ResourceState.LIVE}
    ),
}

PLACE_TRANSITIONS: Mapping[PlaceState, frozenset[PlaceState]] = {
    PlaceState.STARTING: frozenset({PlaceState.READY, PlaceState.DRAINING, PlaceState.LOST}),
    PlaceState.READY: frozenset({PlaceState.DRAINING, PlaceState.LOST}),
    PlaceState.DRAINING: frozenset({PlaceState.READY, PlaceState.LOST}),
    PlaceState.LOST: frozenset({PlaceState.READY, PlaceState.DRAINING, PlaceState.STARTING}),
}

S = TypeVar("S", ResourceState, PlaceState)


class IllegalTransition(Exception):
    """A move that the table does not have: a bug in a decision."""


def advance_resource(state: ResourceState, to: ResourceState) -> ResourceState:
    """Return `to` if the table allows the move (or there is none). Raises `IllegalTransition`."""
    return _advance(RESOURCE_TRANSITIONS, state, to)


def advance_place(state: PlaceState, to: PlaceState) -> PlaceState:
    """Return `to` if the table allows the move (or there is none). Raises `IllegalTransition`."""
    return _advance(PLACE_TRANSITIONS, state, to)


def _advance(table: Mapping[S, frozenset[S]], state: S, to: S) -> S:
    if to != state and to not in table[state]:
        raise IllegalTransition(f"{state} cannot become {to}")
    return to


def next_towards(state: ResourceState, target: ResourceState) -> ResourceState:
    """The first step of the shortest way through the table from `state` to `target`; `target` itself if adjacent.

    A resource whose worker became ready within one look goes off → starting → live over two looks.
    """
    if state == target:
        return state
    first_step = {step: step for step in sorted(RESOURCE_TRANSITIONS[state])}
    waiting = deque(first_step)
    while target not in first_step:
        here = waiting.popleft()
        for step in sorted(RESOURCE_TRANSITIONS[here]):
            if step not in first_step and step != state:
                first_step[step] = first_step[here]
                waiting.append(step)
    return first_step[target]
