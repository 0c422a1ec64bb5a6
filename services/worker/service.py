"""The worker: takes jobs, asks their owners, runs them on the engine, streams back, drains.

All state lives on the event loop and is moved by one task (`_pump`), which asks `pull_policy.plan` after every event.
The engine runs on its own thread; AMQP callbacks only put deliveries down.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable

import msgspec
import structlog
from opentelemetry.metrics import CallbackOptions, Observation

from services.worker import pull_policy
from services.worker.engine import Delta, EngineRefusal, StepReport
from services.worker.engine_thread import EnginePort, EngineThread
from services.worker.held import (
    Held,
    HeldState,
    finished_message,
    first_requests,
    model_handle,
    model_key,
    next_embed_request,
    parse_sequence_id,
    repeated,
    reported_usage,
    timings,
    to_logprobs,
    to_message,
    usage_message,
)
from services.worker.image_store import ImageStore
from services.worker.model_files import ModelUnavailable
from services.worker.model_loads import ModelLoads
from services.worker.outgoing import DeltaSender, FinishSender, tell_billing
from services.worker.owners import Owners
from services.worker.pins import Pins
from services.worker.pull_snapshot import ModelKey
from services.worker.reports import Reporter
from services.worker.residency import Residency, find_ref, key_of
from services.worker.settings import WorkerSettings
from services.worker.snapshots import take_snapshot
from services.worker.stages import job_attributes, record_stages
from services.worker.taking import Taking
from services.worker.vectors import VectorRefused, pack_vector
from services.worker.window import JobsRate, choose_shared, choose_steps
from shared import telemetry, topology
from shared.broker import Broker, Delivery
from shared.gathering import Gathering
from shared.ids import new_id
from shared.messages import (
    NO_PINS,
    CancelJob,
    DrainWorker,
    Drop,
    EmbedJob,
    Granted,
    JobClaimed,
    JobQueueMessage,
    JobUsage,
    ModelDamaged,
    ModelRef,
    Outcome,
    OwnerBeat,
    RepeatTokens,
    SetPins,
    ShareJobs,
    WeightsRef,
    WorkerBeat,
    WorkerCommand,
    WorkerPhase,
    WorkerSpec,
)
from shared.outcomes import PublishRefused, Unavailable, Unroutable

log = structlog.get_logger()

BEAT_S = 1.0
TICK_S = 0.2
CLAIM_REPEAT_S = 1.0
CLAIM_TRIES = 5
"""After this many claims without an answer the job is put aside, so that a frozen owner blocks no place."""
CLAIM_PAUSE_S = 5.0
WINDOW_S = 1.0
ASIDE_S = 5.0
"""A worker that gave jobs back takes none for that long, so that another one gets them."""
BEGUN = (HeldState.CLAIMING, HeldState.GRANTED, HeldState.RUNNING, HeldState.PAUSED)


class Worker:
    """One replica at one place."""

    def __init__(
        self,
        spec: WorkerSpec,
        settings: WorkerSettings,
        broker: Broker,
        engine: EnginePort,
        images: ImageStore | None = None,
    ) -> None:
        self.spec = spec
        self._settings = settings
        self._broker = broker
        self._engine = EngineThread(engine, self._on_report, self._on_refused)
        self._loads = ModelLoads(self._engine, settings.model_store, images, self._on_damage)
        self._residency = Residency(self._loads, spec.precision)
        self._pins = Pins(spec, self._residency)
        self._sender = DeltaSender(broker, spec.worker_id)
        self._claims = Gathering(broker)
        self._finishes = FinishSender(broker)
        self._commands = topology.worker_commands(spec.worker_id)
        self._held: dict[str, Held] = {}
        self._owners = Owners(broker)
        self._lane_tokens: dict[int, int] = {}
        queues = topology.job_queues(spec.resource_id, pool=spec.pool)
        self._taking = Taking(broker, queues, self._on_job, spec.max_batch)
        self._jobs_rate = JobsRate()
        self._aside_until_s: float | None = None
        self._wake = asyncio.Event()
        self._reporter = Reporter(
            broker, spec, self._held.values, self._residency, self._pins, settings.model_memory_bytes
        )
        self._drained = asyncio.Event()
        self._group: asyncio.TaskGroup
        meter = telemetry.meter()
        self._tokens_counter = meter.create_counter(telemetry.TOKENS, unit="{token}")
        self._attempts_counter = meter.create_counter("roundhouse.worker.jobs", unit="{job}")
        self._queue_wait_s = meter.create_histogram(telemetry.QUEUE_WAIT, unit="s")
        self._swap_s = meter.create_histogram(telemetry.SWAP_DURATION, unit="s")
        meter.create_observable_counter(telemetry.BUSY, [self._observe_busy], unit="s")

    # ---- life

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Load what was asked for, warm up, and begin to take jobs. Tasks end with the group."""
        self._group = group
        self._engine.start()
        group.create_task(self._reporter.run())
        await self._broker.subscribe(self._commands, WorkerCommand, self._on_command, prefetch=0, no_ack=True)
        self._reporter.enter("loading")
        first = await self._preload()
        if first is not None:
            self._reporter.enter("warming")
            await self._warm_up(first)
        group.create_task(self._loads.make_images(lambda: bool(self._held)))
        group.create_task(self._sender.run())
        group.create_task(self._claims.run())
        group.create_task(self._finishes.run())
        group.create_task(self._beats())
        group.create_task(self._pump())
        group.create_task(self._size_window())
        await self._taking.start()
        self._reporter.enter("ready")
        self._loads.prepare(self._pins.known)

    async def _preload(self) -> ModelRef | None:
        """Make a pinned model, or the likeliest one, resident before the worker is ready; the others follow by themselves."""
        for ref in self._pins.first_refs():
            if await self._preload_one(ref):
                return ref
        return None

    async def _warm_up(self, ref: ModelRef) -> None:
        """So that the first job does not pay for what an engine does once; a model that refuses is its jobs' to meet."""
        try:
            await self._engine.warm_up(model_handle(key_of(ref)))
        except EngineRefusal as refusal:
            log.warning("not_warmed_up", model_id=ref.model_id, reason=str(refusal))

    async def _preload_one(self, ref: ModelRef) -> bool:
        parts: list[WeightsRef] = [ref] if ref.base is None else [ref.base, ref]
        try:
            if sum(map(self._residency.size, parts)) > self._settings.model_memory_bytes:
                return False
            for part in parts:
                if not self._residency.is_ready(key_of(part)):
                    await self._residency.load(part)
        except ModelUnavailable as error:
            # The worker serves its other models; jobs of this one are told why.
            log.error("preload_failed", model_id=ref.model_id, reason=str(error))
            return False
        return True

    async def drain(self) -> None:
        """Take no more, give back what has not begun, finish the rest. Idempotent; returns when nothing is left."""
        if self.phase != "draining":
            self._reporter.enter("draining")
            self._pins.replace(NO_PINS)
            await self._taking.stop()
        while self._held:
            # Again and again: a job whose owner did not answer is put aside only later.
            for held in [held for held in self._held.values() if held.state is HeldState.WAITING]:
                await self._give_back(held)
            self._wake.set()
            await asyncio.sleep(0.05)
        self._reporter.enter("drained")
        await self._reporter.report()
        await self._engine.stop()
        self._drained.set()

    async def drained(self) -> None:
        """Return once a drain that the scheduler asked for is complete."""
        await self._drained.wait()

    def _mind_window(self) -> None:
        """What nobody began for so long, and nobody was asked about, another worker may run sooner.

        Whoever gives back takes nothing for a while, and then only with a place free: else the copies came straight back.
        """
        now_s = time.monotonic()
        overdue = [held for held in self._unbegun() if now_s >= held.hold_until_s]
        if overdue:
            self._let_go(overdue)
        elif self._aside_until_s is not None and now_s >= self._aside_until_s:
            begun = [held for held in self._held.values() if held.state in BEGUN]
            if sum(held.places for held in begun) < self.spec.max_batch:
                self._aside_until_s = None
                self._group.create_task(self._take_again())

    def _share(self) -> None:
        """Another worker of the resource has nothing to do."""
        if self.phase == "ready" and (shared := choose_shared(self._unbegun(), time.monotonic())):
            self._let_go(shared)

    def _unbegun(self) -> list[Held]:
        return [
            held for held in self._held.values() if held.state is HeldState.WAITING and held.claims_total == 0
        ]

    def _let_go(self, unbegun: list[Held]) -> None:
        self._aside_until_s = time.monotonic() + ASIDE_S
        for held in unbegun:
            held.state = HeldState.FINISHING
        self._group.create_task(self._stand_aside(unbegun))

    async def _size_window(self) -> None:
        """Hold as many jobs beyond those that run as `window.py` says, for ever."""
        # On a shared pool one lane alone may fill the batch; which lane's jobs run is the policy's business.
        most_jobs = 0 if self.spec.pool else self._settings.lookahead_jobs
        while True:
            await asyncio.sleep(WINDOW_S)
            is_full = sum(held.places for held in self._held.values()) >= self.spec.max_batch
            self._jobs_rate.look(self._reporter.counters.left_jobs, time.monotonic(), is_full=is_full)
            steps = choose_steps(self._jobs_rate.per_s, self._taking.steps, most_jobs)
            oldest_held_s = min((held.received_s for held in self._held.values()), default=time.monotonic())
            try:
                await self._taking.set_steps(steps)
                await self._taking.close_settled(oldest_held_s)
            except Unavailable as error:
                log.info("window_not_changed", error=str(error))

    async def _stand_aside(self, overdue: list[Held]) -> None:
        await self._taking.stand_aside()
        for held in overdue:
            log.info("job_given_back", job_id=held.job.job_id, model_id=held.model[0])
            await self._give_back(held)

    async def _take_again(self) -> None:
        oldest_held_s = min((held.received_s for held in self._held.values()), default=time.monotonic())
        await self._taking.close_settled(oldest_held_s)
        try:
            await self._taking.start()
        except Unavailable as error:
            log.warning("consumers_not_started", error=str(error))
            self._aside_until_s = time.monotonic() + ASIDE_S

    async def _give_back(self, held: Held) -> None:
        """A confirmed copy into the same queue, then the ack: never a requeue. Only when the consumers are cancelled."""
        held.state = HeldState.FINISHING
        given = list(held.deliveries)
        try:
            with telemetry.under(held.span):
                await self._broker.publish(given[0].queue, held.job)
        except (Unavailable, PublishRefused, Unroutable) as error:
            # Unacked, it is delivered to another worker when our connection closes.
            log.warning("give_back_failed", job_id=held.job.job_id, error=str(error))
            if self.phase == "draining":
                self._forget(held)
            else:
                held.state = HeldState.WAITING
                held.hold_until_s = time.monotonic() + self._settings.most_hold_s
            return
        self._forget(held)
        for delivery in given:
            await delivery.ack()
        for delivery in held.deliveries[len(given) :]:
            # It came meanwhile, and may be the copy itself: an ack would lose the job.
            self._on_job(delivery, held.lane)

    # ---- taking jobs

    def _on_job(self, delivery: Delivery, lane: int) -> None:
        job: JobQueueMessage = delivery.message
        if (held := self._held.get(job.job_id)) is not None:
            # Our connection was lost and the broker delivered again, or a second copy exists: same job, same run.
            held.deliveries.append(delivery)
        elif job.deadline_unix_ms <= time.time() * 1000:
            self._reporter.counters.left(is_batch=job.work_class == "batch")
            self._group.create_task(delivery.ack())
        else:
            span = telemetry.start_span_under(
                f"process {delivery.queue}", delivery.headers, attributes=job_attributes(job)
            )
            held = self._held[job.job_id] = Held(job, [delivery], time.monotonic(), lane, span)
            held.hold_until_s = held.received_s + self._settings.most_hold_s
            held.found_ready = self._residency.is_ready(held.model)
            if self._owners.was_lost(job.owner_queue):
                held.not_before_s = held.received_s + CLAIM_PAUSE_S
                self._group.create_task(self._drop_if_owner_is_gone(held))
            self._wake.set()

    async def _drop_if_owner_is_gone(self, held: Held) -> None:
        """A dead gateway may leave a queue full of jobs: they go at once, without a claim for each."""
        try:
            gone = await self._owners.is_gone(held.job.owner_queue)
        except Unavailable:
            return  # it is claimed after the pause, as any other
        if gone:
            self._end(held, "cancelled", "owner_gone", None)
        else:
            held.not_before_s = 0.0
            self._wake.set()

    async def _pump(self) -> None:
        """The one place where jobs and models are moved on."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            self._wake.clear()
            self._drop_unservable()
            plan = pull_policy.plan(
                take_snapshot(self._held.values(), self._residency, self._pins, self._lane_tokens),
                max_sequences=self.spec.max_batch,
                model_memory_bytes=self._settings.model_memory_bytes,
            )
            for key in plan.no_room:
                self._residency.mark_failed(key, "the models pinned here leave no room for it")
            for job_id in plan.pause:
                self._pause(self._held[job_id])
            for job_id in plan.start:
                self._start(self._held[job_id])
            if self.phase == "ready":
                for job_id in plan.claim:
                    self._claim(self._held[job_id], begin_at_once=plan.begin_at_once)
            for key in plan.evict:
                self._group.create_task(self._evict(key))
            for key in plan.load:
                self._group.create_task(self._load(key))
            # Their states change when they begin, and the next plan goes by these: with `_wake` set, nothing else below
            # lets them begin before it.
            await asyncio.sleep(0)
            self._repeat_claims()
            self._mind_window()

    def _drop_unservable(self) -> None:
        now_unix_ms = time.time() * 1000
        for held in list(self._held.values()):
            if held.state in (HeldState.RUNNING, HeldState.FINISHING):
                continue
            is_paused = held.state is HeldState.PAUSED  # it is its owner's to end, as if it ran
            if held.job.deadline_unix_ms <= now_unix_ms and not is_paused:
                self._end(held, "expired", "deadline_exceeded", "the deadline passed before the job ran")
                continue
            try:
                self._residency.size(held.job.model)
            except ModelUnavailable as error:
                self._residency.mark_failed(held.model, str(error))
            # Only after the grant: the owner takes an end from nobody else.
            reason = self._residency.failure(held.model)
            if reason is not None and held.state in (HeldState.GRANTED, HeldState.PAUSED):
                self._end(held, "failed", "model_unavailable", reason)

    async def _load(self, key: ModelKey) -> None:
        waiting = [held for held in self._held.values() if find_ref(held.job.model, key) is not None]
        wanted = [held.job.model for held in waiting] or self._pins.refs()
        ref = next((found for found in (find_ref(each, key) for each in wanted) if found is not None), None)
        if ref is None or key in self._residency.slots():  # meanwhile loaded ahead of need
            return
        unbegun = [held for held in waiting if held.started_unix_ns is None]
        for held in unbegun:
            # An adapter's swap begins with that of its base.
            held.swap_started_unix_ns = held.swap_started_unix_ns or time.time_ns()
        try:
            await self._residency.load(ref)
        except ModelUnavailable:
            pass  # remembered as failed; `_drop_unservable` tells the jobs
        for held in unbegun:
            held.swap_ended_unix_ns = time.time_ns()
        self._wake.set()

    def _on_damage(self, ref: WeightsRef, reason: str) -> None:
        log.error("model_damaged", model_id=ref.model_id, revision=ref.revision, reason=reason)
        self._group.create_task(self._send_alarm(ref, reason))

    async def _take_out(self, key: ModelKey, reason: str) -> None:
        await self._residency.take_out(key, reason)
        self._wake.set()

    async def _send_alarm(self, ref: WeightsRef, reason: str) -> None:
        alarm = ModelDamaged(
            event_id=new_id("evt"),
            worker_id=self.spec.worker_id,
            resource_id=self.spec.resource_id,
            model_id=ref.model_id,
            revision=ref.revision,
            reason=reason,
            found_unix_ms=time.time_ns() // 1_000_000,
        )
        try:
            await self._broker.publish_event(alarm)
        except (Unavailable, PublishRefused, Unroutable) as error:
            log.error("alarm_not_sent", model_id=ref.model_id, error=str(error))

    async def _evict(self, key: ModelKey) -> None:
        try:
            await self._residency.evict(key)
        except ValueError as error:
            log.error("evict_refused", model_id=key[0], error=str(error))
        self._wake.set()

    # ---- claim and grant

    def _claim(self, held: Held, *, begin_at_once: bool) -> None:
        """Ask the owner. What was never delivered before need not wait: the owner takes the first word it hears.

        A job that was delivered before may have been in a crash: which attempt it is, and whether it may run beside
        others, only its owner knows. (The flag may be wrong after a crash of the broker; then attempts still count.)
        """
        held.state = HeldState.CLAIMING
        if not held.claim_id:
            hit = held.found_ready and held.swap_started_unix_ns is None
            self._residency.history.note_claim(held.model, hit=hit)
        held.claim_id = held.claim_id or new_id("clm")
        is_first = held.claims_total == 0 and not held.deliveries[0].redelivered
        if begin_at_once and is_first and self._residency.failure(held.model) is None:
            held.begin(1)
            self._start(held)
        self._send_claim(held)

    def _send_claim(self, held: Held) -> None:
        held.claim_sent_s = time.monotonic()
        held.claims_sent += 1
        held.claims_total += 1
        claim = JobClaimed(
            job_id=held.job.job_id,
            claim_id=held.claim_id,
            worker_id=self.spec.worker_id,
            worker_queue=self._commands.name,
        )
        self._claims.put(held.job.owner_queue, claim)

    def _repeat_claims(self) -> None:
        now_s = time.monotonic()
        for held in list(self._held.values()):
            asked = held.claims_sent > 0 and not held.is_granted
            if not asked or now_s - held.claim_sent_s < CLAIM_REPEAT_S:
                continue
            if held.claims_sent < CLAIM_TRIES or held.state is not HeldState.CLAIMING:
                self._send_claim(held)
            else:
                held.state, held.claims_sent = HeldState.WAITING, 0
                held.not_before_s = now_s + CLAIM_PAUSE_S

    def _on_command(self, delivery: Delivery) -> None:
        match delivery.message:
            case Granted() as granted:
                self._on_granted(granted)
            case Drop() as drop:
                self._on_drop(drop)
            case CancelJob() as cancel:
                self._on_cancel(cancel)
            case RepeatTokens() as repeat:
                held = self._held.get(repeat.job_id)
                if held is not None and held.attempt == repeat.attempt:
                    delta = repeated(held, repeat.choice, repeat.token_start)
                    if delta is not None:
                        self._sender.put(held.job.owner_queue, delta)
            case OwnerBeat() as beat:
                self._on_owner_beat(beat)
            case DrainWorker(incarnation=incarnation):
                if incarnation == self.spec.incarnation:
                    self._group.create_task(self.drain())
            case ShareJobs(incarnation=incarnation):
                if incarnation == self.spec.incarnation:
                    self._share()
            case SetPins(incarnation=incarnation, pins=pins):
                is_new = incarnation == self.spec.incarnation and pins.version != self._pins.version
                if is_new and self.phase not in ("draining", "drained"):
                    self._pins.replace(pins)
                    self._loads.prepare(self._pins.known)
                    self._reporter.report_now()
                    self._wake.set()

    def _unanswered(self, job_id: str, claim_id: str) -> Held | None:
        """The job that this is the first answer for, or None."""
        held = self._held.get(job_id)
        if held is None or held.is_granted or held.claim_id != claim_id or held.claims_sent == 0:
            return None
        return held

    def _on_granted(self, granted: Granted) -> None:
        held = self._unanswered(granted.job_id, granted.claim_id)
        if held is None:
            return
        begun = held.state in (HeldState.RUNNING, HeldState.PAUSED, HeldState.FINISHING)
        if not begun or granted.attempt != held.attempt:
            # Another attempt than the one begun here: what that one did counts for nothing.
            self._stop_sequences(held)
            held.begin(granted.attempt, granted.prior_tokens)
            held.state = HeldState.GRANTED
        held.is_granted = True
        held.answer.set()
        held.span.set_attribute(telemetry.ATTEMPT, granted.attempt)
        self._owners.heard(held.job.owner_queue)
        self._wake.set()

    def _on_drop(self, drop: Drop) -> None:
        held = self._unanswered(drop.job_id, drop.claim_id)
        if held is None:
            return
        log.info("job_dropped", job_id=drop.job_id, reason=drop.reason)
        self._stop_sequences(held)
        own_end = drop.report is not None and drop.report.attempt == held.attempt
        if held.state is HeldState.FINISHING and own_end:
            held.is_granted = True  # the owner took our finish and has forgotten the job since
            held.answer.set()
            return
        held.state = HeldState.FINISHING
        self._group.create_task(self._drop(held, drop))

    async def _drop(self, held: Held, drop: Drop) -> None:
        """Ack a job that its owner does not want run; if a worker finished it, see that billing knows."""
        if drop.report is not None:
            with telemetry.under(held.span):
                usage = reported_usage(held.job, self.spec.worker_id, drop.report)
                await tell_billing(self._broker, usage)
        await self._release(held)
        held.answer.set()  # an end that waited for the owner's word has nothing to report and may go

    def _on_cancel(self, cancel: CancelJob) -> None:
        held = self._held.get(cancel.job_id)
        if held is None or held.attempt != cancel.attempt or held.state is HeldState.FINISHING:
            return
        self._stop_sequences(held)
        held.is_granted = True  # the owner knows this attempt, so it is the one that counts
        held.answer.set()
        if cancel.reason == "replaced":
            # Another attempt goes on: what this one published is that one's to report.
            self._group.create_task(self._release(held))
        else:
            self._end(held, "cancelled", cancel.reason, None)

    # ---- generation

    def _start(self, held: Held) -> None:
        held.state = HeldState.RUNNING
        held.began_s = time.monotonic()
        held.end_pause(time.time_ns())
        self._residency.touch(held.model)
        if held.started_unix_ns is None:
            held.started_unix_ns = time.time_ns()
            self._lane_tokens[held.lane] = self._lane_tokens.get(held.lane, 0) + held.job.input_token_count
        for request in first_requests(held):
            self._engine.add(request)
        self._reporter.runs_changed()

    def _pause(self, held: Held) -> None:
        """Its sequences leave the engine before the next step; `_start` goes on from the tokens that were published."""
        self._stop_sequences(held)
        held.pause()
        self._reporter.runs_changed()
        self._residency.touch(held.model)
        log.info("job_paused", job_id=held.job.job_id, model_id=held.model[0], pauses=held.pauses)

    def _of_this_run(self, sequence_id: str) -> tuple[Held, int] | None:
        """The job, and the index of its choice or input; None for what an earlier attempt or run of it did."""
        job_id, index = parse_sequence_id(sequence_id)
        held = self._held.get(job_id)
        return None if held is None or held.sequence_id(index) != sequence_id else (held, index)

    def _on_refused(self, sequence_id: str, refusal: EngineRefusal) -> None:
        found = self._of_this_run(sequence_id)
        if found is not None and found[0].state is HeldState.RUNNING:
            held, _ = found
            self._stop_sequences(held)
            self._end(held, "failed", refusal.code, str(refusal))

    def _on_report(self, report: StepReport) -> None:
        now_unix_ns = time.time_ns()
        damaged = {model_key(handle): reason for handle, reason in report.damaged.items()}
        for key, reason in damaged.items():
            self._group.create_task(self._take_out(key, reason))
        for sequence_id in report.prefilled:
            if (found := self._of_this_run(sequence_id)) is not None:
                held, choice = found
                held.prefilled.add(choice)
                if held.choices:  # an embedding is nothing but prefill, up to its last input
                    held.prefilled_unix_ns = held.prefilled_unix_ns or now_unix_ns
        for delta in report.deltas:
            found = self._of_this_run(delta.sequence_id)
            if found is None or found[0].state is not HeldState.RUNNING:
                continue
            held, choice = found
            if delta.error is not None:
                self._stop_sequences(held)
                is_damaged = not damaged.keys().isdisjoint(
                    (held.model, self._residency.bases.get(held.model))
                )
                code = "model_unavailable" if is_damaged else "generation_failed"
                self._end(held, "failed", code, delta.error)
                continue
            if isinstance(held.job, EmbedJob):
                self._on_vector(held, held.job, choice, delta)
                continue
            held.first_token_unix_ns = held.first_token_unix_ns or now_unix_ns
            record = held.choices[choice]
            message = to_message(held, choice, delta)
            record.deltas.append(message)
            record.finish_reason = delta.finish_reason
            held.prompt_logprobs += to_logprobs(delta.prompt_logprobs)
            self._reporter.generated(len(delta.tokens))
            self._lane_tokens[held.lane] = self._lane_tokens.get(held.lane, 0) + len(delta.tokens)
            if all(record.finish_reason is not None for record in held.choices):
                self._end(held, "succeeded", None, None)  # carries the last delta too
            else:
                self._sender.put(held.job.owner_queue, message)
        self._count(report)

    def _observe_busy(self, _options: CallbackOptions) -> Iterable[Observation]:
        """The rate of it is the share of its time that a worker computes."""
        yield Observation(self._reporter.counters.busy_s, {telemetry.RESOURCE_ID: self.spec.resource_id})

    def _on_vector(self, held: Held, job: EmbedJob, index: int, delta: Delta) -> None:
        """Keep the vector; the next input takes its place, or the job is done."""
        try:
            held.vectors[index] = pack_vector(delta.embedding, job.dimensions, len(job.inputs))
        except VectorRefused as refusal:
            self._stop_sequences(held)
            self._end(held, "failed", refusal.code, str(refusal))
            return
        if (request := next_embed_request(held, job)) is not None:
            self._engine.add(request)
        if None not in held.vectors:
            self._end(held, "succeeded", None, None)

    def _count(self, report: StepReport) -> None:
        labels = {"model_type": self.spec.model_type}
        self._reporter.counters.prompt_tokens += report.prefill_tokens
        if report.prefill_tokens:
            self._tokens_counter.add(report.prefill_tokens, {**labels, "direction": "input"})
        if report.decode_tokens:
            self._tokens_counter.add(report.decode_tokens, {**labels, "direction": "output"})

    def _stop_sequences(self, held: Held) -> None:
        for sequence_id in held.sequence_ids():
            self._engine.cancel(sequence_id)

    # ---- ends

    def _end(self, held: Held, outcome: Outcome, code: str | None, message: str | None) -> None:
        """Begin the end: the place is free from now on, the facts go out by a task, then the ack."""
        if held.state is HeldState.FINISHING:
            return
        held.state = HeldState.FINISHING
        self._reporter.runs_changed()
        self._residency.touch(held.model)
        self._attempts_counter.add(1, {"outcome": outcome, "model_type": self.spec.model_type})
        self._group.create_task(self._finish(held, outcome, code, message))
        self._wake.set()

    async def _finish(self, held: Held, outcome: Outcome, code: str | None, message: str | None) -> None:
        now_unix_ns = time.time_ns()
        spent = timings(held, now_unix_ns)
        labels = {
            "model_type": self.spec.model_type,
            telemetry.RESOURCE_ID: self.spec.resource_id,
            telemetry.GEN_AI_REQUEST_MODEL: held.job.model.name,
        }
        self._queue_wait_s.record(spent.queue_ms / 1000, labels)
        if held.swap_started_unix_ns is not None:
            self._swap_s.record(spent.swap_ms / 1000, labels)
        record_stages(held, now_unix_ns)
        if held.pauses:
            paused_ms = (held.paused_prefill_ns + held.paused_decode_ns) // 1_000_000
            held.span.set_attributes({telemetry.PAUSES: held.pauses, telemetry.PAUSED_MS: paused_ms})
        held.span.set_attribute(telemetry.GEN_AI_OUTPUT_TOKENS, held.completion_tokens)
        if code is not None:
            held.span.set_attribute(telemetry.ERROR_TYPE, code)
        finished = finished_message(held, self.spec.worker_id, outcome, code, message, spent)
        usage = usage_message(held, self.spec.worker_id, outcome, code, spent)
        with telemetry.under(held.span):
            async with asyncio.TaskGroup() as both:
                both.create_task(self._finishes.tell(held.job.owner_queue, finished))
                both.create_task(self._report_when_granted(held, usage))
        if held.state is HeldState.FINISHING and held.attempt == usage.attempt and self._holds(held):
            await self._release(held)

    async def _report_when_granted(self, held: Held, usage: JobUsage) -> None:
        """Billing hears only of the attempt that the owner counts; one begun at once waits for the owner's word.

        If none comes because the owner is dead, nobody is known to have got anything, and nobody pays for it.
        """
        if usage.attempt > 0:
            await held.answer.wait()
            if not held.is_granted:
                usage = msgspec.structs.replace(
                    usage,
                    outcome="cancelled",
                    error_code="owner_gone",
                    completion_tokens=0,
                    prefill_ran=False,
                )
        if held.attempt == usage.attempt and self._holds(held):
            await tell_billing(self._broker, usage)

    async def _release(self, held: Held) -> None:
        """Ack every copy. The job is not remembered: a late copy is claimed again, and its owner knows best."""
        self._forget(held)
        self._reporter.counters.left(is_batch=held.job.work_class == "batch")
        self._reporter.runs_changed()
        for delivery in held.deliveries:
            await delivery.ack()

    def _holds(self, held: Held) -> bool:
        """Whether it was not dropped meanwhile; a later copy of the job is another `Held`."""
        return self._held.get(held.job.job_id) is held

    def _forget(self, held: Held) -> None:
        if self._held.pop(held.job.job_id, None) is not None:
            held.span.end()
        self._wake.set()

    # ---- signs of life

    def _on_owner_beat(self, beat: OwnerBeat) -> None:
        now_s = time.monotonic()
        self._owners.heard(beat.owner_queue)
        waited_for = set(beat.job_ids)
        for held in list(self._held.values()):
            if held.job.owner_queue != beat.owner_queue or held.job.job_id in waited_for:
                continue
            # A beat that was on its way when the job was granted cannot name it.
            if (
                held.is_granted
                and held.state is not HeldState.FINISHING
                and now_s - held.claim_sent_s > 2 * BEAT_S
            ):
                self._stop_sequences(held)
                self._end(held, "cancelled", "owner_gave_up", None)

    def _lose_owner(self, owner_queue: str, reason: str) -> None:
        """Nobody waits for these jobs any more: stop them; what was published is what is charged."""
        log.warning("owner_lost", owner_queue=owner_queue, reason=reason)
        self._owners.lost(owner_queue)
        for held in list(self._held.values()):
            if held.job.owner_queue == owner_queue:
                self._stop_sequences(held)
                held.answer.set()  # none will come
                self._end(held, "cancelled", reason, None)

    async def _beats(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._engine.watch()
            jobs: dict[str, list[tuple[str, int]]] = {}
            for held in self._held.values():
                if held.is_granted:
                    jobs.setdefault(held.job.owner_queue, []).append((held.job.job_id, held.attempt))
            for owner_queue, attempts in jobs.items():
                try:
                    await self._broker.send(
                        owner_queue, WorkerBeat(worker_id=self.spec.worker_id, jobs=attempts)
                    )
                except Unavailable as error:
                    log.info("beat_not_sent", error=str(error))
            await self._look_after_owners()

    async def _look_after_owners(self) -> None:
        held = self._held.values()
        for owner_queue in self._owners.silent({each.job.owner_queue for each in held if each.is_granted}):
            self._lose_owner(owner_queue, "owner_silent")
        unanswering = {each.job.owner_queue for each in held if not each.is_granted and each.claims_total > 1}
        for owner_queue in await self._owners.absent(unanswering):
            self._lose_owner(owner_queue, "owner_gone")

    @property
    def phase(self) -> WorkerPhase:
        return self._reporter.phase
