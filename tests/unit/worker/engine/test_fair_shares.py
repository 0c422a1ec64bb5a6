"""Weights and accounts of models that have prompts to compute."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from services.worker.engine.fair_shares import MOST_WEIGHT, UNIT, charge, model_weights, open_accounts


@dataclass
class Prompt:
    team: str


def prompts(**teams: str) -> dict[str, list[Prompt]]:
    """For each model the teams of its waiting sequences, a letter each."""
    return {model: [Prompt(team) for team in letters] for model, letters in teams.items()}


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        pytest.param(prompts(), {}, id="nobody"),
        pytest.param(prompts(m="a"), {"m": 1}, id="one alone"),
        pytest.param(prompts(m="aaaaaa"), {"m": 1}, id="one model alone needs no weight"),
        pytest.param(prompts(m="aaa", n="a"), {"m": 3, "n": 1}, id="one team: by sequences"),
        pytest.param(prompts(m="aaaaaaa", n="aa"), {"m": 3, "n": 1}, id="rounded down"),
        pytest.param(prompts(m="a" * 50, n="a"), {"m": 4, "n": 1}, id="at most four to one"),
        pytest.param(prompts(m="a" * 50, n="b"), {"m": 1, "n": 1}, id="several teams: no more for asking more often"),
        pytest.param(prompts(m="abcabc", n="a"), {"m": 3, "n": 1}, id="several teams: by teams"),
        pytest.param(prompts(m="abcdefgh", n="ab", o="a"), {"m": 4, "n": 2, "o": 1}, id="three models"),
        pytest.param(prompts(m="", n="aa"), {"n": 1}, id="who has nothing has no weight"),
    ],
)  # fmt: skip
def test_model_weights(waiting: dict[str, list[Prompt]], expected: dict[str, int]) -> None:
    assert model_weights(waiting) == expected


@pytest.mark.parametrize(
    ("accounts", "models", "expected"),
    [
        ({}, [], {}),
        ({}, ["m", "n"], {"m": 0, "n": 0}),
        ({"m": 30, "n": 10}, ["m", "n"], {"m": 20, "n": 0}),
        ({"m": 30, "n": 10}, ["m", "n", "new"], {"m": 20, "n": 0, "new": 0}),
        ({"m": 30, "gone": 5}, ["m", "new"], {"m": 0, "new": 0}),
    ],
)
def test_open_accounts(accounts: dict[str, int], models: list[str], expected: dict[str, int]) -> None:
    assert open_accounts(accounts, models) == expected


def test_a_charge_is_exact_for_every_weight() -> None:
    for weight in range(1, MOST_WEIGHT + 1):
        assert charge(7, weight) * weight == 7 * UNIT
