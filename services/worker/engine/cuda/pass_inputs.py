"""A pass's numbers on the device: which tokens, at which positions, whose blocks. One copy from pinned memory for each pass.

A pass of decoding rows alone is written into a fixed table that CUDA graphs read; any other gets tensors of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..kv_cache import BLOCK_TOKENS
from ..packing import PackedTokens, Span
from .attention import cut_pieces

# Token, position, length, and one to align the block table after them.
_HEADER = 4
# Position of a row that stands for nothing: it writes no keys, and its length is 0.
_NOWHERE = -1


@dataclass(frozen=True, slots=True)
class PassInputs:
    """int32 on the device. tokens, positions: (rows,). tables: (table rows, blocks).

    The first `decode_rows` rows attend alone: lengths (decode_rows,), own token included, row i by tables[i]. The rest,
    if any, by pieces, (pieces, 4), as `attention_kernels.prefill_kernel` describes; rows count from the first of them.
    table_rows: (rows,), None where each row has its own.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor
    decode_rows: int
    lengths: torch.Tensor
    pieces: torch.Tensor | None
    table_rows: torch.Tensor | None


class DecodeTable:
    """Fixed device memory for the rows of a decoding pass. A row: token, position, length, pad, block table."""

    def __init__(self, most_rows: int, most_tokens: int, device: torch.device) -> None:
        self.most_rows = most_rows
        self.most_blocks = -(-most_tokens // BLOCK_TOKENS)
        self._device = device
        # Width in multiples of 4: each row's table begins at an address that is a multiple of 16.
        self._width = _HEADER + -(-self.most_blocks // 4) * 4
        self._rows = torch.zeros((most_rows, self._width), dtype=torch.int32, device=device)
        self.clear()

    def inputs(self, rows: int) -> PassInputs:
        """The first rows, as they will be when a graph of them runs."""
        table = self._rows[:rows]
        return PassInputs(
            tokens=table[:, 0],
            positions=table[:, 1],
            tables=table[:, _HEADER:],
            decode_rows=rows,
            lengths=table[:, 2],
            pieces=None,
            table_rows=None,
        )

    def clear(self) -> None:
        """Every row stands for nothing."""
        self._rows[:, :3] = torch.tensor([0, _NOWHERE, 0], dtype=torch.int32, device=self._device)

    def write(self, batch: PackedTokens, rows: int) -> None:
        """rows: at least as many as the batch has; those beyond stand for nothing. Waits for nothing."""
        staged = _staging(rows * self._width, self._device)
        table = staged.numpy().reshape(rows, self._width)
        used = len(batch.spans)
        table[:used, 0] = batch.tokens
        table[used:, 0] = 0
        starts = np.array([span.start for span in batch.spans], dtype=np.int32)
        table[:used, 1], table[used:, 1] = starts, _NOWHERE
        table[:used, 2], table[used:, 2] = starts + 1, 0
        _write_tables(table[:, _HEADER:], batch.spans)
        self._rows[:rows].copy_(staged.view(rows, self._width), non_blocking=True)


def is_decoding(batch: PackedTokens) -> bool:
    return len(batch.tokens) == len(batch.spans)


def pass_inputs(batch: PackedTokens, rows_of_a_piece: int, device: torch.device) -> PassInputs:
    """Tensors for any pass."""
    spans, rows = batch.spans, len(batch.tokens)
    decode_rows = next((index for index, span in enumerate(spans) if span.count > 1), len(spans))
    blocks = max(-(-(span.start + span.count) // BLOCK_TOKENS) for span in spans)
    firsts = np.cumsum([0, *(span.count for span in spans)])
    chunks = [
        (int(firsts[index]) - decode_rows, span.count, span.start, index)
        for index, span in enumerate(spans)
        if index >= decode_rows
    ]
    pieces = cut_pieces(chunks, rows_of_a_piece)
    sizes = [rows, rows, rows, decode_rows, len(spans) * blocks, len(pieces) * 4]
    staged = _staging(sum(sizes), device)
    tokens, positions, table_rows, lengths, tables, cut = np.split(staged.numpy(), np.cumsum(sizes)[:-1])
    tokens[:] = batch.tokens
    for index, span in enumerate(spans):
        mine = slice(firsts[index], firsts[index + 1])
        positions[mine] = np.arange(span.start, span.start + span.count)
        table_rows[mine] = index
    lengths[:] = positions[:decode_rows] + 1
    _write_tables(tables.reshape(len(spans), blocks), spans)
    cut[:] = np.array(pieces, dtype=np.int32).reshape(-1)
    on_device = staged.to(device, non_blocking=True).split(sizes)
    return PassInputs(
        tokens=on_device[0],
        positions=on_device[1],
        tables=on_device[4].view(len(spans), blocks),
        decode_rows=decode_rows,
        lengths=on_device[3],
        pieces=on_device[5].view(-1, 4) if pieces else None,
        table_rows=on_device[2],
    )


def _write_tables(tables: np.ndarray, spans: Sequence[Span]) -> None:
    for row, span in zip(tables, spans, strict=False):
        count = -(-(span.start + span.count) // BLOCK_TOKENS)
        row[:count] = span.blocks[:count]


def _staging(count: int, device: torch.device) -> torch.Tensor:
    """Pinned, so that the copy runs beside the host; torch gives it to nobody else until the copy is done."""
    return torch.empty(count, dtype=torch.int32, pin_memory=device.type == "cuda")
