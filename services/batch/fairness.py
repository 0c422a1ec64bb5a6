"""Whose lines go to a resource next: deficit round robin by tokens between teams. Pure.

A team's batches come one after the other, oldest first, and a batch has one model: so lines of one model stay together,
and within a page of a batch lines that begin alike stay together (`by_prefix`), for the workers' prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

QUANTUM_TOKENS = 1024
"""What each team may spend in its turn. Small, so that a queue of short lines is well mixed; a longer line takes several
turns to save up for."""


@dataclass(frozen=True, slots=True)
class Turns:
    """deficits: tokens that a team saved up, of teams with lines only. last: the team that had the last turn."""

    deficits: Mapping[str, int] = field(default_factory=dict)
    last: str = ""


def deal(offers: Mapping[str, Sequence[int]], turns: Turns, room: int) -> tuple[list[str], Turns]:
    """Choose the teams of the next lines, in order; a team's k-th entry is its k-th offered line. Pure.

    offers: for each team the tokens of its next lines, in order; more than `room` of them, if it has more.
    room: how many lines may go.

    1. Teams have their turns in the order of their ids, going on after the one that had the last.
    2. A turn adds a quantum to what the team has saved; it sends lines as long as its savings cover the next one.
    3. A turn that the room cuts short is not over: it goes on first, without another quantum.
    4. A team without lines loses its savings: nobody saves up by being away.
    """
    waiting = {team: list(tokens) for team, tokens in offers.items() if tokens}
    saved = {team: turns.deficits.get(team, 0) for team in waiting}  # 4
    position = dict.fromkeys(waiting, 0)
    chosen: list[str] = []
    last = turns.last
    order = sorted(waiting)
    if last in waiting and saved[last] >= waiting[last][0]:  # 3
        order = [team for team in order if team >= last] + [team for team in order if team < last]
        unfinished = True
    else:
        order = [team for team in order if team > last] + [team for team in order if team <= last]  # 1
        unfinished = False
    while order and len(chosen) < room:
        team = order.pop(0)
        if not unfinished:
            saved[team] += QUANTUM_TOKENS  # 2
        unfinished = False
        last = team
        lines = waiting[team]
        while position[team] < len(lines) and lines[position[team]] <= saved[team] and len(chosen) < room:
            saved[team] -= lines[position[team]]
            position[team] += 1
            chosen.append(team)
        if position[team] < len(lines):
            order.append(team)
        else:
            saved[team] = 0  # 4
    return chosen, Turns({team: tokens for team, tokens in saved.items() if tokens}, last)


class HasPrompt(Protocol):
    @property
    def prefix(self) -> Sequence[int]: ...


P = TypeVar("P", bound=HasPrompt)


def by_prefix(lines: Sequence[P]) -> list[P]:
    """The lines of one page, those that begin alike next to each other; otherwise in the file's order."""
    first_seen: dict[tuple[int, ...], int] = {}
    for index, line in enumerate(lines):
        first_seen.setdefault(tuple(line.prefix[:PREFIX_TOKENS]), index)
    return sorted(lines, key=lambda line: first_seen[tuple(line.prefix[:PREFIX_TOKENS])])


PREFIX_TOKENS = 64
"""Lines that share so many tokens are taken for kin: a few blocks of the prefix cache."""
