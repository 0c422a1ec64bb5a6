"""Low-rank adapters on a shared base model (PEFT's format); different adapters may share one forward pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter that is ready for the decoders of one base model."""

    handle: str
