"""What a decoder is to the engine: weights of one model in one precision that turn packed tokens into logits.

Implementations hold equal arithmetic in different hands: `torch_decoder.py` anywhere, `native/` on CPUs that have the
instructions, `cuda/` on GPUs, `module_decoder.py` for model types we have no description of.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from .kv_cache import KVPool
from .lora import LoraAdapter, PreparedAdapter
from .packing import PackedTokens
from .spec import ModelSpec


class WeightsDamaged(Exception):
    """Weights differ from what was written: what was computed from them is worth nothing."""


class Decoder(Protocol):
    """All methods raise WeightsDamaged where weights are compared with their checksums in the pass that first reads them."""

    weight_bytes: int

    @property
    def spec(self) -> ModelSpec: ...

    def forward(self, batch: PackedTokens, pool: KVPool) -> torch.Tensor:
        """Writes the rows' keys and values into `pool`; returns a row for each token, for the methods below to read."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: rows as `forward` returns them. Returns (rows, vocab_size) fp32."""
        ...

    def prepare_adapter(self, adapter: LoraAdapter) -> PreparedAdapter:
        """For the spans of later passes; may run on another thread beside them. Raises ModelRefusal where it cannot."""
        ...

    def final_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: rows as `forward` returns them. Returns (rows, size) fp32: transformers' `last_hidden_state`."""
        ...


@runtime_checkable
class PreparedDecoder(Decoder, Protocol):
    """A decoder that has work to do once it knows its pool, before the first request."""

    def prepare(self, pool: KVPool) -> None:
        """Seconds of work, on any thread, also while another model runs. Changes nothing in `pool`."""
        ...


def activation_dtype(precision: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def kv_dtype(precision: str) -> torch.dtype:
    return {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
