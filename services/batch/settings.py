"""What the batch service reads from its environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared import topology
from shared.settings import CommonSettings, env


@dataclass(frozen=True, kw_only=True)
class BatchSettings(CommonSettings):
    database_url: str = env("DATABASE_URL", secret=True)
    model_store: Path = env("ROUNDHOUSE_MODEL_STORE")  # noqa: RUF009 (env makes a field)
    file_store: str = env("ROUNDHOUSE_FILE_STORE")
    """A folder, or `s3://bucket/prefix`."""
    lease_s: float = env("ROUNDHOUSE_LEASE_S", 5.0, low=1.0, high=60.0)
    in_flight: int = env("BATCH_IN_FLIGHT", 256, low=1, high=10_000)
    """Lines of one resource that are with the broker or a worker at once: the bound of unfairness between teams, and of
    what is done again when this service dies. Enough to keep the workers' batches full."""
    capped_line_s: int = env("BATCH_CAPPED_LINE_S", 3600, low=1, high=86_000)
    """So long a line under a hard cap may be out; then it waits again. The bound of how long a slice of a cap stays reserved
    that a killed batch service held: billing lets go of it when no line of it can run any more."""
    open_per_team: int = env("BATCH_OPEN_PER_TEAM", 50, low=1, high=10_000)
    """Batches of a team that are not over."""
    amqp_management_url: str | None = env("AMQP_MANAGEMENT_URL", None, secret=True)
    """The broker's management API, with an administrator's user: who makes users for teams. Without it no batch comes
    through the queue."""
    queue_lines_per_team: int = env("BATCH_QUEUE_LINES_PER_TEAM", 50_000, low=1, high=10_000_000)
    """Lines of a team that came through the queue and are not over."""
    queue_bytes_per_team: int = env("BATCH_QUEUE_BYTES_PER_TEAM", 200 * 1024**2, low=1, high=2**40)
    teams_vhost: str = env("TEAMS_VHOST", topology.TEAMS_VHOST)
