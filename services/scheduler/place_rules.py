"""Pure: what one taken seat needs, from what its node and its worker say. Called by `reconcile` only."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from services.scheduler.actions import (
    Action,
    BeginInterval,
    EndInterval,
    FreePlace,
    GiveUpStart,
    MarkReady,
    MovePlace,
    NotePlace,
    ProveInterval,
    SendStart,
    SendStop,
)
from services.scheduler.states import PlaceState, advance_place
from services.scheduler.views import Limits, PlaceView, ResourceView, WorkerSeen

LEAVING_PHASES = frozenset({"draining", "drained"})


@dataclass(frozen=True, slots=True)
class Looked:
    """What to do about a place, and the place as it will be afterwards; None when it becomes free."""

    actions: list[Action]
    after: PlaceView | None


def look_at_place(view: ResourceView, place: PlaceView) -> Looked:
    """Decide about one place, whatever is wanted of the resource. The first rule that fits holds.

    1. The node says that the process has exited -> free it. Only this frees a place: a silent worker or node never
       does. A start that ended so is a failed one; a worker that had been ready and was not asked to leave left
       unexpectedly.
    2. starting, the worker says ready -> ready, from the time of that report.
    3. starting, the worker leaves by itself -> draining.
    4. starting for longer than the start time-out -> give it up.
    5. starting, the node does not show the process -> (re-)send the start; it is idempotent by incarnation.
    6. ready, the worker leaves by itself -> draining.
    7. ready, no report for `lost_after_s` while we could hear -> lost; its interval ends at its last report.
    8. lost, the worker is heard of again -> ready (with a new interval) or draining.
    9. ready or lost, the node answers but does not know the process -> a stop, by which the node records it as
       exited; then rule 1.
    Beside that, reports prove intervals: while ready, and while draining until drained.
    """
    if place.process is not None and place.process.state == "exited":
        return _free(place, place.process.reason)
    match place.state:
        case PlaceState.STARTING:
            looked = _starting(view, place)
        case PlaceState.READY:
            looked = _ready(view, place)
        case PlaceState.LOST:
            looked = _lost(view, place)
        case PlaceState.DRAINING:
            looked = Looked(_prove_draining(view, place), place)
    return _with_note(view.limits, place, looked)


def is_fresh(view: ResourceView, worker: WorkerSeen | None) -> bool:
    return worker is not None and view.now - worker.heard_at <= view.limits.lost_after_s


def node_answers(view: ResourceView, place: PlaceView) -> bool:
    return place.node_heard_at is not None and view.now - place.node_heard_at <= view.limits.node_fresh_s


def move(
    place: PlaceView, to: PlaceState, action: str, words: str, *, drain_sent_at: float | None = None
) -> tuple[MovePlace, PlaceView]:
    """Return the action and the place after it."""
    action_value = MovePlace(
        place.place, place.incarnation, place.state, advance_place(place.state, to), action, words
    )
    return action_value, replace(place, state=to, drain_sent_at=drain_sent_at)


def stop_of(view: ResourceView, place: PlaceView) -> SendStop | None:
    """The stop for a draining place; None while the last one is recent."""
    if place.stop_sent_at is not None and view.now - place.stop_sent_at < view.limits.stop_resend_s:
        return None
    was_ready = place.ready_at is not None
    grace_s = view.limits.drain_grace_s if was_ready else view.limits.start_grace_s
    return SendStop(place.node_id, place.incarnation, grace_s, place.worker_id, drain=True)


def _free(place: PlaceView, reason: str) -> Looked:
    asked = place.state == PlaceState.DRAINING
    was_ready = place.ready_at is not None
    cut_jobs = _cut_jobs(place)
    actions: list[Action] = []
    if place.proved_until is not None:
        actions.append(EndInterval(place.incarnation, max(place.proved_until, _live_report_at(place))))
    actions.append(
        FreePlace(
            place.place,
            place.incarnation,
            failed_start=None if asked or was_ready else reason or "exited",
            unexpected=was_ready and not asked,
            words=f"place {place.place} is free: the worker {reason or 'exited'}"
            + ("" if asked or was_ready else " before it was ready")
            + (f"; {cut_jobs} requests that it was finishing were cut" if cut_jobs else ""),
            cut_jobs=cut_jobs,
        )
    )
    return Looked(actions, None)


def _cut_jobs(place: PlaceView) -> int:
    """Jobs that ran on a worker that was asked to finish them and did not.

    A worker that exits by itself has finished, whatever its report of a second before says.
    """
    process, worker = place.process, place.worker
    if place.state != PlaceState.DRAINING or process is None or worker is None:
        return 0
    return 0 if process.exit_code == 0 or worker.phase == "drained" else worker.running_jobs


def _live_report_at(place: PlaceView) -> float:
    """The latest report that proves live time; 0 without one."""
    worker = place.worker
    return worker.heard_at if worker is not None and worker.phase in ("ready", "draining") else 0.0


def _starting(view: ResourceView, place: PlaceView) -> Looked:
    limits = view.limits
    worker = place.worker
    if worker is not None and is_fresh(view, worker):
        if worker.phase == "ready":
            took_s = max(worker.heard_at - place.granted_at, 0.0)
            words = f"place {place.place} is ready {took_s:.1f} s after it was granted"
            ready = MarkReady(place.place, place.incarnation, worker.heard_at, started=True, words=words)
            after = replace(
                place,
                state=PlaceState.READY,
                ready_at=worker.heard_at,
                proved_until=worker.heard_at,
                phase="ready",
            )
            return Looked([ready], after)
        if worker.phase in LEAVING_PHASES:
            moved, after = move(
                place,
                PlaceState.DRAINING,
                "drain",
                f"place {place.place}: the worker leaves by itself while starting",
            )
            return Looked([moved], after)
    if view.now - place.granted_at > limits.start_timeout_s:
        words = f"place {place.place}: the worker was not ready within {limits.start_timeout_s:g} s"
        gave_up = GiveUpStart(place.place, place.incarnation, words)
        return Looked([gave_up], replace(place, state=PlaceState.DRAINING, given_up=True))
    if _start_is_due(view, place):
        return Looked([SendStart(place.place, place.incarnation)], place)
    return Looked([], place)


def _start_is_due(view: ResourceView, place: PlaceView) -> bool:
    if place.worker is not None or (place.process is not None and place.process.state == "running"):
        return False
    if place.start_sent_at is None:
        return True
    # The node has reported since the last try, and still does not show the process.
    heard_since = place.node_heard_at is not None and place.node_heard_at > place.start_sent_at
    return heard_since and view.now - place.start_sent_at >= view.limits.start_resend_s


def _ready(view: ResourceView, place: PlaceView) -> Looked:
    worker = place.worker
    if worker is not None and is_fresh(view, worker):
        if worker.phase in LEAVING_PHASES:
            moved, after = move(
                place, PlaceState.DRAINING, "drain", f"place {place.place}: the worker leaves by itself"
            )
            return Looked([*_prove_draining(view, place), moved], after)
        return Looked([*_prove(view, place, worker), *_unknown_to_node(view, place)], place)
    last_heard_at = max(
        worker.heard_at if worker is not None else 0.0, place.reported_at or 0.0, place.ready_at or 0.0
    )
    could_hear_since = max(last_heard_at, view.observing_since or view.now)
    if view.now - could_hear_since <= view.limits.lost_after_s:
        return Looked([], place)
    words = f"place {place.place}: no report of its worker for {view.now - last_heard_at:.0f} s"
    moved, after = move(place, PlaceState.LOST, "lost", words)
    ended: list[Action] = []
    if place.proved_until is not None:
        ended.append(EndInterval(place.incarnation, max(place.proved_until, _live_report_at(place))))
    return Looked([*ended, moved, *_unknown_to_node(view, place)], replace(after, proved_until=None))


def _lost(view: ResourceView, place: PlaceView) -> Looked:
    worker = place.worker
    if worker is not None and is_fresh(view, worker):
        if worker.phase in LEAVING_PHASES:
            moved, after = move(
                place, PlaceState.DRAINING, "drain", f"place {place.place}: found again, and leaving"
            )
            return Looked([moved], after)
        if worker.phase == "ready":
            words = f"place {place.place}: its worker is heard of again"
            ready = MarkReady(place.place, place.incarnation, worker.heard_at, started=False, words=words)
            return Looked([ready], replace(place, state=PlaceState.READY, proved_until=worker.heard_at))
    return Looked(_unknown_to_node(view, place), place)


def _unknown_to_node(view: ResourceView, place: PlaceView) -> list[Action]:
    if place.process is None or place.process.state != "absent" or not node_answers(view, place):
        return []
    stop = stop_of(view, place)
    return [] if stop is None else [SendStop(stop.node_id, stop.incarnation, stop.grace_s)]


def _prove(view: ResourceView, place: PlaceView, worker: WorkerSeen) -> list[Action]:
    """Extend the interval of a ready place by its worker's report."""
    if place.proved_until is None:
        return [BeginInterval(place.place, place.incarnation, worker.heard_at)]
    silence_s = worker.heard_at - place.proved_until
    if silence_s > view.limits.interval_gap_s:
        return [
            EndInterval(place.incarnation, place.proved_until),
            BeginInterval(place.place, place.incarnation, worker.heard_at),
        ]
    return (
        [ProveInterval(place.incarnation, worker.heard_at)] if silence_s >= view.limits.prove_every_s else []
    )


def _prove_draining(view: ResourceView, place: PlaceView) -> list[Action]:
    """Extend the interval of a draining place, or end it: drained, silent, or silent for too long before."""
    if place.proved_until is None:
        return []
    worker = place.worker
    if worker is None or not is_fresh(view, worker):
        could_hear_since = max(place.proved_until, view.observing_since or view.now)
        if view.now - could_hear_since <= view.limits.lost_after_s:
            return []
        return [EndInterval(place.incarnation, max(place.proved_until, _live_report_at(place)))]
    silence_s = worker.heard_at - place.proved_until
    if silence_s > view.limits.interval_gap_s:
        return [EndInterval(place.incarnation, place.proved_until)]
    if worker.phase == "drained":
        return [EndInterval(place.incarnation, max(place.proved_until, worker.heard_at))]
    return (
        [ProveInterval(place.incarnation, worker.heard_at)] if silence_s >= view.limits.prove_every_s else []
    )


def _with_note(limits: Limits, place: PlaceView, looked: Looked) -> Looked:
    """Add what is kept for display, when it has changed or is getting old."""
    worker = place.worker
    phase = worker.phase if worker is not None else place.phase
    device = place.process.device if place.process is not None and place.process.device else place.device
    heard_at = worker.heard_at if worker is not None else place.reported_at
    is_newer = heard_at is not None and heard_at - (place.reported_at or 0.0) >= limits.prove_every_s
    if looked.after is None or not (is_newer or phase != place.phase or device != place.device):
        return looked
    note = NotePlace(place.incarnation, phase, device, heard_at)
    return Looked([note, *looked.actions], replace(looked.after, phase=phase, device=device))
