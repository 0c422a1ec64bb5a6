"""Whose prompt is computed next: how models share what a step has left for prompts. Pure.

Answers need no shares: each running sequence decodes a token in every step. Prompts do: a step has room for one chunk or
a few. Each model has an account of what was computed for it, over its weight; the least one goes next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

MOST_WEIGHT = 4
"""A crowd gets at most that many times what a model with a single prompt gets."""
UNIT = 12
"""One token at weight 1: every weight divides it, so that accounts are integers."""


class Waiting(Protocol):
    """Of a sequence whose prompt is not computed yet."""

    @property
    def team(self) -> str: ...


def model_weights(prompts: Mapping[str, Sequence[Waiting]]) -> dict[str, int]:
    """Each model's weight, from 1 to `MOST_WEIGHT`.

    1. Where several teams wait, a model counts the teams that wait for it: nobody gets more by asking more often.
    2. Where one team does, it counts sequences.
    3. The weight is the model's count over the smallest one, rounded down, within the bounds.
    """
    teams = {model: {view.team for view in views} for model, views in prompts.items()}
    are_several = len(set().union(*teams.values())) > 1
    counts = {
        model: len(teams[model]) if are_several else len(views) for model, views in prompts.items() if views
    }
    least = min(counts.values(), default=1)
    return {model: min(count // least, MOST_WEIGHT) for model, count in counts.items()}


def open_accounts(accounts: Mapping[str, int], models: Sequence[str]) -> dict[str, int]:
    """The accounts of models that have prompts now, the least of them at 0.

    Who had none before, or none for a while, begins with the least: for time in which it asked nothing it is owed
    nothing.
    """
    known = {model: accounts[model] for model in models if model in accounts}
    least = min(known.values(), default=0)
    return {model: known.get(model, least) - least for model in models}


def charge(tokens: int, weight: int) -> int:
    return tokens * UNIT // weight
