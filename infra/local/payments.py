"""Where teams pay on this machine: a real provider if the environment names its key, else the local stand-in."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

from infra.local.credentials import Credentials
from infra.local.ports import Ports
from infra.local.probes import HttpProbe
from infra.local.process_spec import ProcessSpec

NAME = "payments"


def names_a_provider(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("PAYMENTS_API_KEY"))


def gateway_payments_env(
    environ: Mapping[str, str], ports: Ports, credentials: Credentials
) -> dict[str, str]:
    """What the gateway is told of payments. The keys of a real provider reach no other process."""
    if names_a_provider(environ):
        return {name: value for name, value in environ.items() if name.startswith("PAYMENTS_")}
    return {
        "PAYMENTS_API_URL": f"http://127.0.0.1:{ports.payments_http}",
        "PAYMENTS_API_KEY": _secret(credentials, "sk_local_"),
        "PAYMENTS_WEBHOOK_SECRETS": _secret(credentials, "whsec_"),
    }


def payment_specs(
    environ: Mapping[str, str], common: Mapping[str, str], ports: Ports, credentials: Credentials
) -> list[ProcessSpec]:
    """The local provider, if it is needed. It stands outside: nothing waits for it, and it waits for nothing."""
    if names_a_provider(environ):
        return []
    return [
        ProcessSpec(
            name=NAME,
            command=(sys.executable, "-m", "services.billing.local_payments"),
            env={
                **common,
                **gateway_payments_env(environ, ports, credentials),
                "LOCAL_PAYMENTS_PORT": str(ports.payments_http),
                "PAYMENTS_WEBHOOK_URL": f"http://127.0.0.1:{ports.gateway_http}/webhooks/payments",
                "OPS_PORT": str(ports.payments_ops),
            },
            ready=HttpProbe(f"http://127.0.0.1:{ports.payments_ops}/readyz"),
        )
    ]


def _secret(credentials: Credentials, prefix: str) -> str:
    """Made of the platform's key, so that clones that were set up before have one too; it tells nothing of that key."""
    return prefix + hashlib.sha256(f"{prefix}{credentials.admin_key}".encode()).hexdigest()
