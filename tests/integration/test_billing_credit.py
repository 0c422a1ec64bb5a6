"""Credit and terms on a real database, and what a team without credit is refused at the gateway's door."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from services.billing.commands import ACTIONS
from services.billing.credit import Standing, load_standing
from services.billing.credit_round import CreditRound
from services.billing.spendable import WITHOUT_TERMS, Terms, spendable_nanousd
from shared import topology
from shared.broker import Broker
from shared.ids import new_id
from shared.inference.errors import ApiError
from shared.inference.principal import Principal
from shared.messages import Command, CommandResult, TurnOffResource
from tests.conftest import Vhost
from tests.gateway_harness import Gateway, running_gateway
from tests.integration.billing_stand import Stand, open_stand, running_commands, until
from tests.unit.billing.builders import make_credit, make_terms, make_usage


async def carry_out(stand: Stand, command: Command) -> CommandResult:
    async with stand.database.transaction() as connection:
        return await ACTIONS[type(command)](connection, command)


async def ledger_rows(stand: Stand) -> list[tuple[str, str, int]]:
    rows = await stand.admin.fetch(
        "SELECT kind, account_id, amount_nanousd FROM billing_api.ledger_v1 ORDER BY transaction_id, account_id"
    )
    return [(row["kind"], row["account_id"], row["amount_nanousd"]) for row in rows]


async def test_a_credit_is_posted_once_for_its_command_however_often_it_comes(database: str) -> None:
    async with open_stand(database) as stand:
        results = await asyncio.gather(*(carry_out_locked(stand, make_credit()) for _ in range(5)))
        assert {result.body["transaction_id"] for result in results} == {results[0].body["transaction_id"]}
        assert await ledger_rows(stand) == [
            ("credit", "credits:granted", -5_000_000_000),
            ("credit", "team:team_a", 5_000_000_000),
        ]
        kinds = await stand.admin.fetch("SELECT account_id, kind FROM billing.accounts ORDER BY account_id")
        assert [tuple(row) for row in kinds] == [("credits:granted", "credits"), ("team:team_a", "team")]
        words = await stand.admin.fetchval("SELECT words FROM billing.transactions")
        assert words == "credit granted by key_admin: welcome"


async def carry_out_locked(stand: Stand, command: Command) -> CommandResult:
    """As the handler does it, but without its memory of answers."""
    async with stand.database.transaction() as connection:
        await connection.execute("SELECT pg_advisory_xact_lock(1)")
        return await ACTIONS[type(command)](connection, command)


@pytest.mark.parametrize(
    "command",
    [
        make_credit(amount_nanousd=0),
        make_credit(amount_nanousd=-5),
        make_credit(reason=" "),
        make_terms(credit_limit_nanousd=5),
        make_terms(pays="postpaid", credit_limit_nanousd=-1),
    ],
)
async def test_a_refused_command_changes_nothing(database: str, command: Command) -> None:
    async with open_stand(database) as stand:
        result = await carry_out(stand, command)
        assert (result.ok, result.code, bool(result.message)) == (False, "invalid_value", True)
        assert await ledger_rows(stand) == []
        assert await stand.admin.fetchval("SELECT count(*) FROM billing.team_terms") == 0


@pytest.mark.parametrize(
    "terms", [Terms("prepaid"), Terms("postpaid"), Terms("postpaid", 0), Terms("postpaid", 1000)]
)
@pytest.mark.parametrize("balance", [0, 1, 5_000_000_000, -999, -1000, -1001])
async def test_the_view_says_what_the_rule_says(module_database: str, terms: Terms, balance: int) -> None:
    team = new_id("team")
    async with open_stand(module_database, priced=False) as stand:
        await carry_out(
            stand,
            make_terms(team_id=team, pays=terms.pays, credit_limit_nanousd=terms.credit_limit_nanousd),
        )
        if balance:
            await set_balance(stand.admin, team, balance)
        async with stand.database.transaction() as connection:
            standing = await load_standing(connection, team)
        row = await stand.admin.fetchrow("SELECT * FROM billing_api.spendable_v1 WHERE team_id = $1", team)
    expected = spendable_nanousd(terms, balance)
    assert standing == Standing(terms, balance)
    assert standing.spendable_nanousd == expected
    if terms == WITHOUT_TERMS:
        assert (row, expected) == (None, None)  # a team that is not in the view has no bound
        return
    assert row is not None
    assert (row["balance_nanousd"], row["spendable_nanousd"]) == (balance, expected)
    assert (row["pays"], row["credit_limit_nanousd"]) == (terms.pays, terms.credit_limit_nanousd)


async def set_balance(admin: asyncpg.Connection[asyncpg.Record], team: str, balance: int) -> None:
    transaction = new_id("txn")
    async with admin.transaction():
        await admin.execute(
            "INSERT INTO billing.accounts VALUES ($1, $2, 'team'), ('credits:granted', NULL, 'credits') "
            "ON CONFLICT DO NOTHING",
            f"team:{team}",
            team,
        )
        await admin.execute(
            "INSERT INTO billing.transactions (transaction_id, unique_key, kind, team_id, words) "
            "VALUES ($1, $1, 'credit', $2, '')",
            transaction,
            team,
        )
        await admin.execute(
            "INSERT INTO billing.entries VALUES ($1, $2, $3), ($1, 'credits:granted', -$3)",
            transaction,
            f"team:{team}",
            balance,
        )


async def test_terms_are_kept_as_they_followed_each_other_and_the_newest_counts(database: str) -> None:
    async with open_stand(database) as stand:
        for terms in (
            make_terms(),
            make_terms(actor="key_again"),
            make_terms(pays="postpaid", credit_limit_nanousd=7, actor="key_other"),
            make_terms(),
        ):
            assert (await carry_out(stand, terms)).ok
        rows = await stand.admin.fetch(
            "SELECT pays, credit_limit_nanousd, actor FROM billing.team_terms ORDER BY terms_id"
        )
        assert [tuple(row) for row in rows] == [
            ("prepaid", None, "key_admin"),
            ("postpaid", 7, "key_other"),
            ("prepaid", None, "key_admin"),
        ]
        newest = await stand.admin.fetch("SELECT pays FROM billing_api.spendable_v1")
        assert [row["pays"] for row in newest] == ["prepaid"]
        for change in ("UPDATE billing.team_terms SET pays = 'postpaid'", "DELETE FROM billing.team_terms"):
            with pytest.raises(asyncpg.RestrictViolationError):
                await stand.admin.execute(change)


# ---- through the gateway, with the real half of billing behind it


@pytest.fixture
async def stand(database: str, vhost: Vhost) -> AsyncIterator[Stand]:
    async with open_stand(database, priced=False) as opened, running_commands(vhost, opened):
        yield opened


@pytest.fixture
async def gateway(stand: Stand, database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(
        database, vhost.amqp_url, tmp_path, stand_ins=(topology.SCHEDULER_COMMANDS,)
    ) as running:
        yield running


async def test_a_prepaid_team_spends_what_it_was_granted_and_is_then_refused(
    gateway: Gateway, stand: Stand
) -> None:
    key = await gateway.make_team("acme")
    account = (await gateway.call("GET", "/api/billing/account", key=key)).json
    assert account == {
        "team": "acme", "pays": "postpaid", "credit_limit_nanousd": None, "credit_limit_usd": None,
        "balance_nanousd": 0, "balance_usd": "0.00", "spendable_nanousd": None, "spendable_usd": None,
    }  # fmt: skip

    # Given a prepaid team with three cents
    terms = await gateway.call("PUT", "/api/billing/account/terms?team=acme", {"pays": "prepaid"})
    assert (terms.status, terms.json["spendable_usd"]) == (200, "0.00"), terms.body
    credit = {"amount_usd": "0.03", "reason": "welcome"}
    headers = {"Idempotency-Key": "first"}
    for _ in range(2):
        granted = await gateway.call("POST", "/api/billing/credits?team=acme", credit, headers=headers)
        assert (granted.status, granted.json["balance_usd"]) == (201, "0.03"), granted.body
    account = (await gateway.call("GET", "/api/billing/account", key=key)).json
    assert (account["pays"], account["spendable_nanousd"]) == ("prepaid", 30_000_000)

    # When it has spent them, and a little more
    await add_model(gateway)
    option = await gateway.make_option("tiny")
    resource_id = await make_resource(gateway, option["option_id"], key)
    await insert_dear_price(stand.admin)
    team_id = await stand.admin.fetchval("SELECT team_id FROM gateway.teams WHERE slug = 'acme'")
    await stand.record(make_usage(team_id=team_id))
    account = (await gateway.call("GET", "/api/billing/account", key=key)).json
    assert (account["balance_nanousd"], account["spendable_nanousd"]) == (-1_000_000, 0)

    # Then it can turn nothing on and scale nothing up, and what costs nothing still works
    refused = await gateway.call("POST", f"/api/resources/{resource_id}/on", key=key)
    assert (refused.status, refused.code) == (402, "insufficient_credit")
    refused = await gateway.call("PATCH", f"/api/resources/{resource_id}", {"gpus": 2}, key=key)
    assert (refused.status, refused.code) == (402, "insufficient_credit")
    assert (await gateway.call("PATCH", f"/api/resources/{resource_id}", {"gpus": 0}, key=key)).status == 200

    # And once it has credit again it goes on
    granted = await gateway.call(
        "POST", "/api/billing/credits?team=acme", credit, headers={"Idempotency-Key": "second"}
    )
    assert granted.json["spendable_nanousd"] == 29_000_000
    assert (await gateway.call("POST", f"/api/resources/{resource_id}/on", key=key)).status == 202


async def add_model(gateway: Gateway) -> None:
    """`platform/tiny`, of the type `tiny`."""
    await gateway.sql.execute(
        """WITH t AS (INSERT INTO gateway.model_types VALUES ('0123456789abcdef', 'tiny', 'x', 1) RETURNING signature),
                m AS (INSERT INTO gateway.models SELECT 'mod_1', team_id, 'tiny', signature FROM gateway.teams, t
                      WHERE is_platform RETURNING model_id)
           INSERT INTO gateway.model_revisions
           SELECT model_id, 1, 'mod_1/1', '{"vocab_size": 258, "eos_token_ids": [257]}', 64 FROM m"""
    )


async def make_resource(gateway: Gateway, option_id: str, key: str) -> str:
    body = {"name": "main", "model_type": "tiny", "option": option_id}
    made = await gateway.call("POST", "/api/resources", body, key=key)
    assert made.status == 201, made.body
    return str(made.json["resource_id"])


async def insert_dear_price(admin: asyncpg.Connection[asyncpg.Record]) -> None:
    """`make_usage()` has 10 and 20 tokens: 31 million nano-USD."""
    await admin.execute(
        "INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at) "
        "VALUES ('price_dear', 'smollm2-135m', 'live', 1100000, 1000000, '1970-01-01T00:00:00Z')"
    )


@pytest.mark.parametrize(
    ("path", "method", "body", "headers", "refusal"),
    [
        ("credits", "POST", {"amount_usd": "1", "reason": "x"}, {}, (400, "missing_idempotency_key")),
        ("credits", "POST", {"amount_usd": "0", "reason": "x"}, None, (400, "invalid_money")),
        ("credits", "POST", {"amount_usd": "-1", "reason": "x"}, None, (400, "invalid_money")),
        ("credits", "POST", {"amount_usd": "1.0000000001", "reason": "x"}, None, (400, "invalid_money")),
        ("credits", "POST", {"amount_usd": "1e3", "reason": "x"}, None, (400, "invalid_money")),
        ("credits", "POST", {"amount_usd": 1, "reason": "x"}, None, (400, "invalid_type")),
        ("credits", "POST", {"amount_usd": 0.1, "reason": "x"}, None, (400, "invalid_type")),
        ("credits", "POST", {"amount_usd": "1"}, None, (400, "missing_parameter")),
        ("credits", "POST", {"amount_usd": "1", "reason": "a\nb"}, None, (400, "invalid_value")),
        ("credits", "POST", {"amount_usd": "1", "reason": "  "}, None, (400, "invalid_value")),
        ("credits", "POST", {"amount_usd": "1", "reason": "x", "a": 1}, None, (400, "unknown_parameter")),
        ("account/terms", "PUT", {"pays": "never"}, None, (400, "invalid_value")),
        ("account/terms", "PUT", {"pays": "prepaid", "credit_limit_usd": "5"}, None, (400, "invalid_value")),
        ("account/terms", "PUT", {"pays": "postpaid", "credit_limit_usd": "x"}, None, (400, "invalid_money")),
    ],
)
async def test_bad_input_is_refused_by_a_code_and_changes_nothing(
    gateway: Gateway,
    stand: Stand,
    path: str,
    method: str,
    body: dict[str, Any],
    headers: dict[str, str] | None,
    refusal: tuple[int, str],
) -> None:
    await gateway.make_team("acme")
    sent = {"Idempotency-Key": "k"} if headers is None else headers
    reply = await gateway.call(method, f"/api/billing/{path}?team=acme", body, headers=sent)
    assert (reply.status, reply.code) == refusal
    assert await ledger_rows(stand) == []
    assert await stand.admin.fetchval("SELECT count(*) FROM billing.team_terms") == 0


async def test_a_team_grants_itself_nothing_and_sees_no_other_team(gateway: Gateway, stand: Stand) -> None:
    key = await gateway.make_team("acme")
    await gateway.make_team("other")
    headers = {"Idempotency-Key": "k"}
    credit = {"amount_usd": "1", "reason": "please"}
    for team in ("acme", "other", "nobody"):
        for method, path, body in (
            ("POST", "credits", credit),
            ("PUT", "account/terms", {"pays": "postpaid"}),
        ):
            reply = await gateway.call(
                method, f"/api/billing/{path}?team={team}", body, key=key, headers=headers
            )
            assert (reply.status, reply.code) == (403, "insufficient_scope")
    reply = await gateway.call("GET", "/api/billing/account?team=other", key=key)
    assert (reply.status, reply.code) == (403, "insufficient_scope")
    assert await ledger_rows(stand) == []


async def test_a_pool_is_closed_to_who_cannot_pay_and_to_what_has_no_price(
    gateway: Gateway, stand: Stand
) -> None:
    # Given a live pool, a model of its type that the team may use, and no price
    await gateway.make_team("acme")
    await add_model(gateway)
    option = await gateway.make_option("tiny")
    pool = {"name": "pool", "model_type": "tiny", "option": option["option_id"], "pool": True}
    assert (await gateway.call("POST", "/api/resources", pool)).status == 201
    await gateway.sql.execute("UPDATE scheduler.resources SET wanted = 'on', state = 'starting' WHERE pool")
    await gateway.sql.execute("UPDATE scheduler.resources SET state = 'live' WHERE pool")
    team_id = await gateway.sql.fetchval("SELECT team_id FROM gateway.teams WHERE slug = 'acme'")
    principal = Principal("key_1", team_id, "acme", False, False, frozenset({"inference"}))

    async def refused() -> str | None:
        await gateway.routes.refresh()
        try:
            gateway.routes.resolve(principal, "platform/tiny")
        except ApiError as error:
            return error.code
        return None

    assert await refused() == "no_price"
    # When a price is set, of the other class first, then of the live class for later, then for now
    for change in ({"work_class": "batch"}, {"starts_at": "2900-01-01T00:00:00Z"}):
        price = {"model_type": "tiny", "work_class": "live", "prompt_usd_per_million": "1",
                 "completion_usd_per_million": "1"}  # fmt: skip
        assert (await gateway.call("PUT", "/api/prices", price | change)).status == 200
        assert await refused() == "no_price"
    await stand.admin.execute(
        "INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at) "
        "VALUES ('price_now', 'tiny', 'live', 1, 1, now())"
    )
    assert await refused() is None
    # Then a team that pays before needs credit
    terms = await gateway.call("PUT", "/api/billing/account/terms?team=acme", {"pays": "prepaid"})
    assert terms.status == 200
    assert await refused() == "insufficient_credit"
    credit = {"amount_usd": "0.000000001", "reason": "one nano-dollar"}
    headers = {"Idempotency-Key": "k"}
    assert (
        await gateway.call("POST", "/api/billing/credits?team=acme", credit, headers=headers)
    ).status == 201
    assert await refused() is None


async def test_resources_of_a_team_without_credit_are_turned_off_and_no_others(
    gateway: Gateway, stand: Stand, vhost: Vhost
) -> None:
    # Given two teams with a resource that is on, and a pool
    await add_model(gateway)
    option = await gateway.make_option("tiny")
    resources = {}
    for slug in ("acme", "other"):
        key = await gateway.make_team(slug)
        resources[slug] = await make_resource(gateway, option["option_id"], key)
        assert (await gateway.call("POST", f"/api/resources/{resources[slug]}/on", key=key)).status == 202
    pool = {"name": "pool", "model_type": "tiny", "option": option["option_id"], "pool": True}
    pool_id = (await gateway.call("POST", "/api/resources", pool)).json["resource_id"]
    assert (await gateway.call("POST", f"/api/resources/{pool_id}/on")).status == 202

    async def wanted() -> dict[str, str]:
        rows = await gateway.sql.fetch("SELECT resource_id, wanted FROM scheduler.resources")
        return {row["resource_id"]: row["wanted"] for row in rows}

    async with AsyncExitStack() as stack:
        round_ = CreditRound(await Broker.open(vhost.amqp_url, "billing-test", stack), stand.database)
        # When one pays before and has credit, and then the other pays before and has none
        assert (
            await gateway.call("PUT", "/api/billing/account/terms?team=other", {"pays": "prepaid"})
        ).status == 200
        credit = {"amount_usd": "1", "reason": "x"}
        headers = {"Idempotency-Key": "k"}
        granted = await gateway.call("POST", "/api/billing/credits?team=other", credit, headers=headers)
        assert granted.status == 201
        await round_.once()
        before = len(gateway.commands)
        terms = await gateway.call("PUT", "/api/billing/account/terms?team=acme", {"pays": "prepaid"})
        assert terms.status == 200
        await round_.once()

        # Then its resource goes off, and the others stay on
        async def acme_is_off() -> bool:
            return (await wanted())[resources["acme"]] == "off"

        await until(acme_is_off)
        assert await wanted() == {resources["acme"]: "off", resources["other"]: "on", pool_id: "on"}
        asked = gateway.commands[before:]
        assert [(type(command), command.actor) for command in asked] == [
            (TurnOffResource, "billing:no_credit")
        ]
        # And what is off already is not asked again
        await round_.once()
        await asyncio.sleep(0.3)
        assert len(gateway.commands) == before + 1
