"""What stands between a layer's products, one Triton kernel each: residual and norms, rotation and KV write, activation.

All compute in fp32 and round once, on writing. Launches are below the kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..kv_cache import BLOCK_TOKENS


@triton.jit
def _norm(values, is_column, weight_ptr, bias_ptr, columns, HIDDEN: tl.constexpr, EPS, IS_RMS: tl.constexpr):
    if not IS_RMS:
        mean = tl.sum(values, axis=0) / HIDDEN
        values = tl.where(is_column, values - mean, 0.0)
    scaled = values * tl.rsqrt(tl.sum(values * values, axis=0) / HIDDEN + EPS)
    result = scaled * tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    if not IS_RMS:
        result += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    return result


@triton.jit
def residual_norm_kernel(
    hidden_ptr,
    first_delta_ptr,
    second_delta_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    second_weight_ptr,
    second_bias_ptr,
    second_normed_ptr,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    DELTAS: tl.constexpr,
    NORMS: tl.constexpr,
    IS_RMS: tl.constexpr,
):
    """Grid (rows,). hidden += deltas, in place; then up to two norms of what was stored."""
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    columns = tl.arange(0, BLOCK)
    is_column = columns < HIDDEN
    values = tl.load(hidden_ptr + row + columns, mask=is_column, other=0.0).to(tl.float32)
    if DELTAS > 0:
        delta = tl.load(first_delta_ptr + row + columns, mask=is_column, other=0.0).to(tl.float32)
        if DELTAS > 1:
            delta += tl.load(second_delta_ptr + row + columns, mask=is_column, other=0.0).to(tl.float32)
        stored = (values + delta).to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + row + columns, stored, mask=is_column)
        values = stored.to(tl.float32)
    if NORMS > 0:
        normed = _norm(values, is_column, weight_ptr, bias_ptr, columns, HIDDEN, eps, IS_RMS)
        tl.store(normed_ptr + row + columns, normed.to(normed_ptr.dtype.element_ty), mask=is_column)
    if NORMS > 1:
        normed = _norm(values, is_column, second_weight_ptr, second_bias_ptr, columns, HIDDEN, eps, IS_RMS)
        tl.store(second_normed_ptr + row + columns, normed.to(normed_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _head_scale(source_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, eps):
    """1 / root mean square of one head."""
    channels = tl.arange(0, BLOCK_D)
    values = tl.load(source_ptr + channels, mask=channels < HEAD_DIM, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(values * values, axis=0) / HEAD_DIM + eps)


@triton.jit(
    do_not_specialize=["position_stride", "table_stride"],
    do_not_specialize_on_alignment=["positions_ptr", "table_rows_ptr", "tables_ptr"],
)
def turn_and_write_kernel(
    mixed_ptr,
    queries_ptr,
    keys_ptr,
    values_ptr,
    cos_ptr,
    sin_ptr,
    query_norm_ptr,
    key_norm_ptr,
    positions_ptr,
    table_rows_ptr,
    tables_ptr,
    eps,
    mixed_stride,
    position_stride,
    table_stride,
    block_stride,
    head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    FIRST_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_HEAD_NORM: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
):
    """Grid (rows, heads from FIRST_HEAD on: query, key, value heads in this order).

    Queries are turned into `queries`; keys are turned into the pool, values copied there. A row at a position below 0 is
    padding. HALF: pairs of channels that turn together. Rotation: RoFormer, arXiv 2104.09864, equation 34.
    """
    row, head = tl.program_id(0), tl.program_id(1) + FIRST_HEAD
    position = tl.load(positions_ptr + row * position_stride)
    if position >= 0:
        table_row = row
        if HAS_TABLE_ROWS:
            table_row = tl.load(table_rows_ptr + row)
        block = tl.load(tables_ptr + table_row.to(tl.int64) * table_stride + position // BLOCK_TOKENS)
        place = block.to(tl.int64) * block_stride + (position % BLOCK_TOKENS) * HEAD_DIM
        source = mixed_ptr + row.to(tl.int64) * mixed_stride + head * HEAD_DIM
        channels = tl.arange(0, BLOCK_D)
        if head >= HEADS + KV_HEADS:
            target = values_ptr + place + (head - HEADS - KV_HEADS).to(tl.int64) * head_stride
            is_channel = channels < HEAD_DIM
            tl.store(target + channels, tl.load(source + channels, mask=is_channel), mask=is_channel)
        else:
            if head < HEADS:
                target = queries_ptr + (row.to(tl.int64) * HEADS + head) * HEAD_DIM
                norm_ptr = query_norm_ptr
            else:
                target = keys_ptr + place + (head - HEADS).to(tl.int64) * head_stride
                norm_ptr = key_norm_ptr
            scale = 1.0
            if HAS_HEAD_NORM:
                scale = _head_scale(source, HEAD_DIM, BLOCK_D, eps)
            _turn_head(
                source,
                target,
                norm_ptr,
                cos_ptr + position.to(tl.int64) * HALF,
                sin_ptr + position.to(tl.int64) * HALF,
                scale,
                HEAD_DIM,
                BLOCK_D,
                HALF,
                BLOCK_HALF,
                IS_INTERLEAVED,
                HAS_ROPE,
                HAS_HEAD_NORM,
            )


@triton.jit
def _turn_head(
    source,
    target,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_HEAD_NORM: tl.constexpr,
):
    turned: tl.constexpr = 2 * HALF if HAS_ROPE else 0
    if HAS_ROPE:
        pairs = tl.arange(0, BLOCK_HALF)
        is_pair = pairs < HALF
        first = pairs * 2 if IS_INTERLEAVED else pairs
        second = first + (1 if IS_INTERLEAVED else HALF)
        a = tl.load(source + first, mask=is_pair, other=0.0).to(tl.float32) * scale
        b = tl.load(source + second, mask=is_pair, other=0.0).to(tl.float32) * scale
        if HAS_HEAD_NORM:
            a *= tl.load(norm_ptr + first, mask=is_pair, other=0.0).to(tl.float32)
            b *= tl.load(norm_ptr + second, mask=is_pair, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + pairs, mask=is_pair, other=0.0)
        sin = tl.load(sin_ptr + pairs, mask=is_pair, other=0.0)
        tl.store(target + first, (a * cos - b * sin).to(target.dtype.element_ty), mask=is_pair)
        tl.store(target + second, (b * cos + a * sin).to(target.dtype.element_ty), mask=is_pair)
    if turned < HEAD_DIM:
        channels = tl.arange(0, BLOCK_D)
        is_rest = (channels >= turned) & (channels < HEAD_DIM)
        rest = tl.load(source + channels, mask=is_rest, other=0.0).to(tl.float32) * scale
        if HAS_HEAD_NORM:
            rest *= tl.load(norm_ptr + channels, mask=is_rest, other=0.0).to(tl.float32)
        tl.store(target + channels, rest.to(target.dtype.element_ty), mask=is_rest)


@triton.jit
def activation_kernel(
    source_ptr,
    output_ptr,
    source_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
):
    """Grid (rows, blocks of columns). source: (rows, SIZE), or gate and up side by side, (rows, 2 * SIZE)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < SIZE
    source = source_ptr + row * source_stride + columns
    x = tl.load(source, mask=is_column, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # tanh(u) = 2 sigmoid(2u) - 1, so 0.5 (1 + tanh(u)) = sigmoid(2u).
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        x = tl.maximum(x, 0.0)
    if IS_GATED:
        x *= tl.load(source + SIZE, mask=is_column, other=0.0).to(tl.float32)
    tl.store(output_ptr + row * SIZE + columns, x.to(output_ptr.dtype.element_ty), mask=is_column)


Norm = tuple[torch.Tensor, torch.Tensor | None]


def residual_norm(
    hidden: torch.Tensor, deltas: tuple[torch.Tensor, ...], norms: tuple[Norm, ...], is_rms: bool, eps: float
) -> list[torch.Tensor]:
    """hidden: (rows, hidden_size), changed in place by the deltas. Returns hidden under each of up to two norms."""
    rows, size = hidden.shape
    outputs = [torch.empty_like(hidden) for _ in norms]
    # Arguments that a switch leaves unread still need an address.
    padded_deltas = [*deltas, hidden, hidden][:2]
    padded_norms = [*norms, (hidden, None), (hidden, None)][:2]
    padded_outputs = [*outputs, hidden, hidden][:2]
    (weight, bias), (second_weight, second_bias) = padded_norms
    residual_norm_kernel[(rows,)](
        hidden,
        padded_deltas[0],
        padded_deltas[1],
        weight,
        weight if bias is None else bias,
        padded_outputs[0],
        second_weight,
        second_weight if second_bias is None else second_bias,
        padded_outputs[1],
        eps,
        HIDDEN=size,
        BLOCK=triton.next_power_of_2(size),
        DELTAS=len(deltas),
        NORMS=len(norms),
        IS_RMS=is_rms,
        num_warps=8 if size >= 4096 else 4,
    )
    return outputs


def activate(source: torch.Tensor, size: int, activation: str, is_gated: bool) -> torch.Tensor:
    """source: (rows, size or 2 * size), rows may be strided. Returns (rows, size)."""
    rows = source.shape[0]
    output = torch.empty((rows, size), dtype=source.dtype, device=source.device)
    block = min(1024, triton.next_power_of_2(size))
    activation_kernel[(rows, triton.cdiv(size, block))](
        source,
        output,
        source.stride(0),
        SIZE=size,
        BLOCK=block,
        ACTIVATION=activation,
        IS_GATED=is_gated,
        num_warps=4,
    )
    return output


def turn_and_write(
    mixed: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    tables: torch.Tensor,
    table_rows: torch.Tensor | None,
    heads: int,
    rope: tuple[torch.Tensor, torch.Tensor, bool] | None,
    head_norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """mixed: (rows, at least (heads + 2 kv_heads) * head_dim), rows may be strided; keys, values: one layer of the pool,
    (blocks, kv_heads, BLOCK_TOKENS, head_dim); positions: (rows,) int32, below 0 for padding; table_rows: each row's row
    of `tables`, None where it is its own. rope: cosines and sines, (positions, pairs) fp32, and whether neighbours turn.

    Returns the queries, (rows, heads * head_dim), rows strided where nothing had to be done to them.
    """
    _, kv_heads, _, head_dim = keys.shape
    rows = mixed.shape[0]
    touches_queries = rope is not None or head_norms is not None
    queries = mixed[:, : heads * head_dim]
    if touches_queries:
        queries = torch.empty((rows, heads * head_dim), dtype=mixed.dtype, device=mixed.device)
    first_head = 0 if touches_queries else heads
    cos, sin, is_interleaved = rope if rope is not None else (mixed, mixed, False)
    half = cos.shape[1] if rope is not None else 1
    query_norm, key_norm = head_norms if head_norms is not None else (mixed, mixed)
    turn_and_write_kernel[(rows, heads + 2 * kv_heads - first_head)](
        mixed,
        queries,
        keys,
        values,
        cos,
        sin,
        query_norm,
        key_norm,
        positions,
        positions if table_rows is None else table_rows,
        tables,
        eps,
        mixed.stride(0),
        positions.stride(0),
        tables.stride(0),
        keys.stride(0),
        keys.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        FIRST_HEAD=first_head,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_TOKENS=BLOCK_TOKENS,
        IS_INTERLEAVED=is_interleaved,
        HAS_ROPE=rope is not None,
        HAS_HEAD_NORM=head_norms is not None,
        HAS_TABLE_ROWS=table_rows is not None,
        num_warps=1,
    )
    return queries
