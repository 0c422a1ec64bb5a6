"""`roundhouse billing`, `budgets`, `prices` and `rates` as processes of their own, against a real gateway and real billing."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

from infra.local.scratch import execute
from loadtest.stack import MODEL_TYPE, Stack, running_stack
from tests.conftest import ROOT, Servers

LATER = "2099-01-01T00:00:00Z"


@dataclass(frozen=True)
class Command:
    """Runs `roundhouse` with a key."""

    url: str
    key: str
    before: tuple[str, ...] = ()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("ROUNDHOUSE_")
        }
        return subprocess.run(
            [sys.executable, "-m", "services.cli", *self.before, *arguments],
            cwd=ROOT, env=environment | {"ROUNDHOUSE_URL": self.url, "ROUNDHOUSE_API_KEY": self.key},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def text(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
        return done.stderr


@pytest.fixture(scope="module")
def stack(servers: Servers) -> Iterator[Stack]:
    with running_stack() as running:
        running.start_service("billing")
        yield running


@pytest.fixture
def team(stack: Stack) -> Command:
    return Command(stack.base_url, stack.api_key)


@pytest.fixture
def platform(stack: Stack) -> Command:
    """Acts for the team."""
    return Command(stack.base_url, stack._environment["ROUNDHOUSE_ADMIN_KEY"], ("--team", "load"))


def test_credit_is_granted_once_and_opens_in_the_statement(team: Command, platform: Command) -> None:
    assert team.json("billing", "account")["pays"] == "postpaid"
    assert "may owe 5.00 USD" in platform.text("billing", "terms", "postpaid", "--credit-limit", "5.00")
    assert platform.json("billing", "terms", "prepaid")["spendable_nanousd"] == 0
    grant = ("billing", "credit", "20.50", "--reason", "a gift", "--once", "gift-1")
    assert platform.json(*grant)["balance_usd"] == "20.50"
    assert platform.json(*grant)["balance_usd"] == "20.50", "the same key grants once"
    account = team.text("billing", "account")
    assert "prepaid" in account and account.count("20.50 USD") == 2

    [deposit] = team.json("billing", "deposits")
    assert (deposit["kind"], deposit["amount_nanousd"]) == ("credit", 20_500_000_000)
    assert "a gift" in team.text("billing", "deposits")
    month = f"{datetime.now(UTC):%Y-%m}"
    bill = team.json("billing", "statement", month)
    assert (bill["received_usd"], bill["total_nanousd"]) == ("20.50", -20_500_000_000)
    [line] = bill["lines"]
    shown = team.text("billing", "statement", month)
    assert line["line_id"] in shown and "-20.50 USD, so far" in shown
    row, *_totals = csv.DictReader(io.StringIO(team.text("billing", "statement", month, "--csv")))
    assert (row["line_id"], row["amount_nanousd"]) == (line["line_id"], "-20500000000")
    [behind] = team.json("billing", "line", month, line["line_id"])
    assert behind["transaction_id"] == deposit["transaction_id"]
    assert "-20.50" in team.text("billing", "line", month, line["line_id"])


def test_a_budget_is_made_changed_alerted_and_removed(stack: Stack, team: Command) -> None:
    made = team.json("budgets", "create", "25.00", "--alert", "50", "--alert", "80", "--action", "refuse_ppt")
    assert (made["scope"], made["period"], made["alert_percents"]) == ("team", "month", [50, 80])
    changed = team.json("budgets", "change", made["budget_id"], "--limit", "30.00", "--no-alerts")
    assert (changed["limit_usd"], changed["alert_percents"], changed["actions"]) == (
        "30.00",
        [],
        ["refuse_ppt"],
    )
    of_key = team.json("budgets", "create", "1.00", "--period", "day", "--key", "load", "--alert", "100")
    assert of_key["scope"] == "key"
    table = team.text("budgets", "list")
    assert "30.00" in table and f"key {of_key['scope_id']}" in table and "refuse_ppt" in table
    assert "of all" not in team.text("budgets", "get", made["budget_id"])
    of_model = team.json("budgets", "create", "2.00", "--model", stack.model, "--action", "stop_batches")
    assert of_model["scope"] == "model"

    execute(
        stack.database_url,
        "INSERT INTO billing.alerts (alert_id, budget_id, team_id, scope, scope_id, period, period_start, percent,"
        " limit_nanousd, spent_nanousd) SELECT 'alert_' || lpad('1', 32, '0'), budget_id, team_id, scope, scope_id, period,"
        f" current_date, 100, 1, 2 FROM billing.budgets WHERE budget_id = '{of_key['budget_id']}'",
    )
    [alert] = team.json("budgets", "alerts")
    assert (alert["percent"], alert["budget_id"]) == (100, of_key["budget_id"])
    assert of_key["budget_id"] in team.text("budgets", "alerts", "--budget", of_key["budget_id"])
    assert team.json("budgets", "alerts", "--budget", made["budget_id"]) == []

    for budget in (made, of_key, of_model):
        assert team.text("budgets", "delete", budget["budget_id"]) == ""
    assert team.json("budgets", "list") == []


def test_prices_and_rates_are_versions_that_can_be_withdrawn(
    stack: Stack, team: Command, platform: Command
) -> None:
    root = Command(platform.url, platform.key)
    first = root.json("prices", "set", MODEL_TYPE, "live", "0.02", "0.06")
    assert (first["prompt_nanousd"], first["completion_nanousd"]) == (20, 60)
    later = root.json("prices", "set", MODEL_TYPE, "live", "0.03", "0.06", "--from", LATER)
    listed = [each["price_id"] for each in team.json("prices", "list")]
    assert listed == [first["price_id"], later["price_id"]]
    assert "0.03" in team.text("prices", "list", "--model-type", MODEL_TYPE)
    assert "price_in_force" in root.refused("prices", "withdraw", first["price_id"])
    assert root.text("prices", "withdraw", later["price_id"]) == ""
    assert [each["price_id"] for each in team.json("prices", "list")] == [first["price_id"]]

    option = "opt_" + "a" * 32
    execute(
        stack.database_url,
        f"INSERT INTO scheduler.performance_options VALUES ('{option}', '{MODEL_TYPE}', 'x', 'cpu', 'bf16', 4, 64, 256, 7)",
    )
    rate = root.json("rates", "set", option, "0.60", "--from", LATER)
    assert rate["hourly_rate_nanousd"] == 600_000_000
    assert rate["rate_id"] in team.text("rates", "list", "--option", option)
    assert root.text("rates", "withdraw", rate["rate_id"]) == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("budgets", "create", "-1"), ""),
        (("budgets", "create", "1.0000000001", "--alert", "50"), "invalid_money"),
        (("budgets", "create", "5.00"), "needs alert_percents or actions"),
        (("budgets", "create", "5.00", "--key", "nobody", "--alert", "50"), "nothing is called 'nobody'"),
        (("budgets", "create", "5.00", "--key", "a", "--model", "b"), "one thing"),
        (("budgets", "change", "bud_" + "0" * 32), "nothing is to be changed"),
        (("budgets", "change", "bud_" + "0" * 32, "--limit", "1.00"), "not_found"),
        (("budgets", "delete", "bud_" + "0" * 32), "not_found"),
        (("billing", "statement", "2026-13"), "month"),
        (("billing", "line", "2026-11", "minutes:x"), "not_found"),
        (("billing", "top-up", "5.00"), "payments_off"),
        (("billing", "top-up", "5.00"), "--once "),
        (("billing", "credit", "5.00", "--reason", "mine"), "insufficient_scope"),
        (("prices", "set", MODEL_TYPE, "live", "1", "1"), "insufficient_scope"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_with_the_api_s_code(
    team: Command, arguments: tuple[str, ...], words: str
) -> None:
    if arguments[-1].startswith("-"):
        assert team.run(*arguments).returncode == 2  # an option that there is not
        return
    assert words in team.refused(*arguments)
