"""The tokens of one forward pass: pieces of many sequences, packed into rows without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .lora import PreparedAdapter


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one sequence in the pass: its tokens [start, start + count); `blocks` covers [0, start + count).

    adapter: as the pass's decoder prepared it; None is the base model itself.
    """

    blocks: Sequence[int]
    start: int
    count: int
    adapter: PreparedAdapter | None = None


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """tokens: one for each row, in the order of the spans. Spans of one token first make the cheapest pass.

    drawn: tokens of an earlier pass that are on the device and that the host has not read: -1 - i in `tokens` is drawn[i].
    """

    tokens: Sequence[int]
    spans: Sequence[Span]
    drawn: torch.Tensor | None = None


def token_tensor(batch: PackedTokens, device: torch.device) -> torch.Tensor:
    """(rows,) int64 token ids, those drawn earlier in their places."""
    tokens = torch.tensor(batch.tokens, device=device)
    if batch.drawn is None:
        return tokens
    return torch.where(tokens < 0, batch.drawn[(-1 - tokens).clamp_min(0)], tokens)
