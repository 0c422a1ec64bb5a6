"""The gateway as the owner of live jobs: submits them, answers claims, and hands each client its tokens in order.

The decisions are `shared.ownership`'s; this module carries them out. One task drains the reply queue, one ticks.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import structlog

from shared import telemetry, topology
from shared.broker import Broker, Delivery
from shared.ids import new_id
from shared.inference.errors import ApiError, must_not_retry
from shared.messages import (
    CommandResult,
    Drop,
    FinishedReport,
    JobClaimed,
    JobFinished,
    JobQueueMessage,
    JobVoided,
    Message,
    OwnerBeat,
    ReplyMessage,
    Timings,
    TokenLogprob,
    TokensGenerated,
    WorkerBeat,
)
from shared.outcomes import PublishRefused, PublishUnknown, Unavailable, Unroutable
from shared.ownership import Action, Deliver, End, OwnedJob, Republish, Send

log = structlog.get_logger()

TICK_S = 0.25
BEAT_S = 1.0
PUBLISH_TIMEOUT_S = 5.0
BUSY_RETRY_S = 2
ENDED_LIMIT = 20_000
"""Jobs whose end is remembered for the claim of a late or second delivery, so that billing hears of them once."""
INBOX_LIMIT = 50_000
"""Replies waiting for the dispatcher; as many as the broker's own queue holds."""

AbandonReason = Literal["client_gone", "deadline", "failed"]
Void = Callable[[JobVoided, dict[str, str]], Awaitable[None]]
"""Writes the fact to the outbox with the trace headers; never raises for a database that is away."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New tokens of one choice; `text` may be empty while half a character or a stop string is held back."""

    choice: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a stream; exactly one, always last."""

    outcome: str
    error_code: str | None
    error_message: str | None
    completion_tokens: int
    finish_reasons: tuple[str | None, ...]
    timings: Timings
    prompt_logprobs: tuple[TokenLogprob, ...]
    embeddings: tuple[bytes, ...] = ()


JobEvent = TextDelta | Finished


class OwnedStream:
    """One job's events, for one reader. Its buffer is bounded by the job's own token limit."""

    def __init__(self, owner: Owner, owned: OwnedJob, queue: topology.Queue) -> None:
        self._owner = owner
        self.owned = owned
        self.queue = queue
        self.trace_headers: dict[str, str] = telemetry.inject_headers()
        self._events: deque[JobEvent] = deque()
        self._wake = asyncio.Event()
        self._delivered_tokens = 0
        self._reader_done = False
        self._voided = False

    def __aiter__(self) -> AsyncIterator[JobEvent]:
        return self._read()

    async def _read(self) -> AsyncIterator[JobEvent]:
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Finished):
                    self._reader_done = True
                yield event
                if self._reader_done:
                    return
            self._wake.clear()
            await self._wake.wait()

    def push(self, event: JobEvent) -> None:
        self._events.append(event)
        self._wake.set()

    def pending(self) -> bool:
        """Whether an event can be read without waiting."""
        return bool(self._events)

    def delivered(self, tokens: int) -> None:
        """Count completion tokens that were written to the client (over all choices)."""
        self._delivered_tokens += tokens

    async def abandon(self, reason: AbandonReason) -> None:
        """The client does not get the finish: stop the worker and tell billing what was delivered. Idempotent."""
        if self._voided:
            return
        self._voided = True
        await self._owner.abandon(self, reason, self._delivered_tokens)


class Owner:
    """All live jobs of this gateway instance."""

    def __init__(
        self, broker: Broker, void: Void, on_command_result: Callable[[CommandResult], None]
    ) -> None:
        self.instance_id = new_id("gw")
        self._reply_queue = topology.reply_queue(self.instance_id)
        self.queue = self._reply_queue.name
        self._broker = broker
        self._void = void
        self._on_command_result = on_command_result
        self._streams: dict[str, OwnedStream] = {}
        self._ended: OrderedDict[str, FinishedReport] = OrderedDict()
        self._inbox: asyncio.Queue[ReplyMessage] = asyncio.Queue(INBOX_LIMIT)

    def __len__(self) -> int:
        return len(self._streams)

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Consume the reply queue and keep the jobs' clocks; ends with the group."""
        await self._broker.subscribe(self._reply_queue, ReplyMessage, self._receive, prefetch=0, no_ack=True)
        group.create_task(self._dispatch())
        group.create_task(self._tick())
        group.create_task(self._beat())

    def _receive(self, delivery: Delivery) -> None:
        try:
            self._inbox.put_nowait(delivery.message)
        except asyncio.QueueFull:
            # As good as lost on the way: claims are repeated, gaps in the tokens are noticed and mended.
            log.error("reply_dropped", limit=INBOX_LIMIT)

    async def submit(self, job: JobQueueMessage, queue: topology.Queue) -> OwnedStream:
        """Publish the job and return its stream. Raises `ApiError` when the job was certainly not accepted."""
        now_s = time.monotonic()
        deadline_s = now_s + max(0.0, (job.deadline_unix_ms - time.time() * 1000) / 1000)
        stream = OwnedStream(self, OwnedJob(job, deadline_s=deadline_s, now_s=now_s), queue)
        self._streams[job.job_id] = stream
        try:
            await self._broker.publish(queue, job, timeout_s=PUBLISH_TIMEOUT_S)
        except PublishUnknown as error:
            # It may be in the queue: wait as if accepted, publish again when the broker is back, refuse doubles.
            stream.owned.publish_confirmed = False
            log.warning("publish_unknown", job_id=job.job_id, error=str(error))
        except (PublishRefused, Unroutable, Unavailable) as error:
            self._streams.pop(job.job_id, None)
            raise _refusal(error) from error
        except asyncio.CancelledError:
            # The client went while the confirm was on its way: the job may be in the queue.
            await asyncio.shield(stream.abandon("client_gone"))
            raise
        return stream

    async def abandon(self, stream: OwnedStream, reason: AbandonReason, delivered_tokens: int) -> None:
        job = stream.owned.job
        outcome: Literal["cancelled", "expired", "failed"] = (
            "cancelled" if reason == "client_gone" else "expired" if reason == "deadline" else "failed"
        )
        await self._act(stream, stream.owned.give_up(outcome, reason, None, time.monotonic()))
        self._streams.pop(job.job_id, None)
        await self._void(_voided(stream.owned, reason, delivered_tokens), stream.trace_headers)

    async def fail_queued(self, resource_id: str, code: str, message: str) -> int:
        """End all jobs of a resource that no worker runs yet (it was turned off); return how many."""
        ended = 0
        for stream in list(self._streams.values()):
            if stream.owned.job.resource_id == resource_id and stream.owned.attempt == 0:
                actions = stream.owned.give_up("failed", code, message, time.monotonic())
                await self._act(stream, actions)
                ended += bool(actions)
        return ended

    async def _dispatch(self) -> None:
        while True:
            message = await self._inbox.get()
            now_s = time.monotonic()
            match message:
                case TokensGenerated():
                    for delta in message.deltas:
                        if (stream := self._streams.get(delta.job_id)) is not None:
                            await self._act(stream, stream.owned.on_delta(message.worker_id, delta, now_s))
                case JobClaimed():
                    await self._on_claim(message, now_s)
                case JobFinished():
                    if (stream := self._streams.get(message.job_id)) is not None:
                        await self._act(stream, stream.owned.on_finished(message, now_s))
                case WorkerBeat():
                    for job_id, attempt in message.jobs:
                        if (stream := self._streams.get(job_id)) is not None:
                            await self._act(stream, stream.owned.on_beat(message.worker_id, attempt, now_s))
                case CommandResult():
                    self._on_command_result(message)

    async def _on_claim(self, claim: JobClaimed, now_s: float) -> None:
        stream = self._streams.get(claim.job_id)
        if stream is not None:
            await self._act(stream, stream.owned.on_claim(claim, now_s))
            return
        report = self._ended.get(claim.job_id)
        reason: Literal["finished", "unknown"] = "finished" if report else "unknown"
        drop = Drop(job_id=claim.job_id, claim_id=claim.claim_id, reason=reason, report=report)
        await self._send(claim.worker_queue, drop)

    async def _act(self, stream: OwnedStream, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(queue, message):
                    await self._send(queue, message)
                case Deliver(choice, tokens, text, logprobs, finish_reason):
                    stream.push(TextDelta(choice, text, tokens, logprobs, finish_reason))
                case End():
                    await self._end(stream, action)
                case Republish():
                    await self._republish(stream)

    async def _send(self, queue: str, message: Message) -> None:
        try:
            await self._broker.send(queue, message)
        except Unavailable as error:
            # Workers repeat their claims, and cancels are repeated by the absence from our beat.
            log.info("worker_message_not_sent", queue=queue, error=str(error))

    async def _end(self, stream: OwnedStream, end: End) -> None:
        self._streams.pop(stream.owned.job.job_id, None)
        if stream.owned.report is not None:
            self._ended[stream.owned.job.job_id] = stream.owned.report
            if len(self._ended) > ENDED_LIMIT:
                self._ended.popitem(last=False)
        completion_tokens = sum(len(tokens) for tokens in stream.owned.tokens)
        stream.push(
            Finished(
                end.outcome,
                end.error_code,
                end.error_message,
                completion_tokens,
                stream.owned.finish_reasons,
                end.timings,
                end.prompt_logprobs,
                end.embeddings,
            )
        )
        if not end.by_worker:
            # No worker's finish will tell billing how this ended (and if one comes late, this decides).
            await stream.abandon("deadline" if end.outcome == "expired" else "failed")

    async def _republish(self, stream: OwnedStream) -> None:
        log.warning("job_republished", job_id=stream.owned.job.job_id, attempt=stream.owned.attempt)
        try:
            with telemetry.remote_context(stream.trace_headers):
                await self._broker.publish(stream.queue, stream.owned.job, timeout_s=1.0)
            stream.owned.publish_confirmed = True
        except (PublishRefused, Unroutable, Unavailable) as error:  # tried again at a later tick
            log.warning("job_republish_failed", job_id=stream.owned.job.job_id, error=str(error))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_s, connected_for_s = time.monotonic(), self._broker.connected_for_s()
            for stream in list(self._streams.values()):
                await self._act(stream, stream.owned.on_tick(now_s, connected_for_s))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            held: dict[str, list[str]] = {}
            for job_id, stream in self._streams.items():
                if (queue := stream.owned.holder_queue) is not None:
                    held.setdefault(queue, []).append(job_id)
            for queue, job_ids in held.items():
                await self._send(queue, OwnerBeat(owner_queue=self.queue, job_ids=job_ids))


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, PublishRefused):
        return ApiError(429, "queue_full", "The resource's queue is full.", retry_after_s=BUSY_RETRY_S)
    if isinstance(error, Unroutable):
        return must_not_retry(ApiError(409, "resource_off", "The resource no longer exists."))
    return ApiError(
        503, "service_unavailable", "The message broker is not reachable.", retry_after_s=BUSY_RETRY_S
    )


def _voided(owned: OwnedJob, reason: AbandonReason, delivered_tokens: int) -> JobVoided:
    job = owned.job
    return JobVoided(
        event_id=f"void_{job.job_id}",
        job_id=job.job_id,
        request_id=job.request_id,
        team_id=job.team_id,
        key_id=job.key_id,
        resource_id=job.resource_id,
        billing=job.billing,
        work_class=job.work_class,
        operation=job.operation,
        model_type=job.model_type,
        model_id=job.model.model_id,
        model_name=job.model.name,
        revision=job.model.revision,
        reason=reason,
        prompt_tokens=job.input_token_count,
        delivered_tokens=delivered_tokens,
        accepted_unix_ms=job.accepted_unix_ms,
        voided_unix_ms=time.time_ns() // 1_000_000,
        lease_ids=job.lease_ids,
        reserved_nanousd=job.reserved_nanousd,
        had_worker=owned.attempt > 0,
    )
