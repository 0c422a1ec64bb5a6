"""Launches of the paged attention kernels: tile shapes, splits, and the pieces that prompt chunks are cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from ..kv_cache import BLOCK_TOKENS
from .attention_kernels import decode_kernel, prefill_kernel, reduce_kernel

_LOG2_E = 1.4426950408889634
# tl.dot takes no fewer rows, columns or channels.
_LEAST_ROWS = 16
_MOST_SPLITS = 32
# A share of fewer tokens costs more to join than it saves.
_LEAST_TOKENS_OF_A_SPLIT = 128


@dataclass(frozen=True, slots=True)
class TileShape:
    """rows: query rows (tokens times heads of a group) of one program. tokens: keys it reads at a time."""

    rows: int
    tokens: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Scores are in units of log 2: log2_scale multiplies query times key; log2_slopes: (heads,) fp32 for ALiBi."""

    heads: int
    kv_heads: int
    head_dim: int
    log2_scale: float
    log2_slopes: torch.Tensor | None = None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def head_layout(heads: int, kv_heads: int, head_dim: int, slopes: torch.Tensor | None = None) -> HeadLayout:
    """slopes: (heads,), in units of the scores, on the device that attends."""
    return HeadLayout(
        heads,
        kv_heads,
        head_dim,
        head_dim**-0.5 * _LOG2_E,
        None if slopes is None else slopes.to(torch.float32) * _LOG2_E,
    )


def decode_tile(layout: HeadLayout, dtype: torch.dtype) -> TileShape:
    rows = max(_LEAST_ROWS, triton.next_power_of_2(layout.group))
    head_bytes = _wide(layout.head_dim) * dtype.itemsize
    # 16 KiB of keys at a time, the next ones already on their way: three programs share one processor's memory.
    tokens = min(128, max(16, 16384 // head_bytes))
    return TileShape(rows, tokens, warps=4, stages=3)


def prefill_tile(layout: HeadLayout, dtype: torch.dtype) -> TileShape:
    wide = _wide(layout.head_dim)
    # What a program keeps in registers is rows * (wide + tokens) fp32 numbers; without tensor cores (fp32), less.
    most_rows = min(128, 16384 // wide) if dtype.itemsize == 2 else 4096 // max(128, wide)
    rows = max(most_rows, triton.next_power_of_2(layout.group))
    tokens = 64 if wide * dtype.itemsize <= 256 else 32
    return TileShape(rows, tokens, warps=8 if rows >= 128 else 4, stages=2)


def choose_splits(sequences: int, kv_heads: int, processors: int) -> int:
    """Into how many shares a decoding sequence's tokens are cut.

    1. As many as give each of the device's processors about two programs, rounded up to a power of two.
    2. At most 32: then joining the shares costs as much as they save.
    3. One where sequences and heads are enough by themselves: no second kernel.
    """
    wanted = -(-2 * processors // (sequences * kv_heads))
    return min(_MOST_SPLITS, 1 << (wanted - 1).bit_length())


def cut_pieces(
    spans: Sequence[tuple[int, int, int, int]], rows_of_a_piece: int
) -> list[tuple[int, int, int, int]]:
    """spans: (first packed row, rows, position of the first row, table row). The same, of at most that many rows."""
    return [
        (first_row + done, min(rows_of_a_piece, rows - done), position + done, table)
        for first_row, rows, position, table in spans
        for done in range(0, rows, rows_of_a_piece)
    ]


def rows_of_a_piece(layout: HeadLayout, dtype: torch.dtype) -> int:
    return prefill_tile(layout, dtype).rows // layout.group


def attend_decode(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    tables: torch.Tensor,
    layout: HeadLayout,
    splits: int,
    output: torch.Tensor,
) -> None:
    """queries: (sequences, heads * head_dim), rows may be strided; keys, values: one layer of the pool, (blocks, kv_heads,
    BLOCK_TOKENS, head_dim); lengths: (sequences,) int32, own token included; tables: (sequences, blocks) int32;
    output: (sequences, heads * head_dim).
    """
    sequences = queries.shape[0]
    tile = decode_tile(layout, queries.dtype)
    partial = best = total = output
    if splits > 1:
        shares = (sequences, layout.heads, splits)
        partial = torch.empty((*shares, layout.head_dim), dtype=torch.float32, device=queries.device)
        best, total = torch.empty((2, *shares), dtype=torch.float32, device=queries.device).unbind(0)
    wide = _wide(layout.head_dim)
    decode_kernel[(sequences, layout.kv_heads, splits)](
        queries,
        keys,
        values,
        output,
        partial,
        best,
        total,
        lengths,
        tables,
        lengths if layout.log2_slopes is None else layout.log2_slopes,
        layout.log2_scale,
        queries.stride(0),
        lengths.stride(0),
        tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        HEADS=layout.heads,
        GROUP=layout.group,
        HEAD_DIM=layout.head_dim,
        BLOCK_M=tile.rows,
        BLOCK_D=wide,
        BLOCK_N=tile.tokens,
        BLOCK_TOKENS=BLOCK_TOKENS,
        SPLITS=splits,
        MIN_TILES=max(1, _LEAST_TOKENS_OF_A_SPLIT // tile.tokens),
        HAS_ALIBI=layout.log2_slopes is not None,
        PRECISION=_precision(queries.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        reduce_kernel[(sequences, layout.heads)](
            partial,
            best,
            total,
            output,
            HEADS=layout.heads,
            HEAD_DIM=layout.head_dim,
            BLOCK_D=wide,
            SPLITS=splits,
        )


def attend_prefill(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pieces: torch.Tensor,
    tables: torch.Tensor,
    layout: HeadLayout,
    output: torch.Tensor,
) -> None:
    """As `attend_decode`; pieces: (pieces, 4) int32 from `cut_pieces`, their rows count from the first of `queries`."""
    tile = prefill_tile(layout, queries.dtype)
    prefill_kernel[(pieces.shape[0], layout.kv_heads)](
        queries,
        keys,
        values,
        output,
        pieces,
        tables,
        pieces if layout.log2_slopes is None else layout.log2_slopes,
        layout.log2_scale,
        queries.stride(0),
        tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        HEADS=layout.heads,
        GROUP=layout.group,
        HEAD_DIM=layout.head_dim,
        BLOCK_M=tile.rows,
        BLOCK_D=_wide(layout.head_dim),
        BLOCK_N=tile.tokens,
        BLOCK_TOKENS=BLOCK_TOKENS,
        HAS_ALIBI=layout.log2_slopes is not None,
        PRECISION=_precision(queries.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _wide(head_dim: int) -> int:
    return max(_LEAST_ROWS, 1 << (head_dim - 1).bit_length())


def _precision(dtype: torch.dtype) -> str:
    """fp32 is multiplied as fp32, not rounded to TF32: greedy tokens must equal the CPU's."""
    return "ieee" if dtype == torch.float32 else "tf32"
