"""From a prompt's final hidden states to one vector, over the chunks that the prompt is computed in. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .api import Pooling


@dataclass(frozen=True, slots=True)
class Pooled:
    """What is pooled so far. rows: positions of the prompt that are in. total: (hidden_size,) fp64, None before any.

    fp64 sums of fp32 states are exact enough that it does not matter after which positions the prompt was cut.
    """

    rows: int = 0
    total: torch.Tensor | None = None


def rows_to_pool(pooled: Pooled, pooling: Pooling, prompt_tokens: int, start: int, count: int) -> range:
    """Which positions of a pass over [start, start + count) go in.

    1. mean: each position of the prompt once, also where a pre-empted prompt is computed again.
    2. last: the prompt's last position alone.
    """
    end = min(start + count, prompt_tokens)
    if pooling == "mean":
        return range(max(start, pooled.rows), end)
    return range(prompt_tokens - 1, end) if pooled.rows < prompt_tokens else range(0)


def add_rows(pooled: Pooled, rows: range, states: torch.Tensor) -> Pooled:
    """states: (len(rows), hidden_size) fp32, after the final norm."""
    if not rows:
        return pooled
    total = states.double().sum(dim=0)
    return Pooled(rows.stop, total if pooled.total is None else pooled.total + total)


def vector_of(pooled: Pooled, pooling: Pooling, prompt_tokens: int) -> tuple[float, ...]:
    """The finished vector, not normalised; its values are fp32 numbers. May hold NaN where the states did."""
    assert pooled.total is not None and pooled.rows == prompt_tokens
    mean = pooled.total / prompt_tokens if pooling == "mean" else pooled.total
    return tuple(mean.float().tolist())
