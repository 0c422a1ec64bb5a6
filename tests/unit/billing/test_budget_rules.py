"""Which budgets there may be, when somebody is told, what is turned off: as tables."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from services.billing.budget_account import Account
from services.billing.budget_rules import (
    ACTION_EVERY_MS,
    MAX_LIMIT_NANOUSD,
    Budget,
    alerts_due,
    budget_refusal,
    cap_refusal,
    changed,
    resources_to_turn_off,
    turn_off_id,
)
from shared.messages import ChangeBudget

START = date(2026, 11, 1)


def make(**fields: Any) -> Budget:
    values: dict[str, Any] = {
        "budget_id": "bud_1",
        "team_id": "team_a",
        "scope": "team",
        "scope_id": "team_a",
        "period": "month",
        "limit_nanousd": 1_000,
        "alert_percents": (50, 80),
        "actions": (),
        **fields,
    }
    return Budget(**values)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, None),
        ({"limit_nanousd": 0}, None),
        ({"limit_nanousd": MAX_LIMIT_NANOUSD}, None),
        ({"limit_nanousd": -1}, "limit_nanousd must"),
        ({"limit_nanousd": MAX_LIMIT_NANOUSD + 1}, "limit_nanousd must"),
        ({"alert_percents": (1, 100)}, None),
        ({"alert_percents": (0,)}, "from 1 to 100"),
        ({"alert_percents": (101,)}, "from 1 to 100"),
        ({"alert_percents": (50, 50)}, "different numbers"),
        ({"alert_percents": tuple(range(1, 11))}, None),
        ({"alert_percents": tuple(range(1, 12))}, "10 at most"),
        ({"actions": ("turn_off", "turn_off")}, "names one twice"),
        ({"actions": ("turn_off", "stop_scale_up", "refuse_ppt", "stop_batches")}, None),
        ({"scope": "resource", "actions": ("turn_off", "stop_scale_up")}, None),
        ({"scope": "key", "actions": ("refuse_ppt", "stop_batches")}, None),
        ({"scope": "key", "actions": ("turn_off",)}, "of a key can neither"),
        ({"scope": "model", "actions": ("stop_scale_up",)}, "of a model can neither"),
        ({"alert_percents": (), "actions": ("refuse_ppt",)}, None),
        ({"alert_percents": ()}, "needs alert_percents or actions"),
    ],
)
def test_which_budgets_are_refused(fields: dict[str, Any], words: str | None) -> None:
    refusal = budget_refusal(make(**fields))
    if words is None:
        assert refusal is None
    else:
        assert refusal is not None and refusal[0] == "invalid_value" and words in refusal[1]


SPENT = Account(1_000, 600, 100)


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        pytest.param(None, make(limit_nanousd=1), False, id="1 alerts alone are no cap"),
        pytest.param(
            None, make(limit_nanousd=700, actions=("refuse_ppt",)), False, id="just what is spent and held"
        ),
        pytest.param(None, make(limit_nanousd=699, actions=("refuse_ppt",)), True, id="3 less than that"),
        pytest.param(None, make(limit_nanousd=599, actions=("turn_off",)), True, id="3 whatever it does"),
        pytest.param(
            make(limit_nanousd=500, actions=("turn_off",)),
            make(limit_nanousd=500, actions=("turn_off", "refuse_ppt")),
            False,
            id="2 minutes went beyond it, and the limit stays",
        ),
        pytest.param(
            make(limit_nanousd=500, actions=("turn_off",)),
            make(limit_nanousd=650, actions=("turn_off",)),
            True,
            id="3 raised, and still too low",
        ),
        pytest.param(
            make(limit_nanousd=500),
            make(limit_nanousd=500, actions=("refuse_ppt",)),
            True,
            id="3 it becomes a cap",
        ),
    ],
)
def test_a_cap_below_what_is_spent_is_refused(before: Budget | None, after: Budget, refused: bool) -> None:
    refusal = cap_refusal(before, after, SPENT)
    assert (refusal is not None) is refused
    assert refusal is None or refusal[0] == "cap_below_spent"


def test_only_what_is_named_changes() -> None:
    envelope: dict[str, Any] = {"command_id": "c", "deadline_unix_ms": 1, "reply_queue": "r", "actor": "k"}
    command = ChangeBudget(**envelope, team_id="team_a", budget_id="bud_1", actions=[])
    assert changed(make(actions=("turn_off",)), command) == make(actions=())
    command = ChangeBudget(**envelope, team_id="team_a", budget_id="bud_1", alert_percents=[])
    assert changed(make(actions=("turn_off",)), command) == make(alert_percents=(), actions=("turn_off",))
    command = ChangeBudget(
        **envelope, team_id="team_a", budget_id="bud_1", limit_nanousd=0, alert_percents=[9]
    )
    assert changed(make(), command) == make(limit_nanousd=0, alert_percents=(9,))


@pytest.mark.parametrize(
    ("budget", "spent", "percents"),
    [
        (make(), 499, []),
        (make(), 500, [50]),
        (make(), 799, [50]),
        (make(), 800, [50, 80]),
        (make(), 5_000, [50, 80]),
        (make(actions=("turn_off",)), 999, [50, 80]),
        (make(actions=("turn_off",)), 1_000, [50, 80, 100]),
        (make(alert_percents=(33,), limit_nanousd=100), 32, []),
        (make(alert_percents=(33,), limit_nanousd=101), 33, []),
        (make(alert_percents=(33,), limit_nanousd=101), 34, [33]),
        (make(limit_nanousd=0), 0, []),
        (make(limit_nanousd=0), 1, [50, 80]),
        (make(limit_nanousd=0, actions=("refuse_ppt",)), 0, [50, 80, 100]),
        (make(), -5, []),
    ],
)
def test_when_somebody_is_told(budget: Budget, spent: int, percents: list[int]) -> None:
    due = alerts_due(budget, START, spent)
    assert [alert.percent for alert in due] == percents
    assert {(alert.budget, alert.period_start, alert.spent_nanousd) for alert in due} <= {
        (budget, START, spent)
    }


def test_what_a_spent_budget_turns_off() -> None:
    on = [("res_1", "team_a"), ("res_2", "team_a"), ("res_3", "team_b")]
    team = make(actions=("turn_off",))
    one = make(budget_id="bud_2", scope="resource", scope_id="res_2", actions=("turn_off", "stop_scale_up"))
    foreign = make(budget_id="bud_3", scope="resource", scope_id="res_3", actions=("turn_off",))
    mild = make(actions=("stop_scale_up", "refuse_ppt"))
    assert resources_to_turn_off([(team, 999), (one, 999), (mild, 5_000), (foreign, 5_000)], on) == []
    assert resources_to_turn_off([(one, 1_000)], on) == [("res_2", one)]
    assert resources_to_turn_off([(team, 1_000), (one, 1_000)], on) == [("res_1", team), ("res_2", team)]


def test_a_resource_that_is_turned_on_again_is_turned_off_again_a_minute_later() -> None:
    first = turn_off_id("bud_1", "res_1", 10 * ACTION_EVERY_MS)
    assert turn_off_id("bud_1", "res_1", 11 * ACTION_EVERY_MS - 1) == first
    others = {
        turn_off_id("bud_1", "res_1", 11 * ACTION_EVERY_MS),
        turn_off_id("bud_2", "res_1", 10 * ACTION_EVERY_MS),
        turn_off_id("bud_1", "res_2", 10 * ACTION_EVERY_MS),
    }
    assert len(others | {first}) == 4
