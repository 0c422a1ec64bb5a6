"""What `reconcile` can decide: one value for each thing to be done, complete enough to be done without asking again."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.crowds import SeenCrowds
from services.scheduler.load_meter import Measured
from services.scheduler.scaling_policy import ScalingMemory
from services.scheduler.scaling_settings import Bounds
from services.scheduler.states import PlaceState, ResourceState


@dataclass(frozen=True, slots=True)
class GrantPlace:
    """Take a free seat for a new worker on this device."""

    place: int
    node_id: str
    device: str
    start_attempt: int
    words: str


@dataclass(frozen=True, slots=True)
class SendStart:
    """Tell the node (again) to start the worker."""

    place: int
    incarnation: str


@dataclass(frozen=True, slots=True)
class SendStop:
    """Tell the node to stop the process: SIGTERM now, SIGKILL after the grace. `drain`: tell the worker too."""

    node_id: str
    incarnation: str
    grace_s: float
    worker_id: str = ""
    drain: bool = False


@dataclass(frozen=True, slots=True)
class NotePlace:
    """Keep what was reported: for display, no decision hangs on it."""

    incarnation: str
    phase: str
    device: str
    reported_at: float | None


@dataclass(frozen=True, slots=True)
class MarkReady:
    """The worker can serve. A new one counts as a successful start; its interval begins."""

    place: int
    incarnation: str
    at: float
    started: bool
    words: str


@dataclass(frozen=True, slots=True)
class ProveInterval:
    incarnation: str
    until: float


@dataclass(frozen=True, slots=True)
class EndInterval:
    incarnation: str
    until: float


@dataclass(frozen=True, slots=True)
class BeginInterval:
    """A replica that is live without an interval: begin one at its report."""

    place: int
    incarnation: str
    at: float


@dataclass(frozen=True, slots=True)
class MovePlace:
    """Change the state of a place: drain it, call it lost, or take a drain back."""

    place: int
    incarnation: str
    came_from: PlaceState
    to: PlaceState
    action: str
    words: str


@dataclass(frozen=True, slots=True)
class GiveUpStart:
    """Record the start as failed and drain the place."""

    place: int
    incarnation: str
    words: str


@dataclass(frozen=True, slots=True)
class FreePlace:
    """The node has confirmed that the process is gone. `failed_start`: what to record of a start that came to nothing.

    unexpected: it had been ready and was not asked to leave. cut_jobs: what ran on it when it was killed in its drain.
    """

    place: int
    incarnation: str
    failed_start: str | None
    unexpected: bool
    words: str
    cut_jobs: int = 0


@dataclass(frozen=True, slots=True)
class SetBounds:
    """A window of the scaling settings opened or ended, or it was time to look for the next. words: empty if nothing
    changed but the time."""

    version: int
    bounds: Bounds
    words: str


@dataclass(frozen=True, slots=True)
class NoteScaling:
    """How many workers autoscaling wants now. Remembered by the leader at each look.

    note: stored too, for display and for the next leader; record: with all that it was decided from.
    """

    memory: ScalingMemory
    measured: Measured | None
    crowds: SeenCrowds | None
    words: str
    note: bool
    record: bool


@dataclass(frozen=True, slots=True)
class SetResource:
    state: ResourceState
    reason: str
    expected_live_at: float | None


Action = (
    GrantPlace
    | SendStart
    | SendStop
    | NotePlace
    | MarkReady
    | ProveInterval
    | EndInterval
    | BeginInterval
    | MovePlace
    | GiveUpStart
    | FreePlace
    | SetBounds
    | NoteScaling
    | SetResource
)
