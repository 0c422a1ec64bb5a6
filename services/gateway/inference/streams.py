"""Writes a generation to its client as server-sent events, and counts what the client was given.

Knows nothing of the events' shape (`frames`) and nothing of jobs (`generation`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from aiohttp import web

from services.gateway.inference.frames import WAITING, Frames
from services.gateway.inference.generation import Generation
from services.gateway.inference.measures import Measure
from services.gateway.owner import Finished, JobEvent
from shared.inference.checks import refusal_of
from shared.inference.errors import ApiError
from shared.inference.responses import Spellings, tokens_in

# Below a transport's low-water mark (16 KiB by default) a write does not wait, so it needs no time-out: a token's usual case.
NEVER_BLOCKS_BYTES = 8 * 1024

Spell = Callable[[Iterable[int]], Awaitable[Spellings]]


@dataclass(frozen=True, slots=True)
class StreamTimes:
    # Until then an error can still be a proper HTTP status; after it clients and proxies want to see life.
    headers_after_s: float = 2.0
    # Below the idle time-outs of common proxies (60 s, some 30 s).
    sign_of_life_s: float = 10.0
    # A client that takes nothing for so long keeps a place on the GPU from others.
    write_s: float = 30.0


class EventStream:
    """One response. Its head is sent with the first bytes, not before."""

    def __init__(self, request: web.Request, times: StreamTimes) -> None:
        self._request = request
        self._times = times
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                # nginx would hold tokens back until its buffer is full.
                "X-Accel-Buffering": "no",
            }
        )

    @property
    def begun(self) -> bool:
        return self.response.prepared

    async def write(self, data: bytes) -> None:
        """Raises ConnectionError when the client is gone or takes nothing."""
        transport = self._request.transport
        if (
            self.begun
            and transport is not None
            and transport.get_write_buffer_size() + len(data) < NEVER_BLOCKS_BYTES
        ):
            await self.response.write(data)
            return
        try:
            async with asyncio.timeout(self._times.write_s):
                if not self.begun:
                    await self.response.prepare(self._request)
                await self.response.write(data)
        except TimeoutError as error:
            if transport is not None:
                transport.abort()
            raise ConnectionResetError("the client does not read its stream") from error


async def stream_answer(
    stream: EventStream,
    generation: Generation,
    frames: Frames,
    measure: Measure,
    times: StreamTimes,
    spell: Spell | None,
) -> web.StreamResponse:
    """Send the generation as it comes. `spell` is None without log-probabilities.

    1. An error before the first byte is raised, for the edge to answer with its status.
    2. After it, it is the stream's last event, without the usual end; the connection is closed.
    3. All that is there goes out in one write; the tokens of shown text then count as delivered.
    """
    writer = _Writer(generation, frames, spell)
    try:
        while not generation.is_over():
            events = await generation.next_events(
                times.sign_of_life_s if stream.begun else times.headers_after_s
            )
            if not events:
                await stream.write(WAITING)
                continue
            data, refusal = await writer.format(events, measure)
            if refusal is not None:
                if data and stream.begun:
                    await stream.write(data)
                    writer.written()
                raise refusal
            if generation.is_over():
                data += frames.end(generation.usage())
            if data:
                await stream.write(data)  # 3
                writer.written()
    except ApiError as error:
        if not stream.begun:  # 1
            raise
        measure.failed(error.code)
        generation.fail(error)
        stream.response.force_close()
        await stream.write(frames.error(error))  # 2
    else:
        generation.complete()
        reasons = [
            reason or "" for end in generation.finished if end is not None for reason in end.finish_reasons
        ]
        measure.succeeded(generation.prompt_tokens, generation.completion_tokens, reasons)
    await stream.response.write_eof()
    return stream.response


class _Writer:
    """Turns events to bytes, and knows which tokens they show."""

    def __init__(self, generation: Generation, frames: Frames, spell: Spell | None) -> None:
        self._generation = generation
        self._frames = frames
        self._spell = spell
        self._choices = generation.choices_per_job
        self._begun = False
        # Tokens by choice whose text is still held back, and tokens by job that the next write shows.
        self._held_back: Counter[int] = Counter()
        self._shown: Counter[int] = Counter()

    async def format(
        self, events: list[tuple[int, JobEvent]], measure: Measure
    ) -> tuple[bytes, ApiError | None]:
        """The events' bytes, up to the end of a job that failed, and why it did."""
        spellings: Spellings = {}
        if self._spell is not None:
            spellings = await self._spell(
                token
                for _, event in events
                if not isinstance(event, Finished)
                for token in tokens_in(event.logprobs)
            )
        parts = [] if self._begun else [self._frames.begin()]
        self._begun = True
        for job_index, event in events:
            if isinstance(event, Finished):
                if (refusal := refusal_of(event)) is not None:
                    return b"".join(parts), refusal
                continue
            measure.saw_tokens()
            choice = job_index * self._choices + event.choice
            self._held_back[choice] += len(event.tokens)
            part = self._frames.delta(choice, event, spellings)
            if part:
                parts.append(part)
                self._shown[job_index] += self._held_back.pop(choice)
        return b"".join(parts), None

    def written(self) -> None:
        for job_index, tokens in self._shown.items():
            self._generation.delivered(job_index, tokens)
        self._shown.clear()
