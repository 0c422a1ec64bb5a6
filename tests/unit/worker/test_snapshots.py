from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import msgspec
from opentelemetry import trace

from services.worker.held import Held, HeldState
from services.worker.pins import Pins
from services.worker.pull_snapshot import ModelKey
from services.worker.residency import Residency
from services.worker.snapshots import take_snapshot
from tests.integration.worker_process import stub_job

NO_PINS = cast(Pins, SimpleNamespace(pinned_s=dict, preloads=list))


class ResidencyPart:
    """What a snapshot asks of it, with one model that failed."""

    def __init__(self, failed: ModelKey) -> None:
        self._failed = failed
        self.with_work: set[ModelKey] = set()
        self.bases: dict[ModelKey, ModelKey] = {("m-waiting", 1): ("m-base", 1)}

    def note_work(self, keys: set[ModelKey]) -> None:
        self.with_work = keys

    def failure(self, key: ModelKey) -> str | None:
        return "broken" if key == self._failed else None

    def slots(self) -> dict[ModelKey, Any]:
        return {}

    def sizes(self) -> dict[ModelKey, int]:
        return {self._failed: 1, ("m-waiting", 1): 1}

    def swap_costs(self, keys: object) -> dict[ModelKey, float]:
        return {}

    def since_load_s(self) -> float:
        return 0.25


def held(state: HeldState, model_id: str, **fields: Any) -> Held:
    job = stub_job("replies.v1.owner", "res_1", max_tokens=8)
    job = msgspec.structs.replace(
        job, job_id=f"job_{model_id}", model=msgspec.structs.replace(job.model, model_id=model_id)
    )
    return Held(job, [], time.monotonic(), 0, trace.INVALID_SPAN, state=state, **fields)


def test_what_is_held_is_seen_by_what_it_does_and_its_models_have_work() -> None:
    jobs = [
        held(HeldState.WAITING, "m-waiting"),
        held(HeldState.WAITING, "m-aside", not_before_s=time.monotonic() + 60),
        held(HeldState.CLAIMING, "m-claiming"),
        held(HeldState.PAUSED, "m-paused", attempt=1),
        held(HeldState.RUNNING, "m-running", attempt=1),
        held(HeldState.FINISHING, "m-finishing", attempt=1),
        held(HeldState.GRANTED, "m-failed", attempt=1),
    ]
    residency = ResidencyPart(("m-failed", 1))
    seen = take_snapshot(jobs, cast(Residency, residency), NO_PINS, {})
    assert {job.model[0]: (job.claimable, job.is_paused) for job in seen.waiting} == {
        "m-waiting": (True, False),
        "m-aside": (False, False),
        "m-claiming": (False, False),
        "m-paused": (False, True),
        "m-failed": (False, False),
    }
    assert [job.model[0] for job in seen.running] == ["m-running"]
    assert seen.claimed_sequences == 1
    assert {key[0] for key in residency.with_work} == {each.model[0] for each in jobs} - {"m-finishing"}
    # The failed one is there, so that its jobs are claimed and told, and cannot be loaded.
    assert (seen.models["m-failed", 1].state, seen.models["m-failed", 1].weight_bytes) == ("ready", 0)
    assert set(seen.sizes) == {("m-waiting", 1)}
    assert seen.since_swap_s == 0.25
    assert seen.bases == {("m-waiting", 1): ("m-base", 1)}
