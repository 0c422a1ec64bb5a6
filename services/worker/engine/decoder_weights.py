"""A checkpoint's tensors in one shape for all model types: what `families.py` reads and every decoder is built from.

Products that read the same input are one matrix; rows are in the order in which the decoder splits them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """weight: (outputs, inputs), any floating dtype, on the CPU; bias: (outputs,)."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class NormWeights:
    """(hidden_size,) each; bias: layer norms only."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """qkv: rows of all query heads, then key heads, then value heads. mlp_in: gated: rows of gate, then of up.

    mlp_norm: None where attention and MLP read the same norm (residual "parallel").
    query_norm, key_norm: (head_dim,), where `spec.qk_norm`.
    """

    attention_norm: NormWeights
    qkv: LinearWeights
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    attention_output: LinearWeights
    mlp_norm: NormWeights | None
    mlp_in: LinearWeights
    mlp_out: LinearWeights


class DecoderWeights(Protocol):
    """embedding: (vocab_size, hidden_size). head: its weight is the same tensor where the two are tied.

    position_table: (max_positions, hidden_size) for position "learned".

    Layers are read one at a time, so that packing a model never holds two copies of it.
    """

    embedding: torch.Tensor
    position_table: torch.Tensor | None
    embedding_norm: NormWeights | None
    final_norm: NormWeights
    head: LinearWeights

    def layer(self, index: int) -> LayerWeights: ...
