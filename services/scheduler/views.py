"""What the decisions look at, as plain values. A view is stored with each decision, so that it can be replayed.

All times are Unix seconds on the database's clock. The reports of nodes and workers are already joined to the places
they are about, so a decision needs nothing else.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from services.scheduler.load_meter import Measured
from services.scheduler.quotas import QuotaRoom
from services.scheduler.scaling_policy import TUNING, Load, ScalingMemory, Tuning
from services.scheduler.scaling_settings import Bounds
from services.scheduler.states import PlaceState, ResourceState
from shared.messages import ScalingWindow


class Limits(Struct, frozen=True, kw_only=True):
    """Times and counts that decisions go by."""

    node_fresh_s: float = 5.0
    """Five missed reports of a node agent: no new worker is placed there."""
    lost_after_s: float = 8.0
    start_timeout_s: float = 180.0
    start_resend_s: float = 3.0
    stop_resend_s: float = 10.0
    drain_grace_s: float = 900.0
    start_grace_s: float = 10.0
    """For a worker that was never ready: it has no job to finish."""
    backoff_first_s: float = 2.0
    backoff_longest_s: float = 300.0
    exit_pause_s: float = 0.2
    """Between the end of a worker that had been ready and the next start."""
    failures_until_failed: int = 5
    prove_every_s: float = 2.0
    """A crash of the scheduler leaves at most this much of live time to be proved by the next report."""
    interval_gap_s: float = 30.0
    """A longer silence between two reports is not billed: the interval ends before it."""
    usual_start_cpu_s: float = 20.0
    usual_start_cuda_s: float = 60.0
    scaling: Tuning = TUNING


class ProcessSeen(Struct, frozen=True, kw_only=True):
    """What the node's latest report says of an incarnation. `absent`: the node does not know it."""

    state: Literal["absent", "running", "exited"]
    device: str = ""
    reason: str = ""
    exit_code: int | None = None


class WorkerSeen(Struct, frozen=True, kw_only=True):
    """A worker's latest report."""

    phase: str
    heard_at: float
    jobs: int = 0
    running_jobs: int = 0
    hot_models: int = 0
    detail: str = ""


class PlaceView(Struct, frozen=True, kw_only=True):
    """One taken seat with all that is known of its worker."""

    place: int
    state: PlaceState
    incarnation: str
    worker_id: str
    node_id: str
    device: str
    granted_at: float
    phase: str = "placing"
    start_attempt: int = 1
    ready_at: float | None = None
    reported_at: float | None = None
    """As stored; the worker's latest report may be newer."""
    drain_sent_at: float | None = None
    given_up: bool = False
    proved_until: float | None = None
    """Of its open interval; None without one."""
    node_heard_at: float | None = None
    process: ProcessSeen | None = None
    """None while nothing has been heard from the node."""
    worker: WorkerSeen | None = None
    start_sent_at: float | None = None
    stop_sent_at: float | None = None


class FreeDevice(Struct, frozen=True):
    node_id: str
    device: str
    kind: str


class Scaling(Struct, frozen=True, kw_only=True):
    """Settings that are not simply a fixed number."""

    version: int
    min_count: int
    max_count: int
    idle_timeout_s: float
    target_wait_s: float = 10.0
    windows: list[ScalingWindow] = []
    noted: Bounds | None = None
    """What was in force when windows were last looked at; None without windows."""
    load: Load = Load()
    measured: Measured | None = None
    memory: ScalingMemory = ScalingMemory(wanted=0, busy_at=0.0)
    noted_at: float = 0.0
    """When the count and its reason were last stored."""
    recorded_at: float = 0.0
    """When they were last stored with all that they were decided from."""


class ResourceView(Struct, frozen=True, kw_only=True):
    """One resource with its places and the devices that it could get."""

    now: float
    limits: Limits
    resource_id: str
    team_id: str
    option_id: str
    device_kind: str
    hourly_rate_nanousd: int
    max_batch: int = 1
    wanted: Literal["on", "off"]
    fixed_count: int
    """In force while `scaling` is None."""
    state: ResourceState
    pool: bool = False
    reason: str = ""
    expected_live_at: float | None = None
    failures: int = 0
    """Failed starts in a row, since the last success and the last time it was turned on."""
    last_failure_at: float | None = None
    last_failure: str = ""
    last_exit_at: float | None = None
    """When a worker that had been ready was seen gone without having been asked to leave."""
    usual_start_s: float | None = None
    """Median of the option's latest successful starts."""
    places: list[PlaceView] = []
    free_devices: list[FreeDevice] = []
    scaling: Scaling | None = None
    quota: QuotaRoom | None = None
    is_capped: bool = False
    """Whether a budget whose spending stops more GPUs is used up."""
    observing_since: float | None = None
    """Since when reports could be received without a break; None while the broker is away."""
