"""The tokens of one forward pass: pieces of many sequences, packed into rows without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lora import LoraAdapter


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one sequence in the pass: its tokens [start, start + count); `blocks` covers [0, start + count).

    adapter: None is the base model itself.
    """

    blocks: Sequence[int]
    start: int
    count: int
    adapter: LoraAdapter | None = None


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """tokens: one for each row, in the order of the spans. Spans of one token first make the cheapest pass."""

    tokens: Sequence[int]
    spans: Sequence[Span]
