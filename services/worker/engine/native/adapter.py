"""An adapter as the C kernels read it: plain fp32 matrices, whatever the base's precision."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from ..lora import LoraAdapter, Product
from ..packing import PackedTokens
from . import bindings
from .bindings import address

# The order of products within a layer, as decoder.c counts them.
_PRODUCTS: tuple[Product, ...] = ("qkv", "attention_output", "mlp_in", "mlp_out")


class NativeAdapter:
    def __init__(self, adapter: LoraAdapter) -> None:
        self._kept: list[torch.Tensor] = []
        products = (bindings.Lora * (len(_PRODUCTS) * len(adapter.layers)))()
        self.widest_rank = 0
        for place, matrices in enumerate(layer.get(name) for layer in adapter.layers for name in _PRODUCTS):
            if matrices is not None:
                rank, inputs = matrices.down.shape
                products[place] = bindings.Lora(
                    rank, inputs, len(matrices.up), self._keep(matrices.down), self._keep(matrices.up)
                )
                self.widest_rank = max(self.widest_rank, rank)
        self._struct = bindings.Adapter(products)
        self.weight_bytes = sum(tensor.nbytes for tensor in self._kept)

    @property
    def address(self) -> int:
        """Valid as long as this object lives."""
        return ctypes.addressof(self._struct)

    def _keep(self, tensor: torch.Tensor) -> int | None:
        tensor = tensor.float().contiguous()
        self._kept.append(tensor)
        return address(tensor)


def adapter_addresses(batch: PackedTokens) -> np.ndarray | None:
    """For each row its adapter's address, or 0; None where all is the base's."""
    if all(span.adapter is None for span in batch.spans):
        return None
    addresses = np.zeros(len(batch.tokens), dtype=np.uintp)
    row = 0
    for span in batch.spans:
        if span.adapter is not None:
            assert isinstance(span.adapter, NativeAdapter), "prepared by another decoder"
            addresses[row : row + span.count] = span.adapter.address
        row += span.count
    return addresses
