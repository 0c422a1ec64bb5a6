"""Where teams pay: a page of the payment provider's, made through its API. Stripe's, or what speaks like it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

import aiohttp
import structlog

from services.gateway.payments.stripe_events import CURRENCY, NANOUSD_PER_CENT, TEAM_KEY
from shared.outcomes import Unavailable

log = structlog.get_logger()

TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Checkout:
    """A page where a person pays."""

    checkout_id: str
    url: str


class PaymentProvider(Protocol):
    async def create_checkout(
        self, team_id: str, amount_nanousd: int, return_url: str, same_request: str
    ) -> Checkout:
        """Make a page for one payment of whole cents. The same `same_request` makes the same page.

        Raises `Unavailable` when the provider cannot be reached or refuses.
        """
        ...


class StripeApi:
    """Stripe's HTTP API, or the local stand-in: `services/billing/local_payments.py`."""

    def __init__(self, base_url: str, api_key: str, session: aiohttp.ClientSession) -> None:
        self._base_url = base_url.rstrip("/")
        self._api_key = api_key
        self._session = session

    @classmethod
    async def open(cls, base_url: str, api_key: str, stack: AsyncExitStack) -> StripeApi:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        return cls(base_url, api_key, await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout)))

    async def create_checkout(
        self, team_id: str, amount_nanousd: int, return_url: str, same_request: str
    ) -> Checkout:
        # The team stands in both: each of the two events that follow names it by itself.
        form = {
            "mode": "payment",
            "success_url": return_url,
            "cancel_url": return_url,
            "line_items[0][quantity]": "1",
            "line_items[0][price_data][currency]": CURRENCY,
            "line_items[0][price_data][unit_amount]": str(amount_nanousd // NANOUSD_PER_CENT),
            "line_items[0][price_data][product_data][name]": "Roundhouse credit",
            f"metadata[{TEAM_KEY}]": team_id,
            f"payment_intent_data[metadata][{TEAM_KEY}]": team_id,
        }
        headers = {"Authorization": f"Bearer {self._api_key}", "Idempotency-Key": same_request}
        try:
            async with self._session.post(
                f"{self._base_url}/v1/checkout/sessions", data=form, headers=headers, allow_redirects=False
            ) as reply:
                if reply.status != 200:
                    # What it says may quote the key, so it is not repeated.
                    log.error("payment_provider_refused", status=reply.status)
                    raise Unavailable(f"the payment provider answered {reply.status}")
                document = await reply.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise Unavailable(f"payment provider: {type(error).__name__}") from error
        if not isinstance(document, dict) or not all(isinstance(document.get(k), str) for k in ("id", "url")):
            raise Unavailable("the payment provider's answer has no page")
        return Checkout(document["id"], document["url"])
