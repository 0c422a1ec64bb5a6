"""Pure: compare what is wanted of a resource with what is, and say what to do.

Level-triggered: nothing here hangs on having seen an event, so a lost one changes nothing, and the same view always
gives the same actions. `place_rules` looks at each taken seat; this looks at the resource as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from services.scheduler.actions import Action, FreePlace, GrantPlace, NoteScaling, SetBounds, SetResource
from services.scheduler.place_rules import is_fresh, look_at_place, move, node_answers, stop_of
from services.scheduler.scaling_policy import ScalingDecision, Supply, decide_count
from services.scheduler.scaling_settings import Bounds, bounds_at
from services.scheduler.states import PlaceState, ResourceState, advance_resource, next_towards
from services.scheduler.views import FreeDevice, Limits, PlaceView, ResourceView

SCALING_NOTED_EVERY_S = 15.0
SCALING_RECORDED_EVERY_S = 300.0
HOLDING = "holding: the scheduler cannot reach the message broker"


def reconcile(view: ResourceView) -> list[Action]:
    """Decide about one resource.

    0. A window of the scaling settings that opened or ended -> store the bounds that are in force now.
    1. Blind (the broker is away) -> hold: no start, no drain, nobody is called lost; only say so.
    2. Each taken place by itself (`look_at_place`); what follows counts the places as they will be then.
    3. More places in starting, ready or lost than wanted -> drain the surplus (`choose_victims`).
    4. Fewer -> first take back drains that nobody was told of yet, then grant free seats, lowest first. All places
       that are not free, draining and lost ones too, count against the maximum. A start waits for the back-off after
       failed ones, and for a device; and after a place became free, for the next look, which counts how it ended.
       While a budget that stops scaling up is used up, nothing is granted: what runs goes on.
    5. Places that drain -> tell worker and node, again and again until the node confirms the end.
    6. The state of the resource follows from its places (`target_state`), one legal step at a time.
    """
    turned = _turn_of_windows(view)
    if view.observing_since is None:
        return [*turned, *_hold(view)]
    actions: list[Action] = [*turned, *_scaling(view)]
    places: list[PlaceView] = []
    for place in sorted(view.places, key=lambda p: p.place):
        looked = look_at_place(view, place)
        actions += looked.actions
        if looked.after is not None:
            places.append(looked.after)
    has_just_left = any(isinstance(action, FreePlace) for action in actions)

    active = [place for place in places if place.state != PlaceState.DRAINING]
    surplus = len(active) - wanted_count(view)
    waiting = ""
    if surplus > 0:
        for victim in choose_victims(active, surplus):
            words = f"place {victim.place} drains: {len(active)} taken, {wanted_count(view)} wanted"
            moved, after = move(victim, PlaceState.DRAINING, "drain", words)
            actions.append(moved)
            places[places.index(victim)] = after
    elif surplus < 0:
        kept = _take_back(view, places, -surplus)
        for place in kept:
            moved, after = move(
                place, PlaceState.READY, "keep", f"place {place.place}: wanted again before it was told"
            )
            actions.append(moved)
            places[places.index(place)] = after
        grants, waiting = _grants(view, places, -surplus - len(kept), has_just_left)
        actions += grants

    for place in places:
        # One that begins to drain now is told at the next look, when the drain is stored.
        if place.state == PlaceState.DRAINING and _drains_already(view, place):
            stop = stop_of(view, place)
            if stop is not None:
                actions.append(stop)
    return actions + _resource_state(view, places, waiting, actions)


def wanted_count(view: ResourceView) -> int:
    """How many replicas the resource should have now.

    1. None while it is off. 2. The number itself where minimum and maximum in force are one. 3. Else by its load
    (`scaling_policy`), within them.
    """
    if view.wanted == "off":
        return 0
    decision = scaling_decision(view)
    return bounds_in_force(view).min_count if decision is None else decision.wanted


def scaling_decision(view: ResourceView) -> ScalingDecision | None:
    """What autoscaling wants; None where there is nothing for it to decide."""
    bounds = bounds_in_force(view)
    if view.scaling is None or view.wanted == "off" or bounds.min_count == bounds.max_count:
        return None
    supply = Supply(
        ready_workers=sum(place.state == PlaceState.READY for place in view.places),
        starting_ages_s=[
            view.now - place.granted_at for place in view.places if place.state == PlaceState.STARTING
        ],
        max_batch=view.max_batch,
        start_s=usual_start_s(view),
    )
    scaling = view.scaling
    return decide_count(
        scaling.load,
        supply,
        (bounds.min_count, bounds.max_count),
        scaling.idle_timeout_s,
        scaling.memory,
        view.now,
        view.limits.scaling,
        target_wait_s=scaling.target_wait_s,
    )


def usual_start_s(view: ResourceView) -> float:
    """How long a start takes, by how long such starts took."""
    if view.usual_start_s is not None:
        return view.usual_start_s
    return view.limits.usual_start_cuda_s if view.device_kind == "cuda" else view.limits.usual_start_cpu_s


def _scaling(view: ResourceView) -> list[NoteScaling]:
    decision, scaling = scaling_decision(view), view.scaling
    if decision is None or scaling is None:
        return []
    before, after = scaling.memory.wanted, decision.wanted
    record = after != before or view.now - scaling.recorded_at >= SCALING_RECORDED_EVERY_S
    note = record or view.now - scaling.noted_at >= SCALING_NOTED_EVERY_S
    words = (
        f"{before} → {after} wanted: {decision.why}" if after != before else f"{after} wanted: {decision.why}"
    )
    return [NoteScaling(decision.memory, scaling.measured, scaling.load.crowds, words, note, record)]


def bounds_in_force(view: ResourceView) -> Bounds:
    """The settings' bounds, or those of the window that is open."""
    scaling = view.scaling
    if scaling is None:
        return Bounds(min_count=view.fixed_count, max_count=view.fixed_count)
    noted = scaling.noted
    if noted is not None and noted.until is not None and view.now < noted.until:
        return noted
    return bounds_at(scaling.min_count, scaling.max_count, scaling.windows, view.now)


def choose_victims(active: Sequence[PlaceView], count: int) -> list[PlaceView]:
    """Choose `count` places to drain: what serves least goes first.

    1. Lost before starting before ready. 2. Idle before busy. 3. Fewest hot models. 4. The highest place.
    """
    rank = {PlaceState.LOST: 0, PlaceState.STARTING: 1, PlaceState.READY: 2}

    def cost(place: PlaceView) -> tuple[int, bool, int, int]:
        worker = place.worker
        jobs, hot_models = (worker.jobs, worker.hot_models) if worker is not None else (0, 0)
        return rank[place.state], jobs > 0, hot_models, -place.place

    return sorted(active, key=cost)[:count]


def next_start_at(view: ResourceView) -> float:
    """The earliest time of the next start.

    1. After failed starts in a row: the last failure plus 2 s, doubled for each further one, at most 300 s.
    2. After a worker that had been ready: 0.2 s after its end. 3. Otherwise now.
    """
    limits = view.limits
    earliest = view.now
    if view.failures > 0 and view.last_failure_at is not None:
        earliest = view.last_failure_at + backoff_s(limits, view.failures)
    if view.last_exit_at is not None:
        earliest = max(earliest, view.last_exit_at + limits.exit_pause_s)
    return earliest


def backoff_s(limits: Limits, failures: int) -> float:
    """Seconds to wait after this many failed starts in a row (1 or more)."""
    return float(min(limits.backoff_first_s * 2 ** min(failures - 1, 30), limits.backoff_longest_s))


def choose_device(free: Sequence[FreeDevice], kind: str) -> FreeDevice | None:
    """Choose a device: on the node that has most of the kind free, ties to the lowest node id; None without one."""
    fitting = [device for device in free if device.kind == kind]
    count = Counter(device.node_id for device in fitting)
    return min(fitting, key=lambda d: (-count[d.node_id], d.node_id), default=None)


def target_state(view: ResourceView, places: Sequence[PlaceView]) -> ResourceState:
    """The state that the places add up to.

    1. Off: draining until the last place is free, then off.
    2. On: one ready place is enough to be live.
    3. On with nothing wanted: draining, then asleep.
    4. On, none ready, several failed starts in a row: failed (starts go on, with their back-off).
    5. On otherwise: starting.
    """
    if view.wanted == "off":
        return ResourceState.DRAINING if places else ResourceState.OFF
    if any(place.state == PlaceState.READY for place in places):
        return ResourceState.LIVE
    if wanted_count(view) == 0:
        return ResourceState.DRAINING if places else ResourceState.ASLEEP
    if view.failures >= view.limits.failures_until_failed:
        return ResourceState.FAILED
    return ResourceState.STARTING


def _turn_of_windows(view: ResourceView) -> list[SetBounds]:
    scaling = view.scaling
    bounds = bounds_in_force(view)
    if scaling is None or not scaling.windows or bounds == scaling.noted:
        return []
    words = ""
    if scaling.noted is None or scaling.noted.window != bounds.window:
        which = f"window {bounds.window!r} is open" if bounds.window is not None else "no window is open"
        words = f"{which}: {bounds.min_count} to {bounds.max_count} places"
    return [SetBounds(scaling.version, bounds, words)]


def _hold(view: ResourceView) -> list[Action]:
    if view.state in (ResourceState.OFF, ResourceState.ASLEEP) or view.reason == HOLDING:
        return []
    return [SetResource(view.state, HOLDING, view.expected_live_at)]


def _drains_already(view: ResourceView, place: PlaceView) -> bool:
    return any(p.incarnation == place.incarnation and p.state == PlaceState.DRAINING for p in view.places)


def _take_back(view: ResourceView, places: Sequence[PlaceView], count: int) -> list[PlaceView]:
    """Draining places that can go on serving: ready before, and neither worker nor node was told."""
    able = [
        place
        for place in places
        if place.state == PlaceState.DRAINING
        and place.drain_sent_at is None
        and place.ready_at is not None
        and is_fresh(view, place.worker)
        and place.worker is not None
        and place.worker.phase == "ready"
    ]
    return sorted(able, key=lambda p: p.place)[:count]


def _grants(
    view: ResourceView, places: Sequence[PlaceView], missing: int, has_just_left: bool
) -> tuple[list[GrantPlace], str]:
    """Grant up to `missing` seats; also say in words why fewer were granted."""
    if missing > 0 and view.is_capped:
        return [], "a budget is used up: no more GPUs until its next period, or a higher limit"
    waiting = ""
    most = bounds_in_force(view).max_count
    room = most - len(places)
    start_at = next_start_at(view)
    if missing > 0 and (has_just_left or view.now < start_at):
        if has_just_left or view.failures == 0:
            return [], "the next start is a moment away"
        return (
            [],
            f"{view.failures} failed starts in a row ({view.last_failure}); next start at {_clock(start_at)}",
        )
    taken = {place.place for place in places}
    seats = [number for number in range(most) if number not in taken]
    count = max(min(missing, room), 0)
    if view.quota is not None and view.quota.left < count:
        waiting, count = view.quota.reason, view.quota.left
    free = list(view.free_devices)
    grants: list[GrantPlace] = []
    for seat in seats[:count]:
        device = choose_device(free, view.device_kind)
        if device is None:
            return grants, f"no free {view.device_kind} device on any node"
        free.remove(device)
        words = f"place {seat} goes to {device.node_id} {device.device}"
        grants.append(GrantPlace(seat, device.node_id, device.device, view.failures + 1, words))
    return grants, waiting


def _resource_state(
    view: ResourceView, places: Sequence[PlaceView], waiting: str, actions: Sequence[Action]
) -> list[SetResource]:
    target = target_state(view, places)
    state = advance_resource(view.state, next_towards(view.state, target))
    reason = _reason(view, places, state, waiting)
    expected = _expected_live_at(view, places, actions) if target == ResourceState.STARTING else None
    if (state, reason, expected) == (view.state, view.reason, view.expected_live_at):
        return []
    return [SetResource(state, reason, expected)]


def _expected_live_at(
    view: ResourceView, places: Sequence[PlaceView], actions: Sequence[Action]
) -> float | None:
    """When the first worker should be ready, by how long such starts took; None while nothing is on its way."""
    granted = [place.granted_at for place in places if place.state == PlaceState.STARTING]
    if not granted and any(isinstance(action, GrantPlace) for action in actions):
        granted = [view.now]
    start_at = next_start_at(view)
    if not granted and start_at > view.now:
        granted = [start_at]
    return round(min(granted) + usual_start_s(view), 3) if granted else None


def _reason(view: ResourceView, places: Sequence[PlaceView], state: ResourceState, waiting: str) -> str:
    """Why the resource is not simply as wanted, in words; empty when it is. Holds no running clock."""
    if state in (ResourceState.OFF, ResourceState.ASLEEP):
        return ""
    if view.wanted == "off":
        return f"waiting for {len(places)} worker{'s' if len(places) != 1 else ''} to finish"
    words = [_place_words(view, place) for place in places if place.state != PlaceState.READY]
    if waiting:
        words.append(waiting)
    ready = len(places) - sum(place.state != PlaceState.READY for place in places)
    if not words:
        return ""
    return f"{ready} of {wanted_count(view)} ready; " + "; ".join(words)


def _place_words(view: ResourceView, place: PlaceView) -> str:
    silent_node = ""
    if (
        place.state != PlaceState.STARTING
        and place.node_heard_at is not None
        and not node_answers(view, place)
    ):
        silent_node = f", and neither of node {place.node_id}: taken until it says that the process is gone"
    match place.state:
        case PlaceState.STARTING:
            return f"place {place.place} {place.phase} on {place.node_id}"
        case PlaceState.DRAINING:
            return f"place {place.place} finishes its work and leaves{silent_node}"
        case _:
            heard_at = place.worker.heard_at if place.worker is not None else place.reported_at
            since = f" since {_clock(heard_at)}" if heard_at is not None else ""
            return f"place {place.place} not heard of{since}{silent_node}"


def _clock(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%H:%M:%S UTC")
