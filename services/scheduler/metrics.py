"""What the scheduler shows on `/metrics`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from opentelemetry.metrics import CallbackOptions, Observation

from services.scheduler.actions import Action, FreePlace, NotePlace, NoteScaling, ProveInterval
from services.scheduler.snapshot import Stored
from services.scheduler.states import PlaceState
from shared import telemetry

PLACES = "roundhouse.scheduler.places"
LEADER = "roundhouse.scheduler.leader"
DECISIONS = "roundhouse.scheduler.decisions"
RECONCILE_DURATION = "roundhouse.scheduler.reconcile.duration"
FAILURES = "roundhouse.scheduler.reconcile.failures"
CUT_REQUESTS = "roundhouse.scheduler.cut_requests"


class SchedulerMetrics:
    """Built once per process; a standby shows no places, so that sums over schedulers are right."""

    def __init__(self, is_leader: Callable[[], bool]) -> None:
        self._is_leader = is_leader
        self._places: Counter[tuple[str, str]] = Counter()
        self._resources: list[str] = []
        meter = telemetry.meter()
        meter.create_observable_gauge(LEADER, [self._observe_leader], description="1 on the leader")
        meter.create_observable_gauge(
            PLACES, [self._observe_places], description="Taken places by resource and state"
        )
        self._decisions = meter.create_counter(DECISIONS, description="Actions decided, by kind")
        self._duration = meter.create_histogram(
            RECONCILE_DURATION, unit="s", description="One look at everything"
        )
        self._failures = meter.create_counter(
            FAILURES, description="Looks at a resource that failed, by cause"
        )

        self._cut = meter.create_counter(
            CUT_REQUESTS, description="Requests that ran on a worker which was killed while it drained"
        )
        self._cut.add(0)  # so that there is a zero to see

    def looked(self, stored: Stored, duration_s: float) -> None:
        self._places = Counter((place.resource_id, place.state) for place in stored.places)
        self._resources = [resource.resource_id for resource in stored.resources]
        self._duration.record(duration_s)

    def decided(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if not isinstance(action, NotePlace | NoteScaling | ProveInterval):
                self._decisions.add(1, {"action": type(action).__name__})
            if isinstance(action, FreePlace):
                self._cut.add(action.cut_jobs)

    def failed(self, cause: str) -> None:
        self._failures.add(1, {"cause": cause})

    def _observe_leader(self, _options: CallbackOptions) -> Iterable[Observation]:
        yield Observation(int(self._is_leader()))

    def _observe_places(self, _options: CallbackOptions) -> Iterable[Observation]:
        for resource_id in self._resources if self._is_leader() else ():
            for state in PlaceState:
                labels = {"state": str(state), telemetry.RESOURCE_ID: resource_id}
                yield Observation(self._places[resource_id, state], labels)
