"""`POST /webhooks/payments`: what the payment provider reports. Public, but signed; on its way to billing before it is
answered.

An answer of 2xx means that the broker has confirmed the fact, or that there was none in it. Any other makes the
provider send the event again, for days; billing knows each event by its id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog
from aiohttp import web

from services.gateway.edge import read_body
from services.gateway.management import schemas
from services.gateway.management.acting import answer
from services.gateway.payments.stripe_events import read_event
from services.gateway.routes import PUBLIC, RouteSpec
from services.gateway.store import Store
from shared.broker import Broker
from shared.inference.errors import ApiError
from shared.outcomes import PublishRefused, PublishUnknown, Unavailable, Unroutable
from shared.stripe_signature import HEADER, signature_refusal

log = structlog.get_logger()

MAX_BODY_BYTES = 256 * 1024
"""Stripe's events have some kilobytes."""
RETRY_S = 5


class PaymentWebhook:
    def __init__(
        self,
        store: Store,
        broker: Broker,
        secrets: Sequence[str],
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._broker = broker
        self._secrets = secrets
        self._now_unix_s = now_unix_s

    def routes(self) -> list[RouteSpec]:
        return [
            RouteSpec(
                method="POST",
                path="/webhooks/payments",
                handler=self.receive,
                scope=PUBLIC,
                summary="An event of the payment provider's, signed by it (Stripe-Signature)",
                error_shape="problem",
                request_schema={"type": "object"},
                responses={200: schemas.obj(received=schemas.FLAG)},
                tag="billing",
            )
        ]

    async def receive(self, request: web.Request) -> web.Response:
        """Check the signature before anything is read out of the body."""
        body = await read_body(request)
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, "request_too_large", f"The body is over {MAX_BODY_BYTES} bytes.")
        if len(request.headers.getall(HEADER, ())) > 1:
            raise ApiError(400, "invalid_signature", "The signature is given more than once.")
        refusal = signature_refusal(body, request.headers.get(HEADER), self._secrets, int(self._now_unix_s()))
        if refusal is not None:
            log.warning("payment_webhook_refused", reason=refusal)
            raise ApiError(400, "invalid_signature", f"{refusal.capitalize()}.")
        fact = read_event(body)
        if fact is None:
            return answer({"received": True})
        if fact.team_id is not None and await self._store.team(fact.team_id) is None:
            # Signed by the provider, so somebody made it with our metadata and a team of another installation.
            log.error("payment_of_unknown_team", event_id=fact.event_id, team_id=fact.team_id)
            return answer({"received": True})
        try:
            await self._broker.publish_event(fact)
        except (PublishRefused, PublishUnknown, Unroutable, Unavailable) as error:
            log.warning("payment_not_forwarded", event_id=fact.event_id, error=str(error))
            raise ApiError(
                503, "service_unavailable", "A part of the service is away.", retry_after_s=RETRY_S
            ) from error
        log.info("payment_reported", event_id=fact.event_id, what=fact.what, payment_id=fact.payment_id)
        return answer({"received": True})
