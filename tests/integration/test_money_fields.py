"""Every field of the API that takes money refuses what is no plain decimal, by the field's name, and changes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.gateway.management import bodies
from shared import topology
from tests.conftest import Vhost
from tests.gateway_harness import Gateway, running_gateway
from tests.integration.billing_stand import Stand, open_stand, running_commands
from tests.integration.test_billing_credit import add_model

BAD: list[Any] = [
    "-1", "-0.01", "+1", "1.0000000001", "0.0000000005", "1000000.000000001", "1e3", "1E-9", "0x10", "1_000", "1,5", "1,000",
    ".5", "5.", "007", "", " 1", "1 ", "1\n", "NaN", "Infinity", "-0", "\u0661", "\uff11", "1/2", "$1", "1 USD",
    1, 1.5, -1, 0, True, ["1"], {"usd": "1"},
]  # fmt: skip
MONEY_OF: dict[str, list[tuple[str, str, dict[str, Any], str]]] = {
    "CreateOption": [
        (
            "POST",
            "/api/options",
            {
                "model_type": "tiny",
                "name": "fp32",
                "device_kind": "cpu",
                "precision": "fp32",
                "max_batch": 4,
                "max_context_tokens": 64,
                "kv_tokens": 256,
            },
            "hourly_rate_usd",
        )
    ],
    "SetPrice": [
        (
            "PUT",
            "/api/prices",
            {"model_type": "tiny", "work_class": "live", other: "1.00"},
            field,
        )
        for field, other in (
            ("prompt_usd_per_million", "completion_usd_per_million"),
            ("completion_usd_per_million", "prompt_usd_per_million"),
        )
    ],
    "SetRate": [("PUT", "/api/rates", {"option_id": "opt_" + "0" * 32}, "hourly_rate_usd")],
    "ChangeTerms": [
        ("PUT", "/api/billing/account/terms?team=acme", {"pays": "postpaid"}, "credit_limit_usd")
    ],
    "GrantCredit": [("POST", "/api/billing/credits?team=acme", {"reason": "x"}, "amount_usd")],
    "TopUp": [("POST", "/api/billing/top_ups?team=acme", {}, "amount_usd")],
    "CreateBudget": [
        (
            "POST",
            "/api/budgets?team=acme",
            {"scope": "team", "period": "day", "alert_percents": [50], "actions": []},
            "limit_usd",
        )
    ],
    "ChangeBudget": [("PATCH", "/api/budgets/BUDGET?team=acme", {}, "limit_usd")],
}
"""By the body that has the field: how to send it, and what else it needs."""


def test_no_field_that_takes_money_is_left_out() -> None:
    taking = {
        (name, field)
        for name, body in vars(bodies).items()
        for field in getattr(body, "__struct_fields__", ())
        if field.endswith(("_usd", "_usd_per_million"))
    }
    assert taking == {(name, case[3]) for name, cases in MONEY_OF.items() for case in cases}


@pytest.fixture
async def stand(database: str, vhost: Vhost) -> AsyncIterator[Stand]:
    async with open_stand(database) as opened, running_commands(vhost, opened):
        yield opened


@pytest.fixture
async def gateway(stand: Stand, database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(
        database, vhost.amqp_url, tmp_path, stand_ins=(topology.SCHEDULER_COMMANDS,)
    ) as running:
        yield running


async def test_what_is_no_plain_decimal_is_refused_in_every_field_and_changes_nothing(
    gateway: Gateway, stand: Stand
) -> None:
    await gateway.make_team("acme")
    await add_model(gateway)
    wanted = {"scope": "team", "period": "month", "limit_usd": "1.00", "alert_percents": [50], "actions": []}
    budget = (await gateway.call("POST", "/api/budgets?team=acme", wanted)).json
    before = await books(stand)
    number = 0
    for method, path, body, field in (case for cases in MONEY_OF.values() for case in cases):
        for bad in BAD:
            number += 1
            reply = await gateway.call(
                method,
                path.replace("BUDGET", budget["budget_id"]),
                body | {field: bad},
                headers={"Idempotency-Key": f"once-{number}"},
            )
            said = (reply.status, reply.code)
            assert said in {(400, f"invalid_{why}") for why in ("money", "type", "value")}, (
                path,
                bad,
                reply.body,
            )
            assert reply.json["param"] == field, (path, bad, reply.body)
    assert await books(stand) == before


async def books(stand: Stand) -> list[tuple[Any, ...]]:
    """All that an amount could have changed."""
    rows = await stand.admin.fetch(
        """
        SELECT 'budget', budget_id, limit_nanousd FROM billing.budgets
        UNION ALL SELECT 'price', price_id, prompt_nanousd + completion_nanousd FROM billing.prices
        UNION ALL SELECT 'rate', rate_id, hourly_rate_nanousd FROM billing.rates
        UNION ALL SELECT 'terms', team_id, credit_limit_nanousd FROM billing.team_terms
        UNION ALL SELECT 'entry', transaction_id, amount_nanousd FROM billing.entries ORDER BY 1, 2
        """
    )
    return [tuple(row) for row in rows]
