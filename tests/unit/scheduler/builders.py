"""Views for tests: everything as it usually is, but for what a test names."""

from __future__ import annotations

from typing import Any

from services.scheduler.states import PlaceState, ResourceState
from services.scheduler.views import FreeDevice, Limits, PlaceView, ProcessSeen, ResourceView, WorkerSeen

NOW = 1_000_000.0
LIMITS = Limits()


def make_view(*places: PlaceView, **changes: Any) -> ResourceView:
    """A live resource that is on with one place wanted, two free devices, and nothing wrong."""
    fields: dict[str, Any] = {
        "now": NOW,
        "limits": LIMITS,
        "resource_id": "res_1",
        "team_id": "team_1",
        "option_id": "opt_1",
        "device_kind": "cpu",
        "hourly_rate_nanousd": 10**9,
        "wanted": "on",
        "fixed_count": 1,
        "state": ResourceState.LIVE,
        "places": list(places),
        "free_devices": [FreeDevice("node-1", "cpu:0", "cpu"), FreeDevice("node-1", "cpu:1", "cpu")],
        "observing_since": NOW - 3600,
    }
    return ResourceView(**(fields | changes))


def make_place(place: int = 0, state: PlaceState = PlaceState.READY, **changes: Any) -> PlaceView:
    """A place whose node and worker were heard a moment ago; a ready one has an open interval."""
    is_starting = state == PlaceState.STARTING
    fields: dict[str, Any] = {
        "place": place,
        "state": state,
        "incarnation": f"inc_{place}",
        "worker_id": f"wrk_{place}",
        "node_id": "node-1",
        "device": f"cpu:{place}",
        "phase": "loading" if is_starting else "ready",
        "granted_at": NOW - (5 if is_starting else 600),
        "ready_at": None if is_starting else NOW - 590,
        "reported_at": NOW - 1,
        "proved_until": NOW - 1
        if state in (PlaceState.READY, PlaceState.DRAINING) and not is_starting
        else None,
        "node_heard_at": NOW - 0.5,
        "process": ProcessSeen(state="running", device=f"cpu:{place}"),
        "worker": WorkerSeen(phase="loading" if is_starting else "ready", heard_at=NOW - 0.5),
        "start_sent_at": NOW - 4,
    }
    return PlaceView(**(fields | changes))
