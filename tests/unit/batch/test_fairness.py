"""Whose lines go next: deficit round robin by tokens, and kin next to each other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.batch.fairness import PREFIX_TOKENS, QUANTUM_TOKENS, Turns, by_prefix, deal

Q = QUANTUM_TOKENS


@pytest.mark.parametrize(
    ("offers", "turns", "room", "chosen"),
    [
        ({}, Turns(), 5, []),
        ({"a": []}, Turns(), 5, []),
        ({"a": [1, 1, 1]}, Turns(), 2, ["a", "a"]),
        # A turn each, as many lines as the quantum covers.
        ({"a": [Q] * 3, "b": [Q] * 3}, Turns(), 6, ["a", "b"] * 3),
        ({"a": [Q // 2] * 4, "b": [Q] * 2}, Turns(), 6, ["a", "a", "b", "a", "a", "b"]),
        # A long line is saved up for.
        ({"a": [3 * Q], "b": [Q] * 4}, Turns(), 5, ["b", "b", "a", "b", "b"]),
        # The turn goes on after whoever had the last one.
        ({"a": [Q], "b": [Q], "c": [Q]}, Turns(last="a"), 1, ["b"]),
        ({"a": [Q], "b": [Q], "c": [Q]}, Turns(last="c"), 1, ["a"]),
        # A turn that the room cut short goes on.
        ({"a": [10] * 5, "b": [10] * 5}, Turns({"a": 500}, "a"), 2, ["a", "a"]),
        # Savings count.
        ({"a": [2 * Q], "b": [2 * Q]}, Turns({"b": Q}, "b"), 1, ["b"]),
    ],
)
def test_deal(offers: dict[str, list[int]], turns: Turns, room: int, chosen: list[str]) -> None:
    assert deal(offers, turns, room)[0] == chosen


def test_who_is_away_saves_nothing() -> None:
    _, turns = deal({"a": [1]}, Turns({"b": 10 * Q}), 1)
    assert turns.deficits == {}


lines = st.lists(st.integers(1, 3 * Q), max_size=30)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), lines), st.integers(0, 40))
def test_room_is_used_as_long_as_there_are_lines(offers: dict[str, list[int]], room: int) -> None:
    chosen, turns = deal(offers, Turns(), room)
    assert len(chosen) == min(room, sum(map(len, offers.values())))
    assert all(chosen.count(team) <= len(of_team) for team, of_team in offers.items())
    assert all(saved >= 0 for saved in turns.deficits.values())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 2 * Q), min_size=300, max_size=300), st.integers(1, 30))
def test_two_teams_share_by_tokens_however_the_room_comes(sizes: list[int], room: int) -> None:
    """One has lines of any size, the other short ones: what each was given differs by no more than a few lines."""
    left = {"long": list(sizes), "short": [64] * 6000}
    given_tokens = dict.fromkeys(left, 0)
    turns = Turns()
    while len(left["long"]) > 100 and len(left["short"]) > 100:
        chosen, turns = deal({team: waiting[: room + 1] for team, waiting in left.items()}, turns, room)
        for team in chosen:
            given_tokens[team] += left[team].pop(0)
    assert abs(given_tokens["long"] - given_tokens["short"]) <= 6 * Q + 2 * Q


@dataclass(frozen=True)
class Line:
    name: str
    prefix: list[int]


def test_lines_that_begin_alike_stay_together_and_keep_their_order() -> None:
    long = list(range(PREFIX_TOKENS))
    lines = [
        Line("1", [*long, 1]), Line("2", [5]), Line("3", [*long, 2]), Line("4", [5]), Line("5", long[:-1]),
    ]  # fmt: skip
    assert [each.name for each in by_prefix(lines)] == ["1", "3", "2", "4", "5"]
