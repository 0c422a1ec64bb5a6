"""Decoding passes as CUDA graphs, one for each size of batch: a replay costs the host one launch.

A graph bakes in addresses: of the weights, of the KV pool, of the table it reads its rows from. Lengths and block tables
are read on the device, so the same graph serves every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kv_cache import KVPool
from ..packing import PackedTokens
from .pass_inputs import DecodeTable, PassInputs

_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
# The first run compiles kernels and chooses cuBLAS's; the second shows that nothing of it is left to do.
_WARM_UPS = 2

Run = Callable[[PassInputs, torch.Tensor | None, KVPool], torch.Tensor]


def buckets_for(most_rows: int) -> tuple[int, ...]:
    """The sizes of batch that get a graph.

    1. Every size of _BUCKETS below `most_rows`, and the first that holds it.
    2. Beyond the largest of them, none: such a pass keeps the device busy by itself.
    """
    below = tuple(size for size in _BUCKETS if size < most_rows)
    return below + tuple(size for size in _BUCKETS if size >= most_rows)[:1]


@dataclass(frozen=True, slots=True)
class _Graph:
    """hidden: the pass's output, overwritten by the next replay of any graph that shares the memory."""

    graph: torch.cuda.CUDAGraph
    hidden: torch.Tensor


class DecodeGraphs:
    """Graphs of one decoder. They share the memory of what they compute in between, so one runs at a time."""

    def __init__(self, most_rows: int, most_tokens: int, device: torch.device, run: Run) -> None:
        """run: the pass itself, in which the host never waits for the device. Nothing is allocated before first use."""
        self._buckets = buckets_for(most_rows)
        self._most_tokens, self._device, self._run = most_tokens, device, run
        self._table: DecodeTable | None = None
        self._drawn: torch.Tensor | None = None
        self._memory: tuple[int, int] | None = None
        self._graphs: dict[int, _Graph] = {}
        self._pool: KVPool | None = None

    def fits(self, batch: PackedTokens) -> bool:
        """batch: of decoding rows alone."""
        return (
            len(batch.spans) <= self._buckets[-1]
            and (batch.drawn is None or len(batch.drawn) <= self._buckets[-1])
            and all(span.start < self._most_tokens and span.adapter is None for span in batch.spans)
        )

    def capture_all(self, pool: KVPool) -> None:
        """The largest first: the smaller ones then find memory to share."""
        for bucket in reversed(self._buckets):
            self._ensure(bucket, pool)

    def replay(self, batch: PackedTokens, pool: KVPool) -> torch.Tensor:
        """Launches the pass and returns its rows, which the next replay overwrites."""
        rows = len(batch.spans)
        captured = self._ensure(next(size for size in self._buckets if size >= rows), pool)
        assert self._table is not None and self._drawn is not None
        self._table.write(batch, len(captured.hidden))
        if batch.drawn is not None:
            self._drawn[: len(batch.drawn)].copy_(batch.drawn)
        captured.graph.replay()
        return captured.hidden[:rows]

    def _ensure(self, bucket: int, pool: KVPool) -> _Graph:
        if self._pool is not pool:
            self._graphs.clear()
            self._pool = pool
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(bucket, pool)
        return self._graphs[bucket]

    def _capture(self, bucket: int, pool: KVPool) -> _Graph:
        """The table is cleared before: its rows then stand for nothing, and the warm-up writes nothing into the pool."""
        if self._table is None:
            self._table = DecodeTable(self._buckets[-1], self._most_tokens, self._device)
            self._drawn = torch.zeros(self._buckets[-1], dtype=torch.int64, device=self._device)
            self._memory = torch.cuda.graph_pool_handle()
        self._table.clear()
        inputs = self._table.inputs(bucket)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._run(inputs, self._drawn, pool)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may be running steps of a model that is loaded already.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            hidden = self._run(inputs, self._drawn, pool)
        return _Graph(graph, hidden)
