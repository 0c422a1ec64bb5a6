"""Attention kernels against the torch path, sequence by sequence: on a GPU for `loadtest.gpu_engine`, and as
`python -m loadtest.gpu_attention_checks SIZES` under Triton's interpreter for the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from services.worker.engine.attention import attend, plan_attention
from services.worker.engine.cuda.attention import (
    attend_decode,
    attend_prefill,
    cut_pieces,
    head_layout,
    rows_of_a_piece,
)
from services.worker.engine.kv_cache import KVPool
from services.worker.engine.packing import Span
from services.worker.engine.spec import alibi_slopes

BLOCKS = 40
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
# dtype, heads, key heads, alibi. The interpreter is slow, and has no bf16 products.
INTERPRETED_CASES = ((torch.float32, 6, 2, True), (torch.float16, 1, 1, False))
# Few, as each is some kernels to compile: groups of one, three and eight, all types of numbers.
CASES = (
    (torch.float32, 6, 2, True),
    (torch.float16, 8, 1, False),
    (torch.bfloat16, 6, 2, True),
    (torch.bfloat16, 4, 4, False),
)
# Around the borders of blocks, tiles and splits.
DECODE_LENGTHS = (1, 16, 37, 150)
# (start, count): a fresh prompt, one with history, one of several pieces.
CHUNKS = ((0, 5), (20, 9), (3, 40))


def filled_pool(kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> KVPool:
    pool = KVPool((1, kv_heads, head_dim), BLOCKS, dtype, device)
    for memory in pool.layer(0):
        memory[1:] = torch.randn(memory[1:].shape).to(dtype)
    return pool


def spans_of(pieces: Sequence[tuple[int, int]], device: torch.device) -> tuple[list[Span], torch.Tensor]:
    """Spans of (start, count) in shuffled blocks, and their tables."""
    width = 10
    tables = (torch.randperm(BLOCKS)[: len(pieces) * width] + 1).view(len(pieces), width)
    spans = [Span(table.tolist(), start, count) for table, (start, count) in zip(tables, pieces, strict=True)]
    return spans, tables.to(device, torch.int32)


def check(
    head_dim: int, dtype: torch.dtype, heads: int, kv_heads: int, has_alibi: bool, device: torch.device
) -> None:
    pool = filled_pool(kv_heads, head_dim, dtype, device)
    slopes = torch.tensor(alibi_slopes(heads), device=device) if has_alibi else None
    layout = head_layout(heads, kv_heads, head_dim, slopes)
    keys, values = pool.layer(0)
    size = heads * head_dim

    def expected(queries: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        plan = plan_attention(spans, pool, device, slopes)
        return attend(queries.reshape(-1, heads, head_dim), plan, pool, 0).view(-1, size)

    spans, tables = spans_of([(length - 1, 1) for length in DECODE_LENGTHS], device)
    queries = torch.randn(len(spans) + 1, size + 8).to(device, dtype)[:, :size]
    # A last row of length 0 stands for nothing.
    lengths = torch.tensor([*DECODE_LENGTHS, 0], dtype=torch.int32, device=device)
    padded_tables = torch.cat((tables, tables[:1]))
    for splits in (1, 4):
        output = torch.full((len(lengths), size), float("nan"), dtype=dtype, device=device)
        attend_decode(queries, keys, values, lengths, padded_tables, layout, splits, output)
        compare(output[:-1], expected(queries[:-1], spans), (head_dim, dtype, heads, has_alibi, splits))
        assert not output[-1].any()

    spans, tables = spans_of(CHUNKS, device)
    firsts = [sum(count for _, count in CHUNKS[:index]) for index in range(len(CHUNKS))]
    cut = cut_pieces(
        [
            (first, span.count, span.start, row)
            for row, (first, span) in enumerate(zip(firsts, spans, strict=True))
        ],
        rows_of_a_piece(layout, dtype),
    )
    queries = torch.randn(sum(count for _, count in CHUNKS), size).to(device, dtype)
    output = torch.full_like(queries, float("nan"))
    attend_prefill(
        queries, keys, values, torch.tensor(cut, dtype=torch.int32, device=device), tables, layout, output
    )
    compare(output, expected(queries, spans), (head_dim, dtype, heads, has_alibi, "chunks"))


def compare(ours: torch.Tensor, theirs: torch.Tensor, case: object) -> None:
    difference = (ours.float() - theirs.float()).abs().max().item()
    assert difference < TOLERANCE[ours.dtype], (case, difference)


def check_head_dim(head_dim: int, device: torch.device) -> None:
    torch.manual_seed(0)
    for case in CASES if device.type == "cuda" else INTERPRETED_CASES:
        check(head_dim, *case, device)


def main(head_dims: Sequence[int]) -> None:
    torch.set_num_threads(1)
    for head_dim in head_dims:
        check_head_dim(head_dim, torch.device("cpu"))
    print(f"checked {len(head_dims)} head sizes")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
