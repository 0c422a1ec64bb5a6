"""Money in from end to end: the gateway's page and webhook, the broker, billing, and a provider that speaks Stripe's API."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
import stripe
from aiohttp import web

from infra.local.credentials import Credentials
from infra.local.payments import gateway_payments_env, payment_specs
from infra.local.ports import PORT_NAMES, Ports
from services.billing.local_payments import LocalPayments
from services.billing.payments import BadPayment, PaymentsDisagree
from services.billing.payments_store import PaymentIntake
from services.gateway.payments.provider import StripeApi
from services.gateway.payments.stripe_events import TEAM_KEY
from services.gateway.payments.webhook import MAX_BODY_BYTES
from shared import topology
from shared.broker import Broker
from shared.outcomes import Unavailable
from shared.stripe_signature import sign
from tests.conftest import ROOT, Vhost
from tests.gateway_harness import Gateway, Reply, running_gateway
from tests.integration.billing_stand import Stand, open_stand, running_commands, running_events, until
from tests.integration.test_gateway_commands import free_port
from tests.unit.billing.builders import make_payment

SECRET, API_KEY = "whsec_test", "sk_test_local"
DOLLAR = 10**9


async def ledger_of(admin: asyncpg.Connection[asyncpg.Record]) -> list[tuple[str, int]]:
    rows = await admin.fetch(
        "SELECT kind, amount_nanousd FROM billing_api.deposits_v1 ORDER BY created_at, transaction_id"
    )
    assert await admin.fetchval("SELECT coalesce(sum(amount_nanousd), 0) FROM billing.entries") == 0
    return [(row["kind"], row["amount_nanousd"]) for row in rows]


# ---- billing alone


@pytest.fixture
async def alone(database: str) -> AsyncIterator[tuple[Stand, PaymentIntake]]:
    async with open_stand(database) as stand:
        yield stand, PaymentIntake(stand.database, stand.instruments)


async def test_a_payment_and_its_end_are_posted_once_however_often_they_are_told(
    alone: tuple[Stand, PaymentIntake],
) -> None:
    stand, intake = alone
    facts = [
        make_payment("refunded", event_id="evt_r1", amount_nanousd=2 * DOLLAR),
        make_payment("paid", event_id="evt_p1"),
        make_payment("paid", event_id="evt_p2"),
        make_payment("refunded", event_id="evt_r2", amount_nanousd=3 * DOLLAR),
        make_payment("disputed", event_id="evt_d", dispute_id="du_1"),
        make_payment("dispute_won", event_id="evt_w", dispute_id="du_1"),
    ]
    for _ in range(2):
        await intake.record(facts)
    await asyncio.gather(*(intake.record(facts) for _ in range(4)))
    assert await ledger_of(stand.admin) == [
        ("payment", 5 * DOLLAR),
        ("correction", -2 * DOLLAR),
        ("correction", -1 * DOLLAR),
        ("correction", -2 * DOLLAR),
        ("correction", 2 * DOLLAR),
    ]
    corrected = await stand.admin.fetch(
        "SELECT DISTINCT c.unique_key FROM billing.transactions t JOIN billing.transactions c ON c.transaction_id = t.corrects"
    )
    assert [row["unique_key"] for row in corrected] == ["payment:stripe:pi_1"]
    balance = await stand.admin.fetchval(
        "SELECT balance_nanousd FROM billing_api.balances_v1 WHERE team_id = 'team_a'"
    )
    assert balance == 2 * DOLLAR
    kinds = await stand.admin.fetchval(
        "SELECT kind FROM billing.accounts WHERE account_id = 'payments:stripe'"
    )
    assert kinds == "payments"


async def test_racing_words_of_one_payment_post_it_once(alone: tuple[Stand, PaymentIntake]) -> None:
    stand, intake = alone
    await asyncio.gather(*(intake.record([make_payment("paid", event_id=f"evt_{n}")]) for n in range(8)))
    assert await ledger_of(stand.admin) == [("payment", 5 * DOLLAR)]


@pytest.mark.parametrize(
    ("fact", "error"),
    [
        (make_payment("paid", event_id="evt_2", amount_nanousd=4 * DOLLAR), PaymentsDisagree),
        (make_payment("paid", event_id="evt_2", team_id="team_b"), PaymentsDisagree),
        (make_payment("refunded", event_id="evt_2", amount_nanousd=-1), BadPayment),
    ],
)
async def test_a_word_that_cannot_be_true_changes_nothing(
    alone: tuple[Stand, PaymentIntake], fact: Any, error: type[Exception]
) -> None:
    stand, intake = alone
    await intake.record([make_payment("paid", event_id="evt_1")])
    with pytest.raises(error):
        await intake.record([fact])
    assert await ledger_of(stand.admin) == [("payment", 5 * DOLLAR)]
    assert await stand.admin.fetchval("SELECT count(*) FROM billing.payment_events") == 1


# ---- from the page to the balance


@dataclass
class System:
    gateway: Gateway
    stand: Stand
    stripe: stripe.StripeClient
    provider_url: str

    async def deliver(self, body: bytes, header: str | None = None, **headers: str) -> Reply:
        sent = {"Content-Type": "application/json", **headers}
        sent["Stripe-Signature"] = sign(body, SECRET, int(time.time())) if header is None else header
        return await self.gateway.call("POST", "/webhooks/payments", body, key=None, headers=sent)


@asynccontextmanager
async def provider() -> AsyncIterator[tuple[str, LocalPayments]]:
    """The local stand-in on a port of its own."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        group = await stack.enter_async_context(asyncio.TaskGroup())
        payments = LocalPayments(API_KEY, SECRET, session, group)
        runner = web.AppRunner(payments.app())
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", payments
        for task in group._tasks.copy():
            task.cancel()


@pytest.fixture
async def system(database: str, vhost: Vhost, tmp_path: Path) -> AsyncIterator[System]:
    async with AsyncExitStack() as stack:
        url, payments = await stack.enter_async_context(provider())
        stand = await stack.enter_async_context(open_stand(database, priced=False))
        broker = await Broker.open(vhost.amqp_url, "billing-test", stack)
        await stack.enter_async_context(running_events(broker, stand))
        await stack.enter_async_context(running_commands(vhost, stand))
        gateway = await stack.enter_async_context(
            running_gateway(
                database, vhost.amqp_url, tmp_path, stand_ins=(topology.SCHEDULER_COMMANDS,),
                payments=await StripeApi.open(url, API_KEY, stack), webhook_secrets=(SECRET,),
            )
        )  # fmt: skip
        payments.webhook_url = f"{gateway.base}/webhooks/payments"
        client = stripe.StripeClient(API_KEY, base_addresses={"api": url})
        yield System(gateway, stand, client, url)


async def balance(system: System, key: str) -> str:
    return str((await system.gateway.call("GET", "/api/billing/account", key=key)).json["balance_usd"])


async def wait_for_balance(system: System, key: str, expected: str) -> None:
    async def there() -> bool:
        return await balance(system, key) == expected

    await until(there)


async def test_a_team_pays_is_refunded_and_disputes(system: System) -> None:
    key = await system.gateway.make_team("acme")
    # When it pays on the page that it was given
    made = await system.gateway.call("POST", "/api/billing/top_ups", {"amount_usd": "19.99"}, key=key)
    assert (made.status, made.json["amount_nanousd"]) == (201, 19_990_000_000), made.body
    page = made.json["url"]
    assert page.startswith(system.provider_url)
    async with system.gateway.session.get(page) as shown:
        assert "19.99 USD" in await shown.text()
    assert await balance(system, key) == "0.00"
    for _ in range(2):
        async with system.gateway.session.post(page, allow_redirects=False) as paid:
            assert (paid.status, paid.headers["Location"]) == (303, f"{system.gateway.base}/console")
    # Then it has it, once, though two events told so
    await wait_for_balance(system, key, "19.99")
    await until(lambda: _facts_are(system, 2))
    assert await ledger_of(system.stand.admin) == [("payment", 19_990_000_000)]

    # When a part is refunded, and the card's holder disputes the rest and loses it again
    intent = await system.stand.admin.fetchval("SELECT payment_id FROM billing.payment_events LIMIT 1")
    refund = await asyncio.to_thread(
        system.stripe.v1.refunds.create, {"payment_intent": intent, "amount": 500}
    )
    assert (refund.status, refund.amount) == ("succeeded", 500)
    await wait_for_balance(system, key, "14.99")
    dispute = await local(system, "/local/disputes", {"payment_intent": intent})
    await wait_for_balance(system, key, "0.00")
    await local(system, f"/local/disputes/{dispute['id']}/win", {})
    await wait_for_balance(system, key, "14.99")

    # Then each is a row, and the later ones name the payment
    listed = (await system.gateway.call("GET", "/api/billing/deposits", key=key)).json["data"]
    assert [(row["kind"], row["amount_usd"]) for row in listed] == [
        ("payment", "19.99"), ("correction", "-5.00"), ("correction", "-14.99"), ("correction", "14.99"),
    ]  # fmt: skip
    assert [row["corrects"] for row in listed] == [None] + [listed[0]["transaction_id"]] * 3


async def _facts_are(system: System, count: int) -> bool:
    return bool(await system.stand.admin.fetchval("SELECT count(*) = $1 FROM billing.payment_events", count))


async def local(system: System, path: str, form: dict[str, str]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with system.gateway.session.post(system.provider_url + path, data=form, headers=headers) as reply:
        assert reply.status == 200, await reply.text()
        document: dict[str, Any] = await reply.json()
        return document


async def test_stripe_s_own_package_can_use_the_stand_in(system: System) -> None:
    session = await asyncio.to_thread(
        system.stripe.v1.checkout.sessions.create,
        {
            "mode": "payment",
            "success_url": "http://localhost/back",
            "line_items": [
                {
                    "quantity": 1,
                    "price_data": {"currency": "usd", "unit_amount": 700, "product_data": {"name": "x"}},
                }
            ],
            "metadata": {TEAM_KEY: "team_a"},
        },
    )
    assert (session.amount_total, session.payment_status, session.currency) == (700, "unpaid", "usd")
    assert session.metadata is not None and session.metadata[TEAM_KEY] == "team_a"
    with pytest.raises(stripe.InvalidRequestError):
        await asyncio.to_thread(system.stripe.v1.refunds.create, {"payment_intent": "pi_none"})
    with pytest.raises(stripe.AuthenticationError):
        wrong = stripe.StripeClient("sk_wrong", base_addresses={"api": system.provider_url})
        await asyncio.to_thread(wrong.v1.refunds.create, {"payment_intent": "pi_none"})


# ---- the webhook under bad input


def paid_event(team_id: str, **change: Any) -> bytes:
    document = {
        "id": "pi_9",
        "amount_received": 500,
        "currency": "usd",
        "metadata": {TEAM_KEY: team_id},
    } | change
    event = {
        "id": "evt_9",
        "object": "event",
        "type": "payment_intent.succeeded",
        "data": {"object": document},
    }
    return json.dumps(event).encode()


async def team_id_of(system: System) -> str:
    await system.gateway.make_team("acme")
    return str(await system.stand.admin.fetchval("SELECT team_id FROM gateway.teams WHERE slug = 'acme'"))


async def test_a_replayed_webhook_changes_nothing(system: System) -> None:
    team_id = await team_id_of(system)
    body = paid_event(team_id)
    header = sign(body, SECRET, int(time.time()))
    for _ in range(4):
        reply = await system.deliver(body, header)
        assert (reply.status, reply.json) == (200, {"received": True})
    # The same event told again later, with a fresh signature, and the same payment under another event
    await system.deliver(body, sign(body, SECRET, int(time.time()) - 200))
    await system.deliver(body.replace(b"evt_9", b"evt_10"))
    await until(lambda: _facts_are(system, 2))
    assert await ledger_of(system.stand.admin) == [("payment", 5 * DOLLAR)]


@pytest.mark.parametrize("case", ["wrong", "old", "early", "none", "two", "changed", "garbage"])
async def test_a_wrongly_signed_webhook_is_refused_and_changes_nothing(system: System, case: str) -> None:
    body = paid_event(await team_id_of(system))
    now = int(time.time())
    header = {
        "wrong": sign(body, "whsec_other", now),
        "old": sign(body, SECRET, now - 400),
        "early": sign(body, SECRET, now + 400),
        "none": "",
        "two": sign(body, "a", now) + ",v1=" + "0" * 64,
        "changed": sign(body + b" ", SECRET, now),
        "garbage": "t=;v1=zzz",
    }[case]
    reply = await system.deliver(body, header)
    assert (reply.status, reply.code) == (400, "invalid_signature")
    await nothing_was_forwarded(system)


async def nothing_was_forwarded(system: System) -> None:
    """A fact that comes after all others was taken, and it is the only one."""
    marker = paid_event(str(await system.stand.admin.fetchval("SELECT team_id FROM gateway.teams LIMIT 1")))
    assert (
        await system.deliver(marker.replace(b"evt_9", b"evt_last").replace(b"pi_9", b"pi_last"))
    ).status == 200
    await until(lambda: _facts_are(system, 1))
    events = await system.stand.admin.fetch("SELECT event_id FROM billing.payment_events")
    assert [row["event_id"] for row in events] == ["evt_last"]


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"currency": "eur"}, (400, "unsupported_currency")),
        ({"amount_received": 5.5}, (400, "invalid_event")),
        ({"amount_received": -500}, (400, "invalid_event")),
        ({"amount_received": 0}, (400, "invalid_event")),
        ({"amount_received": 10**12}, (400, "invalid_event")),
        ({"id": "pi 9"}, (400, "invalid_event")),
    ],
)
async def test_a_signed_event_with_a_bad_amount_is_refused(
    system: System, change: dict[str, Any], refusal: tuple[int, str]
) -> None:
    reply = await system.deliver(paid_event(await team_id_of(system), **change))
    assert (reply.status, reply.code) == refusal
    await nothing_was_forwarded(system)


async def test_what_is_not_for_us_is_accepted_and_changes_nothing(system: System) -> None:
    team_id = await team_id_of(system)
    for body in (
        paid_event(team_id).replace(b"payment_intent.succeeded", b"customer.created"),
        paid_event(team_id, metadata={}),
        paid_event("team_of_nobody"),
    ):
        assert (await system.deliver(body)).status == 200
    await nothing_was_forwarded(system)


async def test_a_body_that_is_too_large_is_refused(system: System) -> None:
    await team_id_of(system)
    body = b'{"x": "' + b"x" * MAX_BODY_BYTES + b'"}'
    reply = await system.deliver(body)
    assert (reply.status, reply.code) == (413, "request_too_large")
    assert (await system.gateway.call("GET", "/webhooks/payments", key=None)).status == 405


@pytest.mark.parametrize(
    ("amount", "refusal"),
    [
        ("0.99", (400, "invalid_money")),
        ("0", (400, "invalid_money")),
        ("-5", (400, "invalid_money")),
        ("5.001", (400, "invalid_money")),
        ("100000.01", (400, "invalid_money")),
        ("1e2", (400, "invalid_money")),
        (5, (400, "invalid_type")),
        (None, (400, "missing_parameter")),
    ],
)
async def test_a_bad_top_up_is_refused(system: System, amount: Any, refusal: tuple[int, str]) -> None:
    key = await system.gateway.make_team("acme")
    body = {} if amount is None else {"amount_usd": amount}
    reply = await system.gateway.call("POST", "/api/billing/top_ups", body, key=key)
    assert (reply.status, reply.code) == refusal


async def test_without_a_provider_there_is_nothing_to_pay_at(
    database: str, vhost: Vhost, tmp_path: Path
) -> None:
    async with running_gateway(database, vhost.amqp_url, tmp_path) as gateway:
        key = await gateway.make_team("acme")
        reply = await gateway.call("POST", "/api/billing/top_ups", {"amount_usd": "5"}, key=key)
        assert (reply.status, reply.code) == (409, "payments_off")
        assert (await gateway.call("POST", "/webhooks/payments", {}, key=None)).status == 404


async def test_a_provider_that_is_away_is_said_so(database: str, vhost: Vhost, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        away = await StripeApi.open("http://127.0.0.1:9", API_KEY, stack)
        async with running_gateway(database, vhost.amqp_url, tmp_path, payments=away) as gateway:
            key = await gateway.make_team("acme")
            reply = await gateway.call("POST", "/api/billing/top_ups", {"amount_usd": "5"}, key=key)
            assert (reply.status, reply.code) == (503, "service_unavailable")


async def test_an_event_that_the_broker_did_not_take_is_not_acknowledged(
    database: str, vhost: Vhost, tmp_path: Path
) -> None:
    async with running_gateway(database, vhost.amqp_url, tmp_path, webhook_secrets=(SECRET,)) as gateway:
        await gateway.make_team("acme")
        body = paid_event(
            str(await gateway.sql.fetchval("SELECT team_id FROM gateway.teams WHERE slug = 'acme'"))
        )
        headers = {"Stripe-Signature": sign(body, SECRET, int(time.time()))}
        await gateway.broker.delete(topology.BILLING_EVENTS)
        reply = await gateway.call("POST", "/webhooks/payments", body, key=None, headers=headers)
        assert (reply.status, reply.code) == (503, "service_unavailable")


@pytest.mark.timeout(60)
async def test_the_stand_in_runs_as_the_process_that_make_up_starts(tmp_path: Path) -> None:
    ports = Ports(**{name: free_port() for name in PORT_NAMES})
    credentials = Credentials("pg", "redis", "rabbit", "COOKIE", "sk-rh-admin")
    (spec,) = payment_specs({}, {"PATH": os.environ["PATH"]}, ports, credentials)
    process = await asyncio.create_subprocess_exec(*spec.command, env=dict(spec.env), cwd=ROOT)
    try:
        async with AsyncExitStack() as stack:
            env = gateway_payments_env({}, ports, credentials)
            api = await StripeApi.open(env["PAYMENTS_API_URL"], env["PAYMENTS_API_KEY"], stack)

            async def answers() -> bool:
                try:
                    made = await api.create_checkout(
                        "team_a", 5 * DOLLAR, "http://localhost/console", "key_1"
                    )
                except Unavailable:
                    return False
                again = await api.create_checkout("team_a", 5 * DOLLAR, "http://localhost/console", "key_1")
                return made == again and made.url.startswith(env["PAYMENTS_API_URL"])

            await until(answers)
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) == 0
