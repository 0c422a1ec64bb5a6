"""What the worker tells the scheduler: its phase, its load and its models, every second and at once on a change."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection

import structlog

from services.worker.held import Held, HeldState
from services.worker.pins import Pins
from services.worker.residency import Residency
from services.worker.work_counters import WorkCounters
from shared.broker import Broker
from shared.messages import WorkerPhase, WorkerReport, WorkerSpec
from shared.outcomes import Unavailable

log = structlog.get_logger()

INTERVAL_S = 1.0
KEPT_SHARE = 0.7
"""Weight of what was before in the running mean of tokens per second."""


class Reporter:
    """Owns the worker's phase; reads everything else."""

    def __init__(
        self,
        broker: Broker,
        spec: WorkerSpec,
        held: Callable[[], Collection[Held]],
        residency: Residency,
        pins: Pins,
        model_memory_bytes: int,
    ) -> None:
        self._broker = broker
        self._spec = spec
        self._held = held
        self._residency = residency
        self._pins = pins
        self._model_memory_bytes = model_memory_bytes
        self._now = asyncio.Event()
        self._tokens = 0
        self._tokens_per_s = 0.0
        self.counters = WorkCounters()
        self.phase: WorkerPhase = "starting"

    def enter(self, phase: WorkerPhase) -> None:
        self.phase = phase
        log.info("worker_phase", phase=phase)
        self._now.set()

    def report_now(self) -> None:
        """Something changed that somebody waits to hear of."""
        self._now.set()

    def generated(self, tokens: int) -> None:
        self._tokens += tokens
        self.counters.completion_tokens += tokens

    def runs_changed(self) -> None:
        """Some job began to run, or stopped."""
        sequences = sum(each.places for each in self._held() if each.state is HeldState.RUNNING)
        self.counters.run(sequences, time.monotonic())

    async def run(self) -> None:
        """Report until cancelled."""
        last_s = time.monotonic()
        while True:
            await self.report()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._now.wait()
            self._now.clear()
            now_s = time.monotonic()
            rate = self._tokens / max(now_s - last_s, 1e-3)
            self._tokens_per_s = KEPT_SHARE * self._tokens_per_s + (1 - KEPT_SHARE) * rate
            self._tokens, last_s = 0, now_s

    async def report(self) -> None:
        """Send one report; while the broker is away there is nobody to read it."""
        self.runs_changed()
        counters = self.counters
        held = self._held()
        pinned, preload = self._pins.report()
        running = [each for each in held if each.state in (HeldState.RUNNING, HeldState.PAUSED)]
        of_batches = [each for each in held if each.job.work_class == "batch"]
        report = WorkerReport(
            worker_id=self._spec.worker_id,
            resource_id=self._spec.resource_id,
            place=self._spec.place,
            incarnation=self._spec.incarnation,
            phase=self.phase,
            sent_unix_ms=time.time_ns() // 1_000_000,
            running_jobs=len(running),
            held_jobs=len(held),
            remaining_tokens=sum(each.remaining_tokens() for each in running),
            tokens_per_s=round(self._tokens_per_s, 3),
            running_sequences=counters.sequences,
            waiting_jobs=sum(_waits(each) for each in held),
            completion_tokens=counters.completion_tokens,
            prompt_tokens=counters.prompt_tokens,
            left_jobs=counters.left_jobs,
            stream_s=round(counters.stream_s, 3),
            batch_held_jobs=len(of_batches),
            batch_waiting_jobs=sum(_waits(each) for each in of_batches),
            batch_sequences=sum(each.places for each in of_batches if each.state is HeldState.RUNNING),
            batch_left_jobs=counters.batch_left_jobs,
            models=self._residency.report(),
            history=self._residency.history.report(),
            model_memory_bytes=self._model_memory_bytes,
            pins_version=self._pins.version,
            pinned=pinned,
            preload=preload,
        )
        try:
            await self._broker.send_event(report)
        except Unavailable as error:
            log.info("report_not_sent", error=str(error))


def _waits(held: Held) -> bool:
    """Not begun, or paused."""
    return held.state not in (HeldState.RUNNING, HeldState.FINISHING)
