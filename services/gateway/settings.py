"""The gateway's environment, as values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from shared import topology
from shared.amqp_url import in_vhost, without_user
from shared.settings import CommonSettings, env


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatewaySettings(CommonSettings):
    database_url: str = env("DATABASE_URL", secret=True)
    redis_url: str = env("REDIS_URL", secret=True)
    admin_key: str = env("ROUNDHOUSE_ADMIN_KEY", secret=True)
    model_store: Path = env("ROUNDHOUSE_MODEL_STORE")  # noqa: RUF009 (env makes a field)
    model_import_dir: Path = env("ROUNDHOUSE_MODEL_IMPORT_DIR")  # noqa: RUF009
    file_store: str = env("ROUNDHOUSE_FILE_STORE")
    """Where files of teams lie: a folder, or `s3://bucket/prefix`."""
    http_host: str = env("HTTP_HOST", "127.0.0.1")
    http_port: int = env("HTTP_PORT", 8080, low=0, high=65535)
    public_url: str | None = env("PUBLIC_URL", None)
    """What clients type; without it, URLs in answers repeat the Host that the client used."""
    allowed_hosts: str = env("ALLOWED_HOSTS", "")
    """Comma-separated host names that requests may be for; empty accepts any."""

    teams_vhost: str = env("TEAMS_VHOST", topology.TEAMS_VHOST)
    teams_amqp_address: str | None = env("TEAMS_AMQP_ADDRESS", None)
    """Where teams reach the broker, such as `amqps://queue.example.com:5671`; without it AMQP_URL's host and port."""

    payments_api_url: str = env("PAYMENTS_API_URL", "https://api.stripe.com")
    payments_api_key: str | None = env("PAYMENTS_API_KEY", None, secret=True)
    """The payment provider's secret key; without it teams cannot pay here."""
    payments_webhook_secrets: str = env("PAYMENTS_WEBHOOK_SECRETS", "", secret=True)
    """Comma-separated: two while one is being changed. Without any, webhooks are not taken."""

    max_body_bytes: int = env("MAX_BODY_BYTES", 1024 * 1024, low=1024, high=64 * 1024 * 1024)
    max_connections_per_ip: int = env("MAX_CONNECTIONS_PER_IP", 2048, low=1, high=1_000_000)
    team_upload_bytes: int = env("TEAM_UPLOAD_BYTES", 300 * 1024**3, low=1, high=2**50)
    """Of all models that a team has uploaded and not registered yet; a file counts from its beginning on."""
    team_open_uploads: int = env("TEAM_OPEN_UPLOADS", 8, low=1, high=10_000)
    upload_expiry_s: float = env("UPLOAD_EXPIRY_S", 24 * 3600.0, low=60.0, high=30 * 24 * 3600.0)
    """How long an upload is kept after its latest file."""
    uploads_at_once: int = env("UPLOADS_AT_ONCE", 16, low=1, high=1000)
    """Files on their way to one gateway."""
    hub_enabled: bool = env("ROUNDHOUSE_HUB_ENABLED", False)
    """Whether models may be fetched from a hub, by its own library; naming a hub turns it on as well."""
    hub_url: str | None = env("ROUNDHOUSE_HUB_URL", None)
    """Another hub than the library's own."""
    team_requests_per_s: float = env("TEAM_REQUESTS_PER_S", 200.0, low=0.01, high=1e6)
    team_burst: int = env("TEAM_BURST", 400, low=1, high=1_000_000)
    team_in_flight: int = env("TEAM_IN_FLIGHT", 512, low=1, high=1_000_000)
    gateway_in_flight: int = env("GATEWAY_IN_FLIGHT", 2048, low=1, high=1_000_000)

    @property
    def teams_amqp_url(self) -> str:
        """The teams' vhost as they reach it, without a user."""
        return in_vhost(without_user(self.teams_amqp_address or self.amqp_url), self.teams_vhost)

    @property
    def webhook_secrets(self) -> tuple[str, ...]:
        return tuple(each.strip() for each in self.payments_webhook_secrets.split(",") if each.strip())

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset(name.strip().lower() for name in self.allowed_hosts.split(",") if name.strip())
