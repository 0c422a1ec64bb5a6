"""Adapters on plain torch operations: whose rows of a pass they are, and what they add to a product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .linear import Int8Scratch, Linear, make_linear
from .lora import LoraAdapter, Product
from .packing import Span


class TorchAdapter:
    """An adapter's matrices in a decoder's precision; fp32 beside int8 weights, whose activations are fp32."""

    def __init__(self, adapter: LoraAdapter, precision: str, device: torch.device) -> None:
        precision = "fp32" if precision == "int8" else precision

        def linear(matrix: torch.Tensor) -> Linear:
            # The kernels of the base's products: a row's bits do not depend on those beside it.
            return make_linear(matrix, None, precision, device, Int8Scratch())

        self._layers: tuple[Mapping[Product, tuple[Linear, Linear]], ...] = tuple(
            {name: (linear(matrices.down), linear(matrices.up)) for name, matrices in layer.items()}
            for layer in adapter.layers
        )
        self.weight_bytes = sum(
            down.weight_bytes + up.weight_bytes for layer in self._layers for down, up in layer.values()
        )

    def addend(self, layer: int, product: Product, x: torch.Tensor) -> torch.Tensor | None:
        """None: this product is the base's alone."""
        matrices = self._layers[layer].get(product)
        return None if matrices is None else matrices[1](matrices[0](x))


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of a pass that one adapter adds to. rows: (count,) indices; None: all of them."""

    adapter: TorchAdapter
    rows: torch.Tensor | None

    def add_to(self, y: torch.Tensor, layer: int, product: Product, x: torch.Tensor) -> torch.Tensor:
        """x, y: input and output of the base's product for all rows of the pass; y may be changed in place."""
        addend = self.adapter.addend(layer, product, x if self.rows is None else x[self.rows])
        if addend is None:
            return y
        if self.rows is None:
            return y.add_(addend)
        # Each row occurs once, so the order in which they are added does not matter.
        return y.index_add_(0, self.rows, addend)


def adapter_rows(spans: Sequence[Span], device: torch.device) -> list[AdapterRows]:
    """One entry for each adapter of the pass; none where all is the base's."""
    if all(span.adapter is None for span in spans):
        return []
    rows: dict[int, list[int]] = {}
    adapters: dict[int, TorchAdapter] = {}
    first_row = 0
    for span in spans:
        if span.adapter is not None:
            assert isinstance(span.adapter, TorchAdapter), "prepared by another decoder"
            adapters[id(span.adapter)] = span.adapter
            rows.setdefault(id(span.adapter), []).extend(range(first_row, first_row + span.count))
        first_row += span.count
    return [
        AdapterRows(
            adapter,
            None if len(rows[key]) == first_row else torch.tensor(rows[key], device=device),
        )
        for key, adapter in adapters.items()
    ]
