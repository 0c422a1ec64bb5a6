"""Pure: join what is stored with what was heard into one view per resource, and decide about all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import Struct
from msgspec.structs import replace

from services.scheduler.actions import Action, GrantPlace, SendStop
from services.scheduler.crowds import SeenCrowds
from services.scheduler.load_meter import Measured
from services.scheduler.quotas import QuotaBook
from services.scheduler.reconcile import reconcile
from services.scheduler.scaling_policy import Load, ScalingMemory
from services.scheduler.scaling_settings import Bounds
from services.scheduler.states import PlaceState, ResourceState
from services.scheduler.views import (
    FreeDevice,
    Limits,
    PlaceView,
    ProcessSeen,
    ResourceView,
    Scaling,
    WorkerSeen,
)
from shared.messages import NodeReport, ScalingWindow, WorkerReport


class StoredResource(Struct, frozen=True, kw_only=True):
    """A resource's row with its option and the history of its starts. Times are Unix seconds."""

    resource_id: str
    team_id: str
    model_type: str
    option_id: str
    pool: bool
    wanted: str
    fixed_count: int
    state: str
    reason: str
    expected_live_at: float | None
    device_kind: str
    precision: str
    max_batch: int
    max_context_tokens: int
    kv_tokens: int
    hourly_rate_nanousd: int
    failures: int
    last_failure_at: float | None
    last_failure: str
    usual_start_s: float | None
    is_capped: bool = False
    autoscaling: bool = False
    min_count: int | None = None
    max_count: int | None = None
    idle_timeout_s: int = 600
    target_wait_s: int = 10
    windows: list[ScalingWindow] = []
    scaling_version: int = 1
    min_now: int | None = None
    max_now: int | None = None
    window_now: str | None = None
    bounds_until: float | None = None
    wanted_count: int | None = None
    job_tokens: float | None = None
    worker_tokens_per_s: float | None = None
    crowds: SeenCrowds | None = None


class StoredPlace(Struct, frozen=True, kw_only=True):
    """A place's row with its open interval."""

    resource_id: str
    place: int
    state: str
    incarnation: str
    worker_id: str
    node_id: str
    device: str
    device_kind: str
    phase: str
    start_attempt: int
    granted_at: float
    ready_at: float | None
    reported_at: float | None
    drain_sent_at: float | None
    given_up: bool
    proved_until: float | None


class Stored(Struct, frozen=True, kw_only=True):
    now: float
    resources: list[StoredResource]
    places: list[StoredPlace]
    quotas: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class Heard:
    """The latest reports, with the times at which they were sent, on the database's clock."""

    nodes: Mapping[str, tuple[NodeReport, float]]
    workers: Mapping[str, tuple[WorkerReport, float]]
    observing_since: float | None


@dataclass(frozen=True, slots=True)
class ScalingState:
    """Of one autoscaled resource."""

    load: Load
    measured: Measured | None
    memory: ScalingMemory
    noted_at: float
    recorded_at: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What one scheduler remembers of its own doing; lost with it, and then things are merely said once more."""

    start_sent_at: Mapping[str, float] = field(default_factory=dict)
    stop_sent_at: Mapping[str, float] = field(default_factory=dict)
    last_exit_at: Mapping[str, float] = field(default_factory=dict)
    scaling: Mapping[str, ScalingState] = field(default_factory=dict)
    """What was measured of each autoscaled resource, and what was decided before."""


@dataclass(frozen=True, slots=True)
class Decided:
    resource: StoredResource
    view: ResourceView
    actions: list[Action]
    error: Exception | None = None
    """The bug that kept this resource from being decided about."""


def decide_all(stored: Stored, heard: Heard, memory: Memory, limits: Limits) -> list[Decided]:
    """Decide about each resource in the order of their ids; devices that one gets are taken for the next.

    A bug (an illegal move, say) holds up its own resource and no other.
    """
    free = free_devices(stored, heard, limits)
    teams = {resource.resource_id: resource.team_id for resource in stored.resources}
    book = QuotaBook(stored.quotas, [teams[place.resource_id] for place in stored.places])
    decided = []
    for resource in sorted(stored.resources, key=lambda r: r.resource_id):
        room = book.room(resource.team_id)
        view = replace(_view(resource, stored, heard, memory, limits, free), quota=room)
        try:
            actions = reconcile(view)
        except Exception as error:  # noqa: BLE001 - it is handed on, and logged by the leader
            decided.append(Decided(resource, view, [], error))
            continue
        for action in actions:
            if isinstance(action, GrantPlace):
                book.take(resource.team_id)
                free = [d for d in free if (d.node_id, d.device) != (action.node_id, action.device)]
        decided.append(Decided(resource, view, actions))
    return decided


def free_devices(stored: Stored, heard: Heard, limits: Limits) -> list[FreeDevice]:
    """Devices that can be given away: free by a fresh report, less those granted but not shown by it yet.

    The agent picks the device itself, so a grant that is not shown yet counts against its node and kind; the device
    named in it is only the most likely one.
    """
    free: list[FreeDevice] = []
    for node_id, (report, heard_at) in sorted(heard.nodes.items()):
        if stored.now - heard_at > limits.node_fresh_s:
            continue
        names = [FreeDevice(node_id, d.device, d.kind) for d in report.devices if d.incarnation is None]
        shown = {process.incarnation for process in report.processes}
        for place in stored.places:
            if place.node_id == node_id and place.incarnation not in shown:
                _take_one(names, place)
        free += names
    return free


def _take_one(names: list[FreeDevice], place: StoredPlace) -> None:
    fitting = [device for device in names if device.kind == place.device_kind]
    if fitting:
        names.remove(next((d for d in fitting if d.device == place.device), fitting[0]))


def stray_stops(stored: Stored, heard: Heard, memory: Memory, limits: Limits) -> list[SendStop]:
    """Stop running processes that hold no place (of a database that was restored, say).

    Sound because the reports were read before the rows: a process starts only after its row is there, and the row
    goes only after the process.
    """
    known = {place.incarnation for place in stored.places}
    stops = []
    for node_id, (report, heard_at) in sorted(heard.nodes.items()):
        if heard.observing_since is None or stored.now - heard_at > limits.node_fresh_s:
            continue
        for process in report.processes:
            sent_at = memory.stop_sent_at.get(process.incarnation, float("-inf"))
            is_stray = process.state == "running" and process.incarnation not in known
            if is_stray and stored.now - sent_at >= limits.stop_resend_s:
                stops.append(SendStop(node_id, process.incarnation, limits.drain_grace_s))
    return stops


def _view(
    resource: StoredResource,
    stored: Stored,
    heard: Heard,
    memory: Memory,
    limits: Limits,
    free: Sequence[FreeDevice],
) -> ResourceView:
    return ResourceView(
        now=stored.now,
        limits=limits,
        resource_id=resource.resource_id,
        team_id=resource.team_id,
        option_id=resource.option_id,
        device_kind=resource.device_kind,
        # A shared pool is paid per token: nobody is billed for its minutes.
        max_batch=resource.max_batch,
        hourly_rate_nanousd=0 if resource.pool else resource.hourly_rate_nanousd,
        wanted="on" if resource.wanted == "on" else "off",
        fixed_count=resource.fixed_count,
        scaling=_scaling(resource, memory.scaling.get(resource.resource_id)),
        state=ResourceState(resource.state),
        pool=resource.pool,
        reason=resource.reason,
        expected_live_at=resource.expected_live_at,
        failures=resource.failures,
        last_failure_at=resource.last_failure_at,
        last_failure=resource.last_failure,
        last_exit_at=memory.last_exit_at.get(resource.resource_id),
        usual_start_s=resource.usual_start_s,
        is_capped=resource.is_capped,
        places=[_place(p, heard, memory) for p in stored.places if p.resource_id == resource.resource_id],
        free_devices=[device for device in free if device.kind == resource.device_kind],
        observing_since=heard.observing_since,
    )


def _scaling(resource: StoredResource, state: ScalingState | None) -> Scaling | None:
    """None for a fixed number without windows."""
    if not resource.autoscaling and not resource.windows:
        return None
    noted: Bounds | None = None
    if resource.min_now is not None and resource.max_now is not None:
        noted = Bounds(
            min_count=resource.min_now,
            max_count=resource.max_now,
            window=resource.window_now,
            until=resource.bounds_until,
        )
    scaling = Scaling(
        version=resource.scaling_version,
        min_count=resource.fixed_count if resource.min_count is None else resource.min_count,
        max_count=resource.fixed_count if resource.max_count is None else resource.max_count,
        idle_timeout_s=resource.idle_timeout_s,
        target_wait_s=resource.target_wait_s,
        windows=resource.windows,
        noted=noted,
    )
    if state is None:
        return scaling
    return replace(
        scaling,
        load=state.load,
        measured=state.measured,
        memory=state.memory,
        noted_at=state.noted_at,
        recorded_at=state.recorded_at,
    )


def _place(place: StoredPlace, heard: Heard, memory: Memory) -> PlaceView:
    node = heard.nodes.get(place.node_id)
    worker = heard.workers.get(place.incarnation)
    return PlaceView(
        place=place.place,
        state=PlaceState(place.state),
        incarnation=place.incarnation,
        worker_id=place.worker_id,
        node_id=place.node_id,
        device=place.device,
        granted_at=place.granted_at,
        phase=place.phase,
        start_attempt=place.start_attempt,
        ready_at=place.ready_at,
        reported_at=place.reported_at,
        drain_sent_at=place.drain_sent_at,
        given_up=place.given_up,
        proved_until=place.proved_until,
        node_heard_at=node[1] if node is not None else None,
        process=_process(node[0], place.incarnation) if node is not None else None,
        worker=_worker(worker[0], worker[1]) if worker is not None else None,
        start_sent_at=memory.start_sent_at.get(place.incarnation),
        stop_sent_at=memory.stop_sent_at.get(place.incarnation),
    )


def _process(report: NodeReport, incarnation: str) -> ProcessSeen:
    for process in report.processes:
        if process.incarnation == incarnation:
            return ProcessSeen(
                state=process.state,
                device=clean(process.device),
                reason=clean(process.reason),
                exit_code=process.exit_code,
            )
    return ProcessSeen(state="absent")


def _worker(report: WorkerReport, heard_at: float) -> WorkerSeen:
    return WorkerSeen(
        phase=report.phase,
        heard_at=heard_at,
        jobs=report.running_jobs + report.held_jobs,
        running_jobs=report.running_jobs,
        hot_models=sum(model.state == "ready" for model in report.models),
        detail=clean(report.detail),
    )


def clean(text: str) -> str:
    """Text of another process as it may be stored: short, and nothing that a jsonb column refuses."""
    return "".join(character if character.isprintable() else " " for character in text[:200])
