"""Pure: how long a job of a resource waits for its model, by what its workers measured of their loads."""

from __future__ import annotations

from collections.abc import Iterable

from shared.messages import WorkerReport


def mean_swap_s(reports: Iterable[WorkerReport]) -> float:
    """Seconds that a job waits for its model on average: the usual load of each model, weighed by the jobs that it was loaded for."""
    waited_ms = jobs = 0
    for report in reports:
        for model in report.history:
            waited_ms += model.misses * model.load_ms_p50
            jobs += model.misses + model.hits
    return waited_ms / 1000 / jobs if jobs else 0.0
