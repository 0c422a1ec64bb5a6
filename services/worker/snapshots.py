"""From what the worker holds to what its decisions see (`pull_snapshot.py`)."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from services.worker.held import Held, HeldState
from services.worker.pins import Pins
from services.worker.pull_snapshot import ModelSlot, RunningJob, Snapshot, WaitingJob
from services.worker.residency import Residency


def take_snapshot(
    held: Collection[Held], residency: Residency, pins: Pins, lane_tokens: Mapping[int, int]
) -> Snapshot:
    """Also tells `residency` which models have work at this moment: their turns run from it."""
    now_s = time.monotonic()
    waiting, running, claimed = [], [], 0
    for each in held:
        match each.state:
            case HeldState.WAITING | HeldState.GRANTED | HeldState.PAUSED:
                waiting.append(_waiting_job(each, now_s))
            case HeldState.CLAIMING:
                claimed += each.places
                waiting.append(_waiting_job(each, now_s))
            case HeldState.RUNNING:
                running.append(_running_job(each, now_s))
    # Also of jobs whose owners do not answer: a turn that did not run would keep the device for them for ever.
    residency.note_work({job.model for job in waiting} | {job.model for job in running})
    pinned, preloads = pins.pinned_s(), pins.preloads()  # before the sizes, which they make known
    failed = {each.model for each in held if residency.failure(each.model) is not None}
    models = residency.slots()
    for key in failed:
        # A failed model counts as ready, so that its jobs are claimed and then told why.
        models.setdefault(key, ModelSlot("ready", 0, now_s))
    sizes = {key: size for key, size in residency.sizes().items() if key not in failed}
    return Snapshot(
        waiting,
        running,
        claimed,
        models,
        sizes,
        lane_tokens,
        residency.swap_costs(sizes),
        pinned,
        residency.bases,
        preloads,
        residency.since_load_s(),
    )


def _waiting_job(held: Held, now_s: float) -> WaitingJob:
    claimable = held.state is HeldState.WAITING and now_s >= held.not_before_s
    return WaitingJob(
        job_id=held.job.job_id,
        model=held.model,
        work_class=held.job.work_class,
        sequences=held.places,
        waited_s=now_s - (held.paused_s or held.received_s),
        lane=held.lane,
        attempt=held.attempt,
        claimable=claimable,
        is_paused=held.state is HeldState.PAUSED,
    )


def _running_job(held: Held, now_s: float) -> RunningJob:
    return RunningJob(
        job_id=held.job.job_id,
        model=held.model,
        sequences=held.places,
        attempt=held.attempt,
        work_class=held.job.work_class,
        ran_s=now_s - held.began_s,
    )
