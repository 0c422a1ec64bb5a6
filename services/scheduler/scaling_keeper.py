"""What the leader knows of each autoscaled resource from one look to the next: its load, and what was decided.

Another leader begins with what is stored: the count that was wanted, which it holds to as if it had just been needed, what a
job and a worker were measured to be, and the crowds that came.
"""

from __future__ import annotations

from services.scheduler.actions import NoteScaling
from services.scheduler.load_meter import LoadMeter, Measured
from services.scheduler.queue_depths import QueueDepths
from services.scheduler.scaling_policy import Need, ScalingMemory, Tuning, crowd_terms
from services.scheduler.snapshot import Heard, ScalingState, Stored, StoredPlace, StoredResource
from services.scheduler.states import PlaceState
from services.scheduler.swap_cost import mean_swap_s
from shared.messages import WorkerReport


class ScalingKeeper:
    def __init__(self, depths: QueueDepths, tuning: Tuning) -> None:
        self._depths = depths
        self._tuning = tuning
        self._meters: dict[str, LoadMeter] = {}
        self._memories: dict[str, ScalingMemory] = {}
        self._noted_at: dict[str, float] = {}
        self._recorded_at: dict[str, float] = {}

    def states(self, stored: Stored, heard: Heard) -> dict[str, ScalingState]:
        """Take in what was heard, and return the load of each resource whose count is autoscaling's to decide."""
        scaled = [r for r in stored.resources if r.wanted == "on" and (r.autoscaling or r.windows)]
        self._forget_others({resource.resource_id for resource in scaled})
        self._depths.ask({resource.resource_id: resource.pool for resource in scaled})
        places: dict[str, list[StoredPlace]] = {resource.resource_id: [] for resource in scaled}
        for place in stored.places:
            if place.resource_id in places:
                places[place.resource_id].append(place)
        return {r.resource_id: self._state(r, places[r.resource_id], heard, stored.now) for r in scaled}

    def remember(self, resource_id: str, scaling: NoteScaling, now: float) -> None:
        """What was decided, and stored if it was to be."""
        self._memories[resource_id] = scaling.memory
        if scaling.note:
            self._noted_at[resource_id] = now
        if scaling.record:
            self._recorded_at[resource_id] = now

    def forget(self) -> None:
        """Not the leader: whoever is decides by what it knows, and so shall we when we lead again."""
        self._forget_others(set())
        self._depths.ask({})

    def _state(
        self, resource: StoredResource, places: list[StoredPlace], heard: Heard, now: float
    ) -> ScalingState:
        resource_id = resource.resource_id
        reports: dict[str, WorkerReport] = {}
        oldest_s = 0.0
        for place in places:
            found = heard.workers.get(place.incarnation)
            if found is not None:
                reports[place.incarnation] = found[0]
            if place.state == PlaceState.READY:
                oldest_s = max(oldest_s, now - (found[1] if found is not None else place.ready_at or now))
        meter = self._meters.get(resource_id)
        if meter is None:
            meter = self._meters[resource_id] = LoadMeter(
                resource.max_batch, _known(resource), resource.crowds
            )
        depth = self._depths.of(resource_id)
        meter.look(
            reports,
            None if depth is None else depth.live,
            0 if depth is None else depth.batch,
            oldest_s,
            now,
            terms=crowd_terms(resource.target_wait_s, self._tuning),
            swap_s=mean_swap_s(reports.values()),
        )
        memory = self._memories.get(resource_id)
        if memory is None:
            memory = self._memories[resource_id] = _first_memory(resource, places, now)
        return ScalingState(
            load=meter.load(),
            measured=meter.measured(),
            memory=memory,
            noted_at=self._noted_at.get(resource_id, 0.0),
            recorded_at=self._recorded_at.get(resource_id, 0.0),
        )

    def _forget_others(self, kept: set[str]) -> None:
        for known in (self._meters, self._memories, self._noted_at, self._recorded_at):
            for resource_id in [key for key in known if key not in kept]:
                del known[resource_id]


def _known(resource: StoredResource) -> Measured | None:
    if resource.job_tokens is None or resource.worker_tokens_per_s is None:
        return None
    return Measured(job_tokens=resource.job_tokens, worker_tokens_per_s=resource.worker_tokens_per_s)


def _first_memory(resource: StoredResource, places: list[StoredPlace], now: float) -> ScalingMemory:
    """Begin with what was wanted, or with what there is: as if it had been needed until now."""
    active = sum(place.state != PlaceState.DRAINING for place in places)
    wanted = resource.wanted_count if resource.wanted_count is not None else active
    return ScalingMemory(wanted=wanted, busy_at=now, needs=[Need(now, wanted)])
