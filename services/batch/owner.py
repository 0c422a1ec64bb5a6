"""The batch service as the owner of its lines' jobs: publishes them, answers claims, and gathers the answers.

The decisions are `shared.ownership`'s; this module carries them out. The owner lives as long as its process: what it
held when it died is found in the lines' rows by the next one, which voids it and begins those lines anew.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import structlog

from services.batch.line_run import LineRun
from shared import topology
from shared.broker import Broker, Delivery
from shared.gathering import Gathering
from shared.ids import new_id
from shared.messages import (
    CommandResult,
    Drop,
    FinishedReport,
    JobClaimed,
    JobFinished,
    Outcome,
    OwnerBeat,
    ReplyMessage,
    TokensGenerated,
    WorkerBeat,
)
from shared.outcomes import PublishRefused, PublishUnknown, Unavailable, Unroutable
from shared.ownership import Action, Deliver, End, JobState, OwnedJob, Republish, Send

log = structlog.get_logger()

TICK_S = 0.25
BEAT_S = 1.0
PUBLISH_TIMEOUT_S = 5.0
ENDED_LIMIT = 20_000
"""Jobs whose end is remembered for the claim of a late or second delivery, so that billing hears of them once."""
INBOX_LIMIT = 50_000
LOST_QUEUED_S = 90.0
"""A line that nobody claimed for so long, with its queue empty, was lost on the way: workers hold an unstarted job for at
most 60 s. Should it come after all, the second copy's claim is refused."""
LOOK_FOR_LOST_S = 15.0

Done = Callable[[LineRun], None]
OnResult = Callable[[CommandResult], None]


class LineOwner:
    """All lines that are out. `on_done` is called once for each, when all its jobs are over or one has failed.

    on_result: told the answers to our own commands, which come to the same queue.
    """

    def __init__(self, broker: Broker, on_done: Done, on_result: OnResult) -> None:
        self.instance_id = new_id("bat")
        self._reply_queue = topology.reply_queue(self.instance_id)
        self.queue = self._reply_queue.name
        self._broker = broker
        self._on_done = on_done
        self._on_result = on_result
        self._jobs: dict[str, tuple[LineRun, int]] = {}
        self._runs: dict[str, LineRun] = {}
        self._ended: OrderedDict[str, FinishedReport] = OrderedDict()
        self._inbox: asyncio.Queue[ReplyMessage] = asyncio.Queue(INBOX_LIMIT)
        # Workers repeat their claims, and cancels are repeated by the absence from our beat.
        self._to_workers = Gathering(broker)

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Consume the reply queue and keep the jobs' clocks; ends with the group."""
        await self._broker.subscribe(self._reply_queue, ReplyMessage, self._receive, prefetch=0, no_ack=True)
        group.create_task(self._to_workers.run())
        group.create_task(self._dispatch())
        group.create_task(self._tick())
        group.create_task(self._beat())
        group.create_task(self._look_for_lost())

    def _receive(self, delivery: Delivery) -> None:
        try:
            self._inbox.put_nowait(delivery.message)
        except asyncio.QueueFull:
            # As good as lost on the way: claims are repeated, gaps in the tokens are noticed and mended.
            log.error("reply_dropped", limit=INBOX_LIMIT)

    def __len__(self) -> int:
        """Lines that are out."""
        return len(self._runs)

    def runs(self) -> list[LineRun]:
        """All lines that are out."""
        return list(self._runs.values())

    def runs_of(self, batch_id: str) -> list[LineRun]:
        return [run for run in self._runs.values() if run.prepared.batch.batch_id == batch_id]

    def adopt(self, run: LineRun) -> None:
        """Wait for this line's jobs. Before they are published: a claim may come before the broker's confirm."""
        self._runs[run.job_id] = run
        for index, owned in enumerate(run.owned):
            self._jobs[owned.job.job_id] = (run, index)

    async def publish(self, run: LineRun) -> None:
        """Publish the line's jobs; one that the broker did not take is published again at a later tick."""
        for owned in run.owned:
            try:
                queue = topology.batch_queue_for(owned.job.resource_id)
                await self._broker.publish(queue, owned.job, timeout_s=PUBLISH_TIMEOUT_S)
            except (PublishUnknown, PublishRefused, Unroutable, Unavailable) as error:
                owned.publish_confirmed = False
                log.warning("line_publish_failed", job_id=owned.job.job_id, error=type(error).__name__)

    async def give_up(self, run: LineRun, outcome: Outcome, code: str) -> None:
        """End the line by our own will; its workers stop within a step. `on_done` is not called."""
        self._runs.pop(run.job_id, None)
        for index, owned in enumerate(run.owned):
            self._jobs.pop(owned.job.job_id, None)
            for action in owned.give_up(outcome, code, None, time.monotonic()):
                if isinstance(action, Send):
                    self._to_workers.put(action.queue, action.message)
                elif isinstance(action, End):
                    run.ends[index] = action

    async def _dispatch(self) -> None:
        while True:
            message = await self._inbox.get()
            now_s = time.monotonic()
            match message:
                case TokensGenerated():
                    for delta in message.deltas:
                        if (found := self._jobs.get(delta.job_id)) is not None:
                            owned = found[0].owned[found[1]]
                            await self._act(*found, owned.on_delta(message.worker_id, delta, now_s))
                case JobClaimed():
                    await self._on_claim(message, now_s)
                case JobFinished():
                    if (found := self._jobs.get(message.job_id)) is not None:
                        await self._act(*found, found[0].owned[found[1]].on_finished(message, now_s))
                case WorkerBeat():
                    for job_id, attempt in message.jobs:
                        if (found := self._jobs.get(job_id)) is not None:
                            owned = found[0].owned[found[1]]
                            await self._act(*found, owned.on_beat(message.worker_id, attempt, now_s))
                case CommandResult():
                    self._on_result(message)

    async def _on_claim(self, claim: JobClaimed, now_s: float) -> None:
        if (found := self._jobs.get(claim.job_id)) is not None:
            await self._act(*found, found[0].owned[found[1]].on_claim(claim, now_s))
            return
        report = self._ended.get(claim.job_id)
        reason: Literal["finished", "unknown"] = "finished" if report else "unknown"
        drop = Drop(job_id=claim.job_id, claim_id=claim.claim_id, reason=reason, report=report)
        self._to_workers.put(claim.worker_queue, drop)

    async def _act(self, run: LineRun, index: int, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(queue, message):
                    self._to_workers.put(queue, message)
                case Deliver():
                    run.deliver(index, action)
                case End():
                    await self._end(run, index, action)
                case Republish():
                    await self._republish(run.owned[index])

    async def _end(self, run: LineRun, index: int, end: End) -> None:
        run.ends[index] = end
        owned = run.owned[index]
        self._jobs.pop(owned.job.job_id, None)
        if owned.report is not None:
            self._ended[owned.job.job_id] = owned.report
            if len(self._ended) > ENDED_LIMIT:
                self._ended.popitem(last=False)
        if end.outcome != "succeeded" and not run.is_over:
            await self.give_up(run, "failed", "line_failed")
        if run.is_over:
            self._runs.pop(run.job_id, None)
            self._on_done(run)

    async def _republish(self, owned: OwnedJob) -> None:
        log.warning("job_republished", job_id=owned.job.job_id, attempt=owned.attempt)
        try:
            queue = topology.batch_queue_for(owned.job.resource_id)
            await self._broker.publish(queue, owned.job, timeout_s=1.0)
            owned.publish_confirmed = True
        except (PublishRefused, Unroutable, Unavailable) as error:  # tried again at a later tick
            log.warning("job_republish_failed", job_id=owned.job.job_id, error=type(error).__name__)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_s, connected_for_s = time.monotonic(), self._broker.connected_for_s()
            for run, index in list(self._jobs.values()):
                await self._act(run, index, run.owned[index].on_tick(now_s, connected_for_s))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            held: dict[str, list[str]] = {}
            for job_id, (run, index) in self._jobs.items():
                if (queue := run.owned[index].holder_queue) is not None:
                    held.setdefault(queue, []).append(job_id)
            for queue, job_ids in held.items():
                self._to_workers.put(queue, OwnerBeat(owner_queue=self.queue, job_ids=job_ids))

    async def _look_for_lost(self) -> None:
        """Publish again what nobody claimed although its queue is empty."""
        while True:
            await asyncio.sleep(LOOK_FOR_LOST_S)
            now_s = time.monotonic()
            old: dict[str, list[LineRun]] = {}
            for run in self.runs():
                waits = any(owned.state is JobState.QUEUED for owned in run.owned)
                if waits and now_s - run.sent_s > LOST_QUEUED_S:
                    old.setdefault(run.prepared.resource_id, []).append(run)
            for resource_id, runs in old.items():
                try:
                    if await self._broker.depth(topology.batch_queue_for(resource_id)) > 0:
                        continue
                except Unavailable as error:
                    log.info("queue_not_looked_at", resource_id=resource_id, error=str(error))
                    continue
                for run in runs:
                    run.sent_s = now_s
                    for owned in run.owned:
                        if owned.state is JobState.QUEUED:
                            await self._republish(owned)
