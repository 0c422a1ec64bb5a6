"""A payment provider for one machine: `python -m services.billing.local_payments`. Takes no money.

It speaks the part of Stripe's API that the platform uses, shows a page with a button instead of a card's form, and sends
the same events, signed in the same way. What it knows is in memory: it is for trying things out and for tests.
"""

from __future__ import annotations

import asyncio
import hmac
import html
import json
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import structlog
from aiohttp import web

from services.billing.settings import LocalPaymentsSettings
from shared.runtime import Lifetime, run
from shared.stripe_signature import HEADER, sign

log = structlog.get_logger()

MAX_CHECKOUTS = 1000
MAX_BODY_BYTES = 64 * 1024
DELIVERY_TIMEOUT_S = 10
RETRIES_S = (1, 2, 4, 8, 16, 30, 60, 60, 60, 60)
"""Pauses before an event is sent again; Stripe goes on for days."""
MAX_CENTS = 99_999_999
"""As at Stripe."""


@dataclass
class Checkout:
    """One page, and what became of it."""

    checkout_id: str
    cents: int
    return_url: str
    metadata: dict[str, str]
    intent_metadata: dict[str, str]
    intent_id: str = ""
    refunded_cents: int = 0
    disputes: dict[str, int] = field(default_factory=dict)

    @property
    def paid(self) -> bool:
        return self.intent_id != ""


class LocalPayments:
    """The provider's API, its page, and its webhooks."""

    def __init__(
        self, api_key: str, secret: str, session: aiohttp.ClientSession, group: asyncio.TaskGroup
    ) -> None:
        self._api_key = api_key
        self._secret = secret
        self.webhook_url = ""
        """Where events go; set once, before the first payment."""
        self._session = session
        self._group = group
        self._checkouts: OrderedDict[str, Checkout] = OrderedDict()
        self._by_key: OrderedDict[str, str] = OrderedDict()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.post("/v1/checkout/sessions", self.create_checkout),
                web.post("/v1/refunds", self.refund),
                web.post("/local/disputes", self.dispute),
                web.post("/local/disputes/{dispute_id}/win", self.win),
                web.get("/pay/{checkout_id}", self.show),
                web.post("/pay/{checkout_id}", self.pay),
            ]
        )
        return app

    # ---- the API

    async def create_checkout(self, request: web.Request) -> web.Response:
        form = await self._form(request)
        key = request.headers.get("Idempotency-Key", "")
        if key and key in self._by_key:
            return web.json_response(self._session_json(request, self._checkouts[self._by_key[key]]))
        cents_text = form.get("line_items[0][price_data][unit_amount]", "")
        currency = form.get("line_items[0][price_data][currency]", "")
        return_url = form.get("success_url", "")
        if (
            form.get("mode") != "payment"
            or currency != "usd"
            or not return_url.startswith(("http://", "https://"))
        ):
            raise _refusal("mode, currency or success_url is not as it must be")
        if (
            not cents_text.isascii()
            or not cents_text.isdigit()
            or not 50 <= int(cents_text[:12]) <= MAX_CENTS
        ):
            raise _refusal("unit_amount is out of range")
        checkout = Checkout(
            checkout_id="cs_local_" + secrets.token_hex(12),
            cents=int(cents_text),
            return_url=return_url,
            metadata=_metadata(form, "metadata"),
            intent_metadata=_metadata(form, "payment_intent_data[metadata]"),
        )
        self._checkouts[checkout.checkout_id] = checkout
        if key:
            self._by_key[key] = checkout.checkout_id
        while len(self._checkouts) > MAX_CHECKOUTS:
            oldest, _ = self._checkouts.popitem(last=False)
            self._by_key = OrderedDict((k, v) for k, v in self._by_key.items() if v != oldest)
        return web.json_response(self._session_json(request, checkout))

    async def refund(self, request: web.Request) -> web.Response:
        form = await self._form(request)
        checkout = self._paid(form.get("payment_intent", ""))
        left = checkout.cents - checkout.refunded_cents
        text = form.get("amount", str(left))
        if not text.isascii() or not text.isdigit() or not 0 < int(text[:12]) <= left:
            raise _refusal("amount is more than is left of the payment")
        checkout.refunded_cents += int(text)
        charge = self._charge_json(checkout)
        self._send("charge.refunded", charge)
        return web.json_response(
            {"id": "re_local_" + secrets.token_hex(12), "object": "refund", "amount": int(text), "currency": "usd",
             "payment_intent": checkout.intent_id, "charge": charge["id"], "status": "succeeded"}
        )  # fmt: skip

    async def dispute(self, request: web.Request) -> web.Response:
        """What a card holder's bank does; Stripe has no call for it."""
        form = await self._form(request)
        checkout = self._paid(form.get("payment_intent", ""))
        dispute_id = "du_local_" + secrets.token_hex(12)
        checkout.disputes[dispute_id] = checkout.cents
        document = self._dispute_json(checkout, dispute_id, "needs_response")
        self._send("charge.dispute.created", document)
        return web.json_response(document)

    async def win(self, request: web.Request) -> web.Response:
        await self._form(request)
        dispute_id = request.match_info["dispute_id"]
        checkout = next((each for each in self._checkouts.values() if dispute_id in each.disputes), None)
        if checkout is None:
            raise _refusal("there is no such dispute")
        document = self._dispute_json(checkout, dispute_id, "won")
        self._send("charge.dispute.closed", document)
        return web.json_response(document)

    async def _form(self, request: web.Request) -> dict[str, str]:
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._api_key}".encode()):
            raise web.HTTPUnauthorized(
                text=json.dumps({"error": {"type": "invalid_request_error", "message": "Invalid API Key"}}),
                content_type="application/json",
            )
        return {name: value for name, value in (await request.post()).items() if isinstance(value, str)}

    def _paid(self, intent_id: str) -> Checkout:
        for checkout in self._checkouts.values():
            if checkout.paid and checkout.intent_id == intent_id:
                return checkout
        raise _refusal("there is no such payment")

    # ---- the page

    async def show(self, request: web.Request) -> web.Response:
        checkout = self._checkout(request)
        dollars, cents = divmod(checkout.cents, 100)
        button = "<p>Paid.</p>" if checkout.paid else '<form method="post"><button>Pay</button></form>'
        back = html.escape(checkout.return_url, quote=True)
        page = (
            "<!doctype html><title>Payment</title><h1>Local payments: no money is taken</h1>"
            f'<p>{dollars}.{cents:02d} USD</p>{button}<p><a href="{back}">Back</a></p>'
        )
        return web.Response(text=page, content_type="text/html")

    async def pay(self, request: web.Request) -> web.Response:
        checkout = self._checkout(request)
        if not checkout.paid:
            checkout.intent_id = "pi_local_" + secrets.token_hex(12)
            # Stripe keeps no order either.
            self._send("payment_intent.succeeded", self._intent_json(checkout))
            self._send("checkout.session.completed", self._session_json(request, checkout))
        raise web.HTTPSeeOther(checkout.return_url)

    def _checkout(self, request: web.Request) -> Checkout:
        checkout = self._checkouts.get(request.match_info["checkout_id"])
        if checkout is None:
            raise web.HTTPNotFound
        return checkout

    # ---- documents as Stripe shapes them

    def _session_json(self, request: web.Request, checkout: Checkout) -> dict[str, Any]:
        return {
            "id": checkout.checkout_id, "object": "checkout.session", "amount_total": checkout.cents,
            "currency": "usd", "metadata": checkout.metadata, "mode": "payment",
            "payment_intent": checkout.intent_id or None,
            "payment_status": "paid" if checkout.paid else "unpaid",
            "status": "complete" if checkout.paid else "open",
            "success_url": checkout.return_url,
            "url": None if checkout.paid else f"{request.url.origin()}/pay/{checkout.checkout_id}",
        }  # fmt: skip

    def _intent_json(self, checkout: Checkout) -> dict[str, Any]:
        return {
            "id": checkout.intent_id, "object": "payment_intent", "amount": checkout.cents,
            "amount_received": checkout.cents, "currency": "usd", "metadata": checkout.intent_metadata,
            "status": "succeeded",
        }  # fmt: skip

    def _charge_json(self, checkout: Checkout) -> dict[str, Any]:
        return {
            "id": "ch_local_" + checkout.intent_id[-24:], "object": "charge", "amount": checkout.cents,
            "amount_refunded": checkout.refunded_cents, "currency": "usd", "metadata": checkout.intent_metadata,
            "payment_intent": checkout.intent_id, "refunded": checkout.refunded_cents == checkout.cents,
        }  # fmt: skip

    def _dispute_json(self, checkout: Checkout, dispute_id: str, status: str) -> dict[str, Any]:
        return {
            "id": dispute_id, "object": "dispute", "amount": checkout.disputes[dispute_id], "currency": "usd",
            "charge": "ch_local_" + checkout.intent_id[-24:], "payment_intent": checkout.intent_id,
            "reason": "fraudulent", "status": status,
        }  # fmt: skip

    # ---- webhooks

    def _send(self, kind: str, document: dict[str, Any]) -> None:
        event = {
            "id": "evt_local_" + secrets.token_hex(12), "object": "event", "type": kind, "created": time.time_ns() // 10**9,
            "livemode": False, "data": {"object": document},
        }  # fmt: skip
        self._group.create_task(self._deliver(json.dumps(event).encode(), kind))

    async def _deliver(self, body: bytes, kind: str) -> None:
        """Until it is taken, or given up; each time with a fresh signature."""
        for pause_s in (0, *RETRIES_S):
            await asyncio.sleep(pause_s)
            headers = {
                HEADER: sign(body, self._secret, time.time_ns() // 10**9),
                "Content-Type": "application/json",
            }
            try:
                async with self._session.post(self.webhook_url, data=body, headers=headers) as reply:
                    status = reply.status
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("webhook_not_delivered", type=kind, error=type(error).__name__)
                continue
            if status < 300:
                log.info("webhook_delivered", type=kind)
                return
            log.warning("webhook_refused", type=kind, status=status)
        log.error("webhook_given_up", type=kind)


def _metadata(form: dict[str, str], prefix: str) -> dict[str, str]:
    start = f"{prefix}["
    return {name[len(start) : -1]: value for name, value in form.items() if name.startswith(start)}


def _refusal(message: str) -> web.HTTPBadRequest:
    document = {"error": {"type": "invalid_request_error", "message": message}}
    return web.HTTPBadRequest(text=json.dumps(document), content_type="application/json")


async def serve(settings: LocalPaymentsSettings, life: Lifetime) -> None:
    session = await life.stack.enter_async_context(
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DELIVERY_TIMEOUT_S))
    )
    payments = LocalPayments(settings.api_key, settings.webhook_secret, session, life.group)
    payments.webhook_url = settings.webhook_url
    runner = web.AppRunner(payments.app(), access_log=None)
    await runner.setup()
    life.stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, settings.http_host, settings.http_port).start()
    life.started()
    await life.stopping.wait()


if __name__ == "__main__":
    run("local-payments", LocalPaymentsSettings, serve)
