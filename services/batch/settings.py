"""What the batch service reads from its environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    open_per_team: int = env("BATCH_OPEN_PER_TEAM", 50, low=1, high=10_000)
    """Batches of a team that are not over."""
