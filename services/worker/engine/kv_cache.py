"""Keys and values of all resident sequences in blocks of one pool. Who holds which block is counted in `prefix_cache.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .transfer import to_device

# What kernels are written for; other sizes are for `torch_decoder.py`, and for tests.
BLOCK_TOKENS = 16
# Never given out and always zero: pads block tables of unequal length to a rectangle.
PADDING_BLOCK = 0


def blocks_for(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)


class KVPool:
    """(layers, 2, blocks, kv_heads, block_tokens, head_dim); head-major blocks, so that gathering a block table yields
    each head's keys contiguous.

    Pages cost memory only once written: the pool starts as untouched zero pages.
    """

    def __init__(
        self,
        kv_shape: tuple[int, int, int],
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        layers, self.kv_heads, self.head_dim = kv_shape
        self.kv_shape = kv_shape
        self.dtype = dtype
        self.block_tokens = block_tokens
        shape = (layers, 2, blocks + 1, self.kv_heads, block_tokens, self.head_dim)
        self._pool = _cold_zeros(shape, dtype, device)
        self.blocks = blocks + 1
        self._by_token = self._pool.view(layers, 2, -1, self.head_dim)
        self._by_head_block = self._pool.view(layers, 2, -1, block_tokens * self.head_dim)

    @property
    def storage(self) -> torch.Tensor:
        """All of it, for kernels, which may lay out the inside of a block as they like."""
        return self._pool

    def write(self, layer: int, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """places: (tokens * kv_heads,) from `token_places`; keys, values: (tokens, kv_heads, head_dim)."""
        self._by_token[layer, 0].index_copy_(0, places, keys.reshape(-1, self.head_dim))
        self._by_token[layer, 1].index_copy_(0, places, values.reshape(-1, self.head_dim))

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's keys and values, (blocks, kv_heads, block_tokens, head_dim) each: the memory itself."""
        return self._pool[layer, 0], self._pool[layer, 1]

    def gather(self, layer: int, head_blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """head_blocks: (sequences, kv_heads, blocks). Returns keys and values (sequences, kv_heads, tokens, head_dim)."""
        sequences, heads, _ = head_blocks.shape
        flat = head_blocks.reshape(-1)
        shape = (sequences, heads, -1, self.head_dim)
        keys = self._by_head_block[layer, 0].index_select(0, flat).view(shape)
        values = self._by_head_block[layer, 1].index_select(0, flat).view(shape)
        return keys, values

    def token_places(self, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Rows of the pool for tokens at `offsets` (tokens,) within `blocks` (tokens,), for each head."""
        heads = torch.arange(self.kv_heads, device=blocks.device)
        head_blocks = blocks.unsqueeze(1) * self.kv_heads + heads
        return (head_blocks * self.block_tokens + offsets.unsqueeze(1)).reshape(-1)

    def head_blocks(self, tables: torch.Tensor) -> torch.Tensor:
        """tables: (sequences, blocks) -> (sequences, kv_heads, blocks), rows of the pool that `gather` takes."""
        heads = torch.arange(self.kv_heads, device=tables.device)
        return tables.unsqueeze(1) * self.kv_heads + heads.view(1, -1, 1)

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks before their next owner uses them.

        A masked position still multiplies its value by zero, and zero times a NaN that a failed sequence left behind
        would fail its block's next owner. Nor does one team's state stay readable for another.
        """
        if self._pool.device.type == "cpu":
            # 11 us a block of SmolLM2, where index_fill_ takes 70.
            for block in blocks:
                self._pool[:, :, block].zero_()
        elif blocks:
            index = to_device(torch.tensor(blocks), self._pool.device)
            self._pool.index_fill_(2, index, 0)


def _cold_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the CPU from numpy, whose zeros are the kernel's untouched pages. `torch.zeros` would write them all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size_bytes, dtype=np.uint8)).view(dtype).view(shape)
