"""The jobs of one request while they run: submits them, merges their events, and accounts for a client that leaves.

Use it as a context: whatever ends the body before `complete()` voids every job whose answer the client does not have.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from services.gateway.owner import AbandonReason, Finished, JobEvent
from shared.inference.errors import ApiError
from shared.inference.responses import usage_of
from shared.messages import GenerateJob, JobQueueMessage
from shared.topology import Queue


class JobStream(Protocol):
    """What of `owner.OwnedStream` is used here."""

    def __aiter__(self) -> AsyncIterator[JobEvent]:
        """Goes on where the last iterator stopped: one may be cancelled while it waits, and no event is lost."""

    def pending(self) -> bool: ...

    def delivered(self, tokens: int) -> None: ...

    async def abandon(self, reason: AbandonReason) -> None: ...


class JobOwner(Protocol):
    queue: str

    async def submit(self, job: JobQueueMessage, queue: Queue) -> JobStream: ...


class Reserved(Protocol):
    """What of `shared.budgets.gate.Reservation` is used here."""

    @property
    def jobs(self) -> Sequence[JobQueueMessage]: ...

    def published(self, index: int) -> None: ...

    def resolve(self) -> None: ...


class Generation:
    """`finished[i]` is the end of job i, or None while it runs."""

    def __init__(self, owner: JobOwner, reserved: Reserved, queue: Queue) -> None:
        self.jobs = reserved.jobs
        self.finished: list[Finished | None] = [None] * len(self.jobs)
        self._reserved = reserved
        self._owner = owner
        self._queue = queue
        self._streams: dict[int, JobStream] = {}
        self._single: AsyncIterator[JobEvent] | None = None
        self._merged: asyncio.Queue[tuple[int, JobEvent]] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []
        self._complete = False
        self._reason: AbandonReason = "failed"

    async def __aenter__(self) -> Self:
        try:
            if len(self.jobs) == 1:
                await self._submit(0)
            else:
                await self._submit_all()
        except BaseException as error:
            await self._end(_reason_of(error))
            raise
        finally:
            self._reserved.resolve()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end(self._reason if error is None else _reason_of(error))

    def is_over(self) -> bool:
        return None not in self.finished

    @property
    def prompt_tokens(self) -> int:
        return sum(job.input_token_count for job in self.jobs)

    @property
    def completion_tokens(self) -> int:
        """Of the jobs that are over."""
        return sum(end.completion_tokens for end in self.finished if end is not None)

    @property
    def choices_per_job(self) -> int:
        """The same for all jobs of a request; 0 where there is nothing to choose."""
        job = self.jobs[0]
        return job.choices if isinstance(job, GenerateJob) else 0

    def usage(self) -> dict[str, Any]:
        """As answers show it, once all jobs are over."""
        timings = [end.timings for end in self.finished if end is not None]
        return usage_of(self.prompt_tokens, self.completion_tokens, timings)

    def complete(self) -> None:
        """The client has the whole answer: nothing is left to void."""
        self._complete = True

    def fail(self, error: ApiError) -> None:
        """The client was told of the error within its stream."""
        self._reason = _reason_of(error)

    def delivered(self, job_index: int, tokens: int) -> None:
        self._streams[job_index].delivered(tokens)

    async def next_events(self, timeout_s: float | None) -> list[tuple[int, JobEvent]]:
        """Wait for events; all that are there, each with its job's index, in each job's order. Empty after the time-out."""
        events = await (self._next_single(timeout_s) if len(self.jobs) == 1 else self._next_merged(timeout_s))
        for index, event in events:
            if isinstance(event, Finished):
                self.finished[index] = event
        return events

    async def _submit(self, index: int) -> None:
        try:
            self._streams[index] = await self._owner.submit(self.jobs[index], self._queue)
        except ApiError:
            raise  # certainly not accepted: what is reserved for it is given back
        except BaseException:
            self._reserved.published(index)
            raise
        self._reserved.published(index)

    async def _submit_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self.jobs)):
                    group.create_task(self._submit(index))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        for index, stream in self._streams.items():
            self._pumps.append(asyncio.create_task(self._pump(index, stream)))

    async def _pump(self, index: int, stream: JobStream) -> None:
        # The queue holds no more than the jobs' own token limits allow.
        async for event in stream:
            self._merged.put_nowait((index, event))

    async def _next_single(self, timeout_s: float | None) -> list[tuple[int, JobEvent]]:
        stream = self._streams[0]
        if self._single is None:
            self._single = aiter(stream)
        events: list[tuple[int, JobEvent]] = []
        if not stream.pending():
            try:
                async with asyncio.timeout(timeout_s):
                    events.append((0, await anext(self._single)))
            except TimeoutError:
                self._single = None
                return []
        while stream.pending():
            events.append((0, await anext(self._single)))
        return events

    async def _next_merged(self, timeout_s: float | None) -> list[tuple[int, JobEvent]]:
        try:
            async with asyncio.timeout(timeout_s):
                events = [await self._merged.get()]
        except TimeoutError:
            return []
        while not self._merged.empty():
            events.append(self._merged.get_nowait())
        return events

    async def _end(self, reason: AbandonReason) -> None:
        """Void what the client does not have, finished or not; a job that failed costs nothing anyway."""
        for pump in self._pumps:
            pump.cancel()
        if self._complete:
            return
        left = [
            stream
            for index, stream in self._streams.items()
            if (end := self.finished[index]) is None or end.outcome == "succeeded"
        ]
        if left:
            # A second cancellation (the service stops) must not keep the facts about money from being written.
            await asyncio.shield(asyncio.gather(*(stream.abandon(reason) for stream in left)))


def _reason_of(error: BaseException) -> AbandonReason:
    if isinstance(error, asyncio.CancelledError | ConnectionError):
        return "client_gone"
    if isinstance(error, ApiError) and error.code == "deadline_exceeded":
        return "deadline"
    return "failed"
