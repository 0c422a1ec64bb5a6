"""Attention over the paged pool in Triton: one kernel for sequences that add a token, one for prompt chunks.

All query heads that share a key head are rows of one product, so each key is read once for the group. Lengths and block
tables are read from device memory and the launch grid follows from the batch size alone: a CUDA graph of these launches
serves any lengths. Callers: `attention.py` beside this file.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_queries(
    queries_ptr, rows, heads, is_row, row_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """(BLOCK_M, BLOCK_D): row m is head heads[m] of packed row rows[m]; channels beyond the head are zero."""
    channels = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64) * row_stride + heads * HEAD_DIM
    return tl.load(
        queries_ptr + offsets[:, None] + channels[None, :],
        mask=is_row[:, None] & (channels < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _attend_tile(
    queries,
    limits,
    slopes,
    best,
    total,
    mixed,
    keys_ptr,
    values_ptr,
    table_ptr,
    first_token,
    last_limit,
    scale,
    block_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the tokens [first_token, first_token + BLOCK_N) to the running softmax (best, total, mixed) of each row.

    Row m sees tokens below limits[m]; none at or beyond last_limit is read. Scores are in units of log 2, as `scale` and
    `slopes` are: exp2 is what the hardware has. Softmax online: Milakov and Gimelshein, arXiv 1805.02867.
    """
    tokens = first_token + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    is_token = tokens < last_limit
    is_channel = channels < HEAD_DIM
    blocks = tl.load(table_ptr + tokens // BLOCK_TOKENS, mask=is_token, other=0)
    places = blocks.to(tl.int64) * block_stride + (tokens % BLOCK_TOKENS) * HEAD_DIM
    keys = tl.load(
        keys_ptr + places[None, :] + channels[:, None],
        mask=is_channel[:, None] & is_token[None, :],
        other=0.0,
    )
    scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
    if HAS_ALIBI:
        # Relative to the row's own place: softmax does not see the difference, and the numbers stay small.
        scores += slopes[:, None] * (tokens[None, :] - (limits[:, None] - 1)).to(tl.float32)
    scores = tl.where(tokens[None, :] < limits[:, None], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    shrink = tl.exp2(best - new_best)
    weights = tl.exp2(scores - new_best[:, None])
    values = tl.load(
        values_ptr + places[:, None] + channels[None, :],
        mask=is_token[:, None] & is_channel[None, :],
        other=0.0,
    )
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return new_best, total * shrink + tl.sum(weights, axis=1), mixed


# A stride that differs from pass to pass, or an address that is not always a multiple of 16, would compile the kernel anew.
@triton.jit(
    do_not_specialize=["length_stride", "table_stride"],
    do_not_specialize_on_alignment=["lengths_ptr", "tables_ptr"],
)
def decode_kernel(
    queries_ptr,
    keys_ptr,
    values_ptr,
    output_ptr,
    partial_ptr,
    partial_best_ptr,
    partial_total_ptr,
    lengths_ptr,
    tables_ptr,
    slopes_ptr,
    scale,
    query_stride,
    length_stride,
    table_stride,
    block_stride,
    head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (sequences, key heads, SPLITS): one query token each over a share of the sequence's tokens.

    With one split the output is written, else the share's unfinished softmax, for `reduce_kernel`. A sequence of length 0
    is a row of padding: its output is zero.
    """
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + sequence * length_stride)
    tiles = tl.cdiv(length, BLOCK_N)
    share = tl.maximum(tl.cdiv(tiles, SPLITS), MIN_TILES)
    first, last = split * share, tl.minimum((split + 1) * share, tiles)
    members = tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + members
    is_row = members < GROUP
    rows = tl.zeros([BLOCK_M], tl.int32) + sequence
    queries = _load_queries(queries_ptr, rows, heads, is_row, query_stride, HEAD_DIM, BLOCK_D)
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=is_row, other=0.0)
    limits = tl.zeros([BLOCK_M], tl.int32) + length
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    head_offset = kv_head.to(tl.int64) * head_stride
    for tile in range(first, last):
        best, total, mixed = _attend_tile(
            queries,
            limits,
            slopes,
            best,
            total,
            mixed,
            keys_ptr + head_offset,
            values_ptr + head_offset,
            tables_ptr + sequence.to(tl.int64) * table_stride,
            tile * BLOCK_N,
            length,
            scale,
            block_stride,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            BLOCK_TOKENS,
            HAS_ALIBI,
            PRECISION,
        )
    channels = tl.arange(0, BLOCK_D)
    is_out = is_row[:, None] & (channels < HEAD_DIM)[None, :]
    if SPLITS == 1:
        places = (sequence.to(tl.int64) * HEADS + heads) * HEAD_DIM
        result = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(
            output_ptr + places[:, None] + channels[None, :],
            result.to(output_ptr.dtype.element_ty),
            mask=is_out,
        )
    else:
        places = (sequence.to(tl.int64) * HEADS + heads) * SPLITS + split
        tl.store(partial_best_ptr + places, best, mask=is_row)
        tl.store(partial_total_ptr + places, total, mask=is_row)
        tl.store(partial_ptr + places[:, None] * HEAD_DIM + channels[None, :], mixed, mask=is_out)


@triton.jit
def reduce_kernel(
    partial_ptr,
    partial_best_ptr,
    partial_total_ptr,
    output_ptr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (sequences, heads): joins the shares of one head's softmax. Shares without a token weigh nothing."""
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    splits = tl.arange(0, SPLITS)
    channels = tl.arange(0, BLOCK_D)
    is_channel = channels < HEAD_DIM
    bests = tl.load(partial_best_ptr + row * SPLITS + splits)
    totals = tl.load(partial_total_ptr + row * SPLITS + splits)
    mixed = tl.load(
        partial_ptr + (row * SPLITS + splits)[:, None] * HEAD_DIM + channels[None, :],
        mask=is_channel[None, :],
        other=0.0,
    )
    best = tl.max(bests, axis=0)
    # Without any token, best is -inf: 0 in its place keeps -inf - -inf out.
    weights = tl.exp2(bests - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(totals * weights, axis=0)
    result = tl.sum(mixed * weights[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(output_ptr + row * HEAD_DIM + channels, result.to(output_ptr.dtype.element_ty), mask=is_channel)


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["pieces_ptr", "tables_ptr"])
def prefill_kernel(
    queries_ptr,
    keys_ptr,
    values_ptr,
    output_ptr,
    pieces_ptr,
    tables_ptr,
    slopes_ptr,
    scale,
    query_stride,
    table_stride,
    block_stride,
    head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (pieces, key heads). A piece is up to BLOCK_M // GROUP rows of one sequence, and sees all before itself.

    pieces: (pieces, 4) int32: first packed row, rows, position of the first row, row of `tables`.
    """
    piece, kv_head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(pieces_ptr + piece * 4)
    count = tl.load(pieces_ptr + piece * 4 + 1)
    first_position = tl.load(pieces_ptr + piece * 4 + 2)
    table_row = tl.load(pieces_ptr + piece * 4 + 3)
    members = tl.arange(0, BLOCK_M)
    steps = members // GROUP
    heads = kv_head * GROUP + members % GROUP
    is_row = steps < count
    queries = _load_queries(queries_ptr, first_row + steps, heads, is_row, query_stride, HEAD_DIM, BLOCK_D)
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + heads)
    # Rows of padding look where the last real one does, so that no softmax is over nothing.
    limits = first_position + tl.minimum(steps, count - 1) + 1
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    head_offset = kv_head.to(tl.int64) * head_stride
    last_limit = first_position + count
    for tile in range(tl.cdiv(last_limit, BLOCK_N)):
        best, total, mixed = _attend_tile(
            queries,
            limits,
            slopes,
            best,
            total,
            mixed,
            keys_ptr + head_offset,
            values_ptr + head_offset,
            tables_ptr + table_row.to(tl.int64) * table_stride,
            tile * BLOCK_N,
            last_limit,
            scale,
            block_stride,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            BLOCK_TOKENS,
            HAS_ALIBI,
            PRECISION,
        )
    channels = tl.arange(0, BLOCK_D)
    places = ((first_row + steps).to(tl.int64) * HEADS + heads) * HEAD_DIM
    tl.store(
        output_ptr + places[:, None] + channels[None, :],
        (mixed / total[:, None]).to(output_ptr.dtype.element_ty),
        mask=is_row[:, None] & (channels < HEAD_DIM)[None, :],
    )
