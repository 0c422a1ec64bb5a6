"""All tensors that the C kernels read of one model, by name: packed from a checkpoint, or mapped from an image.

Names are those of `arena.py` where both have them; a product `x` is `x.packed` with, in int8, `x.scales`, and `x.bias`. There
is no `embedding` where the head's rows are the same numbers: `rows_of` finds them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..decoder_weights import DecoderWeights, LinearWeights, NormWeights
from ..spec import DecoderSpec
from .bindings import Kind
from .panels import PANEL, pack_linear

Tensors = Mapping[str, torch.Tensor]


def product_shapes(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the products of every layer, and of the head."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    heads = spec.heads * spec.head_dim
    return {
        "qkv": (heads + 2 * spec.kv_heads * spec.head_dim, hidden),
        "attention_output": (hidden, heads),
        "mlp_in": (inner * (2 if spec.is_gated else 1), hidden),
        "mlp_out": (hidden, inner),
        "head": (spec.vocab_size, hidden),
    }


def pack_weights(spec: DecoderSpec, weights: DecoderWeights, kind: Kind) -> dict[str, torch.Tensor]:
    """A second for each few hundred million parameters. Holds one layer of `weights` at a time."""
    packed: dict[str, torch.Tensor] = {}
    if not _has_rows(weights, kind):
        packed["embedding"] = weights.embedding
    if weights.position_table is not None:
        packed["position_table"] = weights.position_table
    packed.update(_norm("embedding_norm", weights.embedding_norm))
    for index in range(spec.layers):
        layer, name = weights.layer(index), f"layers.{index}."
        packed.update(_norm(name + "attention_norm", layer.attention_norm))
        packed.update(_norm(name + "mlp_norm", layer.mlp_norm))
        for head_norm, tensor in (("query_norm", layer.query_norm), ("key_norm", layer.key_norm)):
            if tensor is not None:
                packed[name + head_norm] = _floats(tensor)
        packed.update(_product(name + "qkv", layer.qkv, kind))
        packed.update(_product(name + "attention_output", layer.attention_output, kind))
        packed.update(_product(name + "mlp_in", layer.mlp_in, kind))
        packed.update(_product(name + "mlp_out", layer.mlp_out, kind))
    packed.update(_norm("final_norm", weights.final_norm))
    packed.update(_product("head", weights.head, kind))
    return packed


def rows_of(packed: torch.Tensor, rows: torch.Tensor, inputs: int) -> torch.Tensor:
    """Rows (n,) of a product that was packed without loss: (n, inputs)."""
    return packed[rows // PANEL, :, rows % PANEL, :].reshape(len(rows), -1)[:, :inputs].contiguous()


def _has_rows(weights: DecoderWeights, kind: Kind) -> bool:
    """Whether the packed head has every number of the embedding: a sixth of SmolLM2's memory."""
    exact = {Kind.FP32: torch.float32, Kind.BF16: torch.bfloat16}.get(kind)
    return weights.head.weight is weights.embedding and weights.embedding.dtype == exact


def _product(name: str, weights: LinearWeights, kind: Kind) -> Iterator[tuple[str, torch.Tensor]]:
    packed, scales = pack_linear(weights.weight, kind)
    yield f"{name}.packed", packed
    if scales is not None:
        yield f"{name}.scales", scales
    if weights.bias is not None:
        yield f"{name}.bias", _floats(weights.bias)


def _norm(name: str, norm: NormWeights | None) -> Iterator[tuple[str, torch.Tensor]]:
    if norm is not None:
        yield f"{name}.weight", _floats(norm.weight)
        if norm.bias is not None:
            yield f"{name}.bias", _floats(norm.bias)


def _floats(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().contiguous()
