"""What the billing service reads from its environment."""

from __future__ import annotations

from dataclasses import dataclass

from shared.settings import CommonSettings, env


@dataclass(frozen=True, kw_only=True)
class BillingSettings(CommonSettings):
    database_url: str = env("DATABASE_URL", secret=True)
    minutes_interval_s: float = env("BILLING_MINUTES_INTERVAL_S", 20.0, low=0.1, high=60.0)
    """At most a minute, so that a balance is never more than a minute or so old."""
    minutes_lookback_h: int = env("BILLING_MINUTES_LOOKBACK_H", 720, low=3, high=24 * 366)
    """How far back the first pass after a long outage looks for unposted minutes."""
    budgets_interval_s: float = env("BILLING_BUDGETS_INTERVAL_S", 2.0, low=0.1, high=60.0)
    """Between two looks at all budgets: who is to be told, what is to be turned off."""
    leases_interval_s: float = env("BILLING_LEASES_INTERVAL_S", 5.0, low=0.1, high=30.0)
    """Between two looks for slices of budgets that are lost."""
    sweep_interval_s: float = env("BILLING_SWEEP_INTERVAL_S", 30.0, low=0.1, high=3600.0)
    """Between two rounds of: charge what had no price, check the ledger, delete old requests."""
    metrics_interval_s: float = env("BILLING_METRICS_INTERVAL_S", 10.0, low=0.1, high=3600.0)
    """How late metrics are, at most, beside the requests themselves."""
    advice_interval_s: float = env("BILLING_ADVICE_INTERVAL_S", 3600.0, low=0.1, high=86400.0)
    request_retention_days: int = env("BILLING_REQUEST_RETENTION_DAYS", 30, low=1, high=3660)


@dataclass(frozen=True, kw_only=True)
class LocalPaymentsSettings(CommonSettings):
    """What the local payment provider needs; it uses neither a database nor a broker."""

    amqp_url: str = env("AMQP_URL", "", secret=True)
    http_host: str = env("LOCAL_PAYMENTS_HOST", "127.0.0.1")
    http_port: int = env("LOCAL_PAYMENTS_PORT", low=0, high=65535)
    api_key: str = env("PAYMENTS_API_KEY", secret=True)
    webhook_secret: str = env("PAYMENTS_WEBHOOK_SECRETS", secret=True)
    webhook_url: str = env("PAYMENTS_WEBHOOK_URL")


@dataclass(frozen=True, kw_only=True)
class PriceListSettings:
    """What `price_list` needs."""

    database_url: str = env("DATABASE_URL", secret=True)
