"""Writes what became of lines, in groups: one statement for all that ended within a few hundredths of a second."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Sequence

import structlog

from services.batch.records import Ended
from services.batch.store import Store
from shared.messages import JobVoided
from shared.outcomes import Unavailable

log = structlog.get_logger()

GATHER_S = 0.04
GROUP_LINES = 500
GROUP_BYTES = 8 * 1024 * 1024
RETRY_S = 0.5
RATE_WINDOW_S = 20.0


class Results:
    """`add` from whoever learns of an end; `run` is one long task. What waits is bounded by the lines that are out."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: deque[tuple[Ended, Sequence[JobVoided]]] = deque()
        self._wake = asyncio.Event()
        self._pending: dict[str, int] = defaultdict(int)
        self._written: dict[str, deque[tuple[float, int, int]]] = defaultdict(deque)

    def add(self, ended: Ended, voids: Sequence[JobVoided] = ()) -> None:
        self._waiting.append((ended, voids))
        self._pending[ended.batch_id] += 1
        self._wake.set()

    def pending(self, batch_id: str) -> int:
        """Ends of this batch that are not written yet."""
        return self._pending.get(batch_id, 0)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(GATHER_S)
            await self.flush()

    async def flush(self) -> None:
        """Write all that waits."""
        while self._waiting:
            await self._write(self._next_group())

    def _next_group(self) -> list[tuple[Ended, Sequence[JobVoided]]]:
        group: list[tuple[Ended, Sequence[JobVoided]]] = []
        size = 0
        while self._waiting and len(group) < GROUP_LINES and size < GROUP_BYTES:
            group.append(self._waiting.popleft())
            size += len(group[-1][0].response)
        return group

    async def _write(self, group: Sequence[tuple[Ended, Sequence[JobVoided]]]) -> None:
        lines = [ended for ended, _ in group]
        voids = [void for _, voids in group for void in voids]
        while True:
            try:
                await self._store.end(lines, voids)
                break
            except Unavailable as error:
                # Written twice is written once: a line ends only out of the dispatch that it ran in.
                log.warning("results_held", count=len(group), error=str(error))
                await asyncio.sleep(RETRY_S)
        now_s = time.monotonic()
        for batch_id in [each for each, last in self._written.items() if now_s - last[-1][0] > RATE_WINDOW_S]:
            del self._written[batch_id]
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for ended in lines:
            counts[ended.batch_id][0] += 1
            counts[ended.batch_id][1] += ended.prompt_tokens + ended.completion_tokens
        for batch_id, (count, tokens) in counts.items():
            self._written[batch_id].append((now_s, count, tokens))
            self._pending[batch_id] -= count
            if not self._pending[batch_id]:
                del self._pending[batch_id]

    def rates(self, batch_id: str) -> tuple[float, float]:
        """Lines and tokens per second over the last seconds."""
        written, now_s = self._written[batch_id], time.monotonic()
        while written and now_s - written[0][0] > RATE_WINDOW_S:
            written.popleft()
        if not written:
            del self._written[batch_id]
            return 0.0, 0.0
        span_s = max(now_s - written[0][0], 1.0)
        return sum(each[1] for each in written) / span_s, sum(each[2] for each in written) / span_s
