"""The scheduler's settings. Every time-out of a decision is here, with its reason."""

from __future__ import annotations

import dataclasses

from services.scheduler.scaling_policy import TUNING, Tuning
from services.scheduler.views import Limits
from shared.settings import CommonSettings, SettingsError, env


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerSettings(CommonSettings):
    database_url: str = env("DATABASE_URL", secret=True)
    lease_s: float = env("ROUNDHOUSE_LEASE_S", 5.0, low=1.0, high=60.0)
    """How long a leader that fell silent is waited for."""
    tick_s: float = env("ROUNDHOUSE_SCHEDULER_TICK_S", 1.0, low=0.05, high=10.0)
    """Between two looks when no event wakes the reconciler earlier."""
    start_timeout_s: float = env("ROUNDHOUSE_START_TIMEOUT_S", 180.0, low=1.0, high=3600.0)
    """A large model on a cold disk takes minutes; a worker that takes longer is given up."""
    lost_after_s: float = env("ROUNDHOUSE_LOST_AFTER_S", 8.0, low=2.0, high=300.0)
    """Eight missed reports: longer than a loaded host stalls a process, shorter than a client waits."""
    scale_down_s: float = env("ROUNDHOUSE_SCALE_DOWN_S", TUNING.down_window_s, low=1.0, high=3600.0)
    """Autoscaling goes down to the highest need of so long, and forgets crowds with a time constant three times as long."""
    crowd_share: float = env("ROUNDHOUSE_CROWD_SHARE", TUNING.crowd_share, low=0.001, high=1.0)
    """What a GPU that is kept for crowds has to be worth: the share of an hour's requests that would have waited too long without it."""
    drain_grace_s: float = env("ROUNDHOUSE_DRAIN_GRACE_S", 900.0, low=1.0, high=7200.0)
    """A drain cuts no job, so this is longer than any job's deadline."""

    def __post_init__(self) -> None:
        if self.tick_s * 2 > self.lease_s:
            raise SettingsError("ROUNDHOUSE_SCHEDULER_TICK_S must be at most half of ROUNDHOUSE_LEASE_S")

    @property
    def limits(self) -> Limits:
        return Limits(
            start_timeout_s=self.start_timeout_s,
            lost_after_s=self.lost_after_s,
            drain_grace_s=self.drain_grace_s,
            scaling=Tuning(down_window_s=self.scale_down_s, crowd_share=self.crowd_share),
        )
