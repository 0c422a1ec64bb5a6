"""Pure: which workers of a resource hold jobs that another one, which has nothing to do, could begin at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from services.scheduler.snapshot import Stored
from services.scheduler.states import PlaceState
from shared.messages import ShareJobs, WorkerReport

FRESH_S = 3.0
ASK_AGAIN_S = 5.0
"""A worker that gave jobs back takes none for as long."""


def find_holders(reports: Collection[WorkerReport]) -> list[str]:
    """Return the incarnations that are to give back what they have not begun. reports: fresh ones of ready workers of one resource.

    1. Nobody, unless a worker is ready and holds no job: the resource's queues are empty then, for it would have got one.
    2. Else each worker with jobs that wait beside jobs that run. What waits alone, for its model say, is about to begin.
    """
    if not any(report.held_jobs == 0 for report in reports):  # 1
        return []
    return [report.incarnation for report in reports if report.waiting_jobs and report.running_jobs]  # 2


@dataclass(slots=True)
class Sharing:
    """Remembers whom it asked, so that nobody is asked at each look."""

    _asked_s: dict[str, float] = field(default_factory=dict)

    def to_ask(
        self, stored: Stored, workers: Mapping[str, tuple[WorkerReport, float]], now_s: float
    ) -> list[ShareJobs]:
        """now_s: of the clock that the reports' times are of."""
        self._asked_s = {key: at_s for key, at_s in self._asked_s.items() if now_s - at_s < ASK_AGAIN_S}
        by_resource: dict[str, list[WorkerReport]] = {}
        names: dict[str, str] = {}
        for place in stored.places:
            report, heard_at_s = workers.get(place.incarnation, (None, 0.0))
            is_ready = place.state == PlaceState.READY and report is not None and report.phase == "ready"
            if report is not None and is_ready and now_s - heard_at_s < FRESH_S:
                by_resource.setdefault(place.resource_id, []).append(report)
                names[place.incarnation] = place.worker_id
        asked = [
            incarnation
            for reports in by_resource.values()
            for incarnation in find_holders(reports)
            if incarnation not in self._asked_s
        ]
        self._asked_s |= dict.fromkeys(asked, now_s)
        return [ShareJobs(worker_id=names[each], incarnation=each) for each in asked]
