"""All weights of one model in one flat piece of device memory.

The layout follows from the spec and the type of the numbers alone: models of one type have the same bytes at the same
places, so that one can be copied over another as a whole, while everything that was given an address stays valid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..decoder_weights import DecoderWeights, LayerWeights, LinearWeights, NormWeights
from ..spec import DecoderSpec

_ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Place:
    offset_bytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    places: Mapping[str, Place]
    total_bytes: int


def arena_layout(spec: DecoderSpec, dtype: torch.dtype) -> ArenaLayout:
    places: dict[str, Place] = {}
    offset = 0
    for name, shape in _shapes(spec):
        places[name] = Place(offset, shape)
        size_bytes = math.prod(shape) * dtype.itemsize
        offset += -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return ArenaLayout(places, offset)


def first_outputs(spec: DecoderSpec) -> int:
    """Rows of a layer's first product: query, key and value heads, and the MLP's where the same norm feeds both."""
    qkv = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    return qkv + (mlp_inputs(spec) if spec.residual == "parallel" else 0)


def mlp_inputs(spec: DecoderSpec) -> int:
    return spec.intermediate_size * (2 if spec.is_gated else 1)


def _shapes(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, is_fused = spec.hidden_size, spec.residual == "parallel"
    yield "embedding", (spec.vocab_size, hidden)
    if spec.position == "learned":
        yield "position_table", (spec.max_positions, hidden)
    if spec.has_embedding_norm:
        yield from _norm_shapes("embedding_norm", spec)
    for index in range(spec.layers):
        layer = f"layers.{index}."
        yield from _norm_shapes(layer + "attention_norm", spec)
        has_bias = spec.qkv_bias or (is_fused and spec.mlp_bias)
        yield from _linear_shapes(layer + "first", first_outputs(spec), hidden, has_bias)
        if spec.qk_norm:
            yield layer + "query_norm", (spec.head_dim,)
            yield layer + "key_norm", (spec.head_dim,)
        yield from _linear_shapes(
            layer + "attention_output", hidden, spec.heads * spec.head_dim, spec.output_bias
        )
        if not is_fused:
            yield from _norm_shapes(layer + "mlp_norm", spec)
            yield from _linear_shapes(layer + "mlp_in", mlp_inputs(spec), hidden, spec.mlp_bias)
        yield from _linear_shapes(layer + "mlp_out", hidden, spec.intermediate_size, spec.mlp_bias)
    yield from _norm_shapes("final_norm", spec)
    if not spec.tied_embeddings:
        yield "head.weight", (spec.vocab_size, hidden)
    if spec.head_bias:
        yield "head.bias", (spec.vocab_size,)


def _norm_shapes(name: str, spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (spec.hidden_size,)
    if spec.norm == "layer":
        yield f"{name}.bias", (spec.hidden_size,)


def _linear_shapes(
    name: str, outputs: int, inputs: int, has_bias: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    if has_bias:
        yield f"{name}.bias", (outputs,)


class Arena:
    """The memory of one model's weights, and its tensors as views of it."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> None:
        """The weights are undefined until `fill`."""
        self._spec, self._dtype = spec, dtype
        self.layout = arena_layout(spec, dtype)
        self.memory = torch.empty(self.layout.total_bytes, dtype=torch.uint8, device=device)

    def has(self, name: str) -> bool:
        return name in self.layout.places

    def view(self, name: str) -> torch.Tensor:
        place = self.layout.places[name]
        size_bytes = math.prod(place.shape) * self._dtype.itemsize
        flat = self.memory[place.offset_bytes : place.offset_bytes + size_bytes]
        return flat.view(self._dtype).view(place.shape)

    def linear(self, name: str) -> LinearWeights:
        bias = f"{name}.bias"
        return LinearWeights(self.view(f"{name}.weight"), self.view(bias) if self.has(bias) else None)

    def norm(self, name: str) -> NormWeights:
        bias = f"{name}.bias"
        return NormWeights(self.view(f"{name}.weight"), self.view(bias) if self.has(bias) else None)

    def fill(self, weights: DecoderWeights) -> None:
        """Copies and converts everything; holds one layer of `weights` at a time."""
        self.view("embedding").copy_(weights.embedding)
        if weights.position_table is not None:
            self.view("position_table").copy_(weights.position_table)
        if weights.embedding_norm is not None:
            self._put_norm("embedding_norm", weights.embedding_norm)
        for index in range(self._spec.layers):
            self._put_layer(f"layers.{index}.", weights.layer(index))
        self._put_norm("final_norm", weights.final_norm)
        if not self._spec.tied_embeddings:
            self.view("head.weight").copy_(weights.head.weight)
        if weights.head.bias is not None:
            self.view("head.bias").copy_(weights.head.bias)

    def _put_layer(self, name: str, layer: LayerWeights) -> None:
        self._put_norm(name + "attention_norm", layer.attention_norm)
        is_fused = self._spec.residual == "parallel"
        self._put_linears(name + "first", (layer.qkv, layer.mlp_in) if is_fused else (layer.qkv,))
        for norm_name, norm in (("query_norm", layer.query_norm), ("key_norm", layer.key_norm)):
            if norm is not None:
                self.view(name + norm_name).copy_(norm)
        self._put_linears(name + "attention_output", (layer.attention_output,))
        if layer.mlp_norm is not None:
            self._put_norm(name + "mlp_norm", layer.mlp_norm)
        if not is_fused:
            self._put_linears(name + "mlp_in", (layer.mlp_in,))
        self._put_linears(name + "mlp_out", (layer.mlp_out,))

    def _put_linears(self, name: str, parts: tuple[LinearWeights, ...]) -> None:
        """One product of several that read the same input; a part without bias beside one with it has zeros."""
        target = self.linear(name)
        first = 0
        for part in parts:
            last = first + part.weight.shape[0]
            target.weight[first:last].copy_(part.weight)
            if target.bias is not None and part.bias is not None:
                target.bias[first:last].copy_(part.bias)
            elif target.bias is not None:
                target.bias[first:last].zero_()
            first = last

    def _put_norm(self, name: str, norm: NormWeights) -> None:
        target = self.norm(name)
        target.weight.copy_(norm.weight)
        if target.bias is not None and norm.bias is not None:
            target.bias.copy_(norm.bias)
