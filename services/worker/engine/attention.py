"""Attention of one forward pass over the paged pool.

A pass packs the tokens of many sequences into rows: first one row for each decoding sequence, then each prompt chunk's
rows. An `AttentionPlan` is built once for a pass and used by each layer.

A sequence's padded length follows from its own length alone, and a chunk is computed by itself: what stands beside a
sequence changes neither the shape nor the bits of its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from .kv_cache import PADDING_BLOCK, KVPool, blocks_for
from .packing import Span

# Doubling from there wastes at most half a gather, and a ragged batch falls into few groups.
_SMALLEST_TABLE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decoding sequences with equal table length. rows: (sequences,).

    mask: (sequences, 1, 1, tokens) fp32, additive; with alibi (sequences, kv_heads, group, tokens), its bias included.
    """

    rows: torch.Tensor
    head_blocks: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class _PromptChunk:
    """mask: (rows, tokens) bool, True where a row may look; with alibi (kv_heads, group, rows, tokens) fp32, additive."""

    first_row: int
    last_row: int
    head_blocks: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """positions: (rows,). places: where the pass's keys and values go in the pool."""

    positions: torch.Tensor
    places: torch.Tensor
    decode_groups: tuple[_DecodeGroup, ...]
    chunks: tuple[_PromptChunk, ...]


def plan_attention(
    spans: Sequence[Span], pool: KVPool, device: torch.device, slopes: torch.Tensor | None = None
) -> AttentionPlan:
    """spans: in row order; one of a single token counts as decoding, the sums are the same.

    slopes: (heads,) fp32, alibi's; None without it.
    """
    block_tokens = pool.block_tokens
    positions: list[int] = []
    blocks: list[int] = []
    groups: dict[int, list[tuple[int, Span]]] = {}
    chunks: list[_PromptChunk] = []
    for span in spans:
        first_row = len(positions)
        span_positions = range(span.start, span.start + span.count)
        positions.extend(span_positions)
        blocks.extend(span.blocks[position // block_tokens] for position in span_positions)
        if span.count == 1:
            groups.setdefault(padded_table_blocks(span.start + 1, block_tokens), []).append((first_row, span))
        else:
            chunks.append(_plan_chunk(span, first_row, pool, device, slopes))
    position_tensor = torch.tensor(positions, device=device)
    return AttentionPlan(
        positions=position_tensor,
        places=pool.token_places(torch.tensor(blocks, device=device), position_tensor % block_tokens),
        decode_groups=tuple(
            _plan_group(table_blocks, members, pool, device, slopes)
            for table_blocks, members in groups.items()
        ),
        chunks=tuple(chunks),
    )


def padded_table_blocks(tokens: int, block_tokens: int) -> int:
    """The block table's length for a decoding sequence of that many tokens: for 128 of them, 256, 512, ..."""
    table_tokens = _SMALLEST_TABLE_TOKENS
    while table_tokens < tokens:
        table_tokens *= 2
    return blocks_for(table_tokens, block_tokens)


def _plan_group(
    table_blocks: int,
    members: Sequence[tuple[int, Span]],
    pool: KVPool,
    device: torch.device,
    slopes: torch.Tensor | None,
) -> _DecodeGroup:
    tables = []
    for _, span in members:
        used = span.blocks[: blocks_for(span.start + 1, pool.block_tokens)]
        tables.append([*used, *[PADDING_BLOCK] * (table_blocks - len(used))])
    lengths = torch.tensor([span.start + 1 for _, span in members], device=device)
    tokens = torch.arange(table_blocks * pool.block_tokens, device=device)
    hidden = (tokens >= lengths.unsqueeze(1))[:, None, None, :]
    if slopes is None:
        mask = torch.zeros(hidden.shape, device=device)
    else:
        distances = tokens - lengths[:, None, None, None] + 1
        mask = slopes.view(1, pool.kv_heads, -1, 1) * distances
    return _DecodeGroup(
        rows=torch.tensor([row for row, _ in members], device=device),
        head_blocks=pool.head_blocks(torch.tensor(tables, device=device)),
        mask=mask.masked_fill_(hidden, float("-inf")),
    )


def _plan_chunk(
    span: Span, first_row: int, pool: KVPool, device: torch.device, slopes: torch.Tensor | None
) -> _PromptChunk:
    end = span.start + span.count
    table = torch.tensor([list(span.blocks[: blocks_for(end, pool.block_tokens)])], device=device)
    tokens = torch.arange(table.shape[1] * pool.block_tokens, device=device)
    rows = torch.arange(span.start, end, device=device)
    mask = tokens.unsqueeze(0) <= rows.unsqueeze(1)
    if slopes is not None:
        bias = slopes.view(pool.kv_heads, -1, 1, 1) * (tokens.unsqueeze(0) - rows.unsqueeze(1))
        mask = bias.masked_fill_(~mask, float("-inf"))
    return _PromptChunk(
        first_row=first_row,
        last_row=first_row + span.count,
        head_blocks=pool.head_blocks(table),
        mask=mask,
    )


def attend(queries: torch.Tensor, plan: AttentionPlan, pool: KVPool, layer: int) -> torch.Tensor:
    """queries: (rows, heads, head_dim) in the pool's dtype; returns the same shape. This pass's keys are in the pool."""
    _, heads, head_dim = queries.shape
    output = torch.empty_like(queries)
    for group in plan.decode_groups:
        keys, values = pool.gather(layer, group.head_blocks)
        # Query heads that share a key head become rows of one product: no copy of the keys for each of them.
        grouped = queries[group.rows].view(len(group.rows), pool.kv_heads, -1, head_dim)
        output[group.rows] = _mix(grouped, keys, values, group.mask).view(-1, heads, head_dim)
    for chunk in plan.chunks:
        keys, values = pool.gather(layer, chunk.head_blocks)
        own = queries[chunk.first_row : chunk.last_row].transpose(0, 1)
        if chunk.mask.dtype == torch.bool:
            mixed = functional.scaled_dot_product_attention(
                own.unsqueeze(0), keys, values, attn_mask=chunk.mask, enable_gqa=True
            )[0]
        else:
            # A bias of fp32 is too fine for the built-in attention in bf16.
            grouped = own.reshape(pool.kv_heads, -1, *own.shape[1:])
            mixed = _mix(grouped, keys[0].unsqueeze(1), values[0].unsqueeze(1), chunk.mask).flatten(0, 1)
        output[chunk.first_row : chunk.last_row] = mixed.transpose(0, 1)
    return output


def _mix(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax in fp32. queries: (..., rows, head_dim); keys, values: (..., tokens, head_dim); mask: additive."""
    if queries.dtype == torch.float16:
        # Scores are large before they are scaled down: some models' would not fit into fp16.
        queries, keys = queries.float(), keys.float()
    scores = torch.matmul(queries, keys.transpose(-1, -2))
    weights = torch.softmax(torch.add(mask, scores, alpha=queries.shape[-1] ** -0.5), dim=-1)
    return torch.matmul(weights.to(values.dtype), values)
