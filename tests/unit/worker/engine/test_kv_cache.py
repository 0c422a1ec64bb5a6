"""The pool gives back what was written where it was written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from services.worker.engine.attention import padded_table_blocks
from services.worker.engine.kv_cache import BLOCK_TOKENS, PADDING_BLOCK, KVPool, blocks_for

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (2048, 128)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 16) == blocks


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(1, 8), (128, 8), (129, 16), (256, 16), (257, 32), (2048, 128)]
)
def test_padded_table_blocks_depends_on_the_length_alone(tokens: int, blocks: int) -> None:
    assert padded_table_blocks(tokens, 16) == blocks
    assert padded_table_blocks(tokens, 32) == blocks // 2


def test_gather_returns_each_token_where_it_was_written() -> None:
    layers, kv_heads, head_dim = 2, 3, 4
    pool = KVPool((layers, kv_heads, head_dim), blocks=6, dtype=torch.float32, device=CPU)
    tables = [[5, 2], [3, PADDING_BLOCK]]
    lengths = [20, 7]
    written = []
    for table, length in zip(tables, lengths, strict=True):
        keys, values = torch.randn(2, length, kv_heads, head_dim)
        blocks = torch.tensor([table[position // BLOCK_TOKENS] for position in range(length)])
        places = pool.token_places(blocks, torch.arange(length) % BLOCK_TOKENS)
        pool.write(1, places, keys, values)
        written.append((keys, values))
    keys, values = pool.gather(1, pool.head_blocks(torch.tensor(tables)))
    assert keys.shape == (2, kv_heads, 2 * BLOCK_TOKENS, head_dim)
    for row, (length, (own_keys, own_values)) in enumerate(zip(lengths, written, strict=True)):
        assert torch.equal(keys[row, :, :length], own_keys.transpose(0, 1))
        assert torch.equal(values[row, :, :length], own_values.transpose(0, 1))
        assert not keys[row, :, length:].any()
    assert not pool.gather(0, pool.head_blocks(torch.tensor(tables)))[0].any(), "another layer"


def test_clear_zeroes_the_named_blocks_and_no_other() -> None:
    pool = KVPool((1, 1, 2), blocks=3, dtype=torch.float32, device=CPU)
    for block in (1, 2):
        places = pool.token_places(torch.tensor([block]), torch.tensor([0]))
        pool.write(0, places, torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    pool.clear([1])
    keys, _ = pool.gather(0, pool.head_blocks(torch.tensor([[1], [2]])))
    assert keys.sum(dim=(1, 2, 3)).tolist() == [0.0, 2.0]
    pool.clear([])


def test_pool_costs_memory_only_where_it_is_written() -> None:
    """A pool of 512 MiB; resident memory from /proc, in pages."""

    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    before = resident_mib()
    pool = KVPool((4, 4, 64), blocks=8192, dtype=torch.float32, device=CPU)
    pool.clear([1, 2])
    assert resident_mib() - before < 64
