"""The leader's loop: hold the lease, look, decide, store, send; again at once while there is something to do.

One task does all of it in turn, so that a leader that cannot get its work done cannot keep the lease either.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog

from services.scheduler.actions import (
    Action,
    FreePlace,
    NotePlace,
    NoteScaling,
    ProveInterval,
    SendStart,
    SendStop,
)
from services.scheduler.fleet import Fleet, Watch
from services.scheduler.handlers import delete_job_queues
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.models_look import ModelsLook
from services.scheduler.pin_keeper import PinKeeper
from services.scheduler.residency_keeper import ResidencyKeeper
from services.scheduler.scaling_keeper import ScalingKeeper
from services.scheduler.sharing import Sharing
from services.scheduler.snapshot import (
    Decided,
    Heard,
    Memory,
    Stored,
    StoredResource,
    decide_all,
    stray_stops,
)
from services.scheduler.store import Store
from services.scheduler.views import Limits, PlaceView
from services.scheduler.writes import StaleView
from shared import topology
from shared.broker import Broker
from shared.lease import Fenced, Lease
from shared.messages import NO_PINS, DrainWorker, Message, StartWorker, StopWorker, WorkerSpec
from shared.outcomes import Unavailable

log = structlog.get_logger()

START_DEADLINE_S = 10.0
LOOKS_IN_A_ROW = 8
"""Enough for any chain of steps (free, grant, send); the lease is looked after in between."""
NODES_NOTED_EVERY_S = 2.0
PRUNE_EVERY_S = 60.0
FORGET_EVERY_S = 60.0
HOLDS_EVERY_S = 2.0


class Leader:
    def __init__(
        self,
        broker: Broker,
        store: Store,
        residency: ResidencyKeeper,
        pins: PinKeeper,
        scaling: ScalingKeeper,
        lease: Lease,
        fleet: Fleet,
        limits: Limits,
        metrics: SchedulerMetrics,
        tick_s: float,
    ) -> None:
        self._broker = broker
        self._store = store
        self._models = ModelsLook(residency, pins, metrics.failed)
        self._pins = pins
        self._scaling = scaling
        self._lease = lease
        self._fleet = fleet
        self._limits = limits
        self._metrics = metrics
        self._tick_s = tick_s
        self._watch = Watch()
        self._sharing = Sharing()
        self._start_sent_at: dict[str, float] = {}
        self._stop_sent_at: dict[str, float] = {}
        self._last_exit_at: dict[str, float] = {}
        self._queues_checked_for: int | None = None
        self._nodes_noted_s = 0.0
        self._pruned_s = 0.0
        self._holds_s = 0.0
        self._forgot_s = 0.0

    async def run(self) -> None:
        """Lead when the lease is free, until cancelled. A dependency that is away is waited for."""
        while True:
            self._fleet.changed.clear()
            try:
                if await self._lease.ensure():
                    await self._lead()
                else:
                    self._scaling.forget()
                self._forget_silent()
            except Fenced as error:
                log.warning("write_refused", fence=str(error))
                self._lease.lose()
            except Unavailable as error:
                self._metrics.failed("unavailable")
                log.warning("reconcile_waits", error=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick_s):
                    await self._fleet.changed.wait()

    async def _lead(self) -> None:
        if self._queues_checked_for != self._lease.epoch and self._broker.connected:
            await self._check_queues()
        if time.monotonic() - self._holds_s > HOLDS_EVERY_S:
            self._holds_s = time.monotonic()
            for resource_id in await self._store.end_holds():
                log.warning("hold_ended", resource_id=resource_id)
        for _ in range(LOOKS_IN_A_ROW):
            if not await self._look():
                break
            if not await self._lease.ensure():
                return
        if time.monotonic() - self._pruned_s > PRUNE_EVERY_S:
            self._pruned_s = time.monotonic()
            await self._store.prune()

    def _forget_silent(self) -> None:
        """A standby hears all reports, too, and for as long as it lives."""
        now_s = time.monotonic()
        if now_s - self._forgot_s > FORGET_EVERY_S:
            self._forgot_s = now_s
            self._fleet.forget_old(now_s)

    async def _check_queues(self) -> None:
        """Once per term: every resource has its queues (the broker may have lost its disk), deleted ones have none."""
        epoch = self._lease.epoch
        for resource_id, (pool, deleted) in (await self._store.job_queue_owners()).items():
            if deleted:
                await delete_job_queues(self._broker, resource_id)
            else:
                await self._broker.declare(topology.job_queues(resource_id, pool=pool))
        self._queues_checked_for = epoch

    async def _look(self) -> bool:
        """Look at everything once; return whether something changed that calls for another look at once."""
        started_s = time.monotonic()
        # Before the rows, not after: see `stray_stops`.
        nodes, workers = dict(self._fleet.nodes), dict(self._fleet.workers)
        since_s = self._watch.look(is_connected=self._broker.connected, now_s=started_s)
        stored = await self._store.load()
        shift_s = stored.now - time.monotonic()
        heard = Heard(
            nodes={k: (v.report, v.heard_at + shift_s) for k, v in nodes.items()},
            workers={k: (v.report, v.heard_at + shift_s) for k, v in workers.items()},
            observing_since=None if since_s is None else since_s + shift_s,
        )
        await self._look_at_models(stored, heard)
        scaling = self._scaling.states(stored, heard)
        memory = Memory(self._start_sent_at, self._stop_sent_at, self._last_exit_at, scaling)
        changed = False
        for decided in decide_all(stored, heard, memory, self._limits):
            changed |= await self._act(decided, stored.now)
        for stop in stray_stops(stored, heard, memory, self._limits):
            log.warning("stray_worker_stopped", node_id=stop.node_id, incarnation=stop.incarnation)
            await self._send_stop(stop, stored.now)
        if time.monotonic() - self._nodes_noted_s > NODES_NOTED_EVERY_S:
            self._nodes_noted_s = time.monotonic()
            await self._store.note_nodes(heard.nodes.values())
        self._forget_sent(stored)
        self._metrics.looked(stored, time.monotonic() - started_s)
        return changed

    async def _look_at_models(self, stored: Stored, heard: Heard) -> None:
        """Which models are where, and which shall be; before places are decided about, whose starts name them."""
        await self._models.follow(stored, heard.workers)
        for message in self._pins.to_tell(stored, heard.workers, time.monotonic()):
            await self._send(topology.worker_commands(message.worker_id), message)
        for asked in self._sharing.to_ask(stored, heard.workers, stored.now):
            await self._send(topology.worker_commands(asked.worker_id), asked)

    async def _act(self, decided: Decided, now: float) -> bool:
        """Store what was decided about one resource, then send. A failure of one holds up no other."""
        resource_id = decided.resource.resource_id
        try:
            if decided.error is not None:
                raise decided.error
            await self._store.apply(decided)
        except StaleView as error:
            log.info("decision_stale", resource_id=resource_id, error=str(error))
            return False
        except (Fenced, Unavailable):
            raise
        except Exception:
            self._metrics.failed("bug")
            log.exception("resource_not_reconciled", resource_id=resource_id)
            return False
        self._metrics.decided(decided.actions)
        places = {place.incarnation: place for place in decided.view.places}
        for action in decided.actions:
            match action:
                case SendStart():
                    await self._send_start(decided.resource, places[action.incarnation], now)
                case SendStop():
                    await self._send_stop(action, now)
                case NoteScaling():
                    self._scaling.remember(resource_id, action, now)
                case FreePlace() if action.unexpected:
                    self._last_exit_at[resource_id] = now
        return any(_calls_for_another_look(action) for action in decided.actions)

    async def _send_start(self, resource: StoredResource, place: PlaceView, now: float) -> None:
        spec = WorkerSpec(
            worker_id=place.worker_id,
            resource_id=resource.resource_id,
            place=place.place,
            incarnation=place.incarnation,
            pool=resource.pool,
            model_type=resource.model_type,
            precision=resource.precision,  # type: ignore[arg-type] # checked by the column
            device_kind=resource.device_kind,  # type: ignore[arg-type]
            max_batch=resource.max_batch,
            max_context_tokens=resource.max_context_tokens,
            kv_tokens=resource.kv_tokens,
            preload=await self._store.models_to_preload(resource),
            pins=self._pins.sets.get(place.incarnation, NO_PINS),
        )
        start = StartWorker(
            node_id=place.node_id,
            epoch=self._epoch(),
            deadline_unix_ms=_unix_ms_in(START_DEADLINE_S),
            spec=spec,
        )
        if await self._send(topology.node_commands(place.node_id), start):
            self._start_sent_at[place.incarnation] = now

    async def _send_stop(self, stop: SendStop, now: float) -> None:
        if stop.drain:
            await self._send(
                topology.worker_commands(stop.worker_id),
                DrainWorker(worker_id=stop.worker_id, incarnation=stop.incarnation),
            )
        command = StopWorker(
            node_id=stop.node_id, epoch=self._epoch(), incarnation=stop.incarnation, grace_s=stop.grace_s
        )
        if await self._send(topology.node_commands(stop.node_id), command):
            self._stop_sent_at[stop.incarnation] = now

    async def _send(self, queue: topology.Queue, message: Message) -> bool:
        try:
            await self._broker.send(queue, message)
        except Unavailable as error:
            log.info("command_not_sent", queue=queue.name, error=str(error))
            return False
        return True

    def _epoch(self) -> int:
        if self._lease.epoch is None:
            raise Fenced("not the leader")
        return self._lease.epoch

    def _forget_sent(self, stored: Stored) -> None:
        """Keep only what is about places that are there, and strays of the last minutes."""
        known = {place.incarnation for place in stored.places}
        for sent in (self._start_sent_at, self._stop_sent_at):
            for incarnation in [k for k, at in sent.items() if k not in known and stored.now - at > 60.0]:
                del sent[incarnation]
        for resource_id in [k for k, at in self._last_exit_at.items() if stored.now - at > 60.0]:
            del self._last_exit_at[resource_id]


def _calls_for_another_look(action: Action) -> bool:
    """Whether the action makes a new state from which more may follow."""
    return not isinstance(action, NotePlace | NoteScaling | ProveInterval | SendStart | SendStop)


def _unix_ms_in(seconds: float) -> int:
    return time.time_ns() // 1_000_000 + int(seconds * 1000)
