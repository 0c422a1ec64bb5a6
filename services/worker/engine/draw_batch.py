"""Which token is drawn, for all rows at once: the way for a GPU. No shape depends on data and the host waits for nothing.

`draw_rows.py` computes the same on a CPU, and says what a cut means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .draw_rows import Cut
from .noise import gumbel_noise, hash_32, rough_gumbel_noise, signed_64
from .transfer import to_device

# Rows drawn at once: their hashes take some 40 bytes x vocabulary each while it lasts.
_ROWS_AT_ONCE = 64
# The best by rough noise, to be compared by exact noise: the true best is among them unless this many lie within 1e-5.
_FINALISTS = 8


@dataclass(frozen=True, slots=True)
class CutTensors:
    """`Cut`s of some rows as (rows, 1) columns. largest_k: 0 when no row has top-k; `sorts`: some row has top-p."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    least_score: torch.Tensor
    largest_k: int
    sorts: bool

    def rows(self, part: slice) -> CutTensors:
        return CutTensors(
            self.temperature[part],
            self.top_k[part],
            self.top_p[part],
            self.least_score[part],
            self.largest_k,
            self.sorts,
        )


def cut_tensors(cuts: Sequence[Cut], device: torch.device) -> CutTensors:
    values = torch.tensor(
        [
            (
                cut.temperature,
                cut.top_k,
                cut.top_p,
                min(math.log(cut.min_p), 0.0) if cut.min_p > 0 else -math.inf,
            )
            for cut in cuts
        ],
        dtype=torch.float64,
    )
    # One copy from the host for all.
    temperature, top_k, top_p, least_score = to_device(values, device).split(1, dim=1)
    return CutTensors(
        temperature=temperature.float(),
        top_k=top_k.long(),
        top_p=top_p,
        least_score=least_score.float(),
        largest_k=max(cut.top_k for cut in cuts),
        sorts=any(cut.top_p < 1.0 for cut in cuts),
    )


def draw_batch(logits: torch.Tensor, cuts: CutTensors, keys: torch.Tensor) -> torch.Tensor:
    """logits: (rows, vocabulary), kept as they are; keys: (rows,) from `noise_keys`. Returns (rows,) tokens.

    Any token where the logits are not finite or all forbidden: the caller knows.
    """
    parts = [slice(begin, begin + _ROWS_AT_ONCE) for begin in range(0, len(logits), _ROWS_AT_ONCE)]
    return torch.cat([_draw(logits[part], cuts.rows(part), keys[part]) for part in parts])


def _draw(logits: torch.Tensor, cuts: CutTensors, keys: torch.Tensor) -> torch.Tensor:
    scores = (logits - logits.amax(dim=-1, keepdim=True)).div_(cuts.temperature)
    scores.masked_fill_(scores < thresholds(scores, cuts), -math.inf)
    key_column = keys.unsqueeze(1)
    vocabulary = torch.arange(scores.shape[-1], device=scores.device)
    rough = rough_gumbel_noise(hash_32(key_column, vocabulary)).add_(scores)
    finalists = rough.topk(min(_FINALISTS, scores.shape[-1]), dim=-1).indices
    noisy = scores.gather(1, finalists).double() + gumbel_noise(hash_32(key_column, finalists))
    return finalists.gather(1, noisy.argmax(dim=-1, keepdim=True)).squeeze(1)


def thresholds(scores: torch.Tensor, cuts: CutTensors) -> torch.Tensor:
    """`draw_rows.threshold` for each row: (rows, 1)."""
    lowest = torch.full_like(cuts.least_score, -math.inf)
    if cuts.largest_k:
        best = scores.topk(cuts.largest_k, dim=-1).values
        kth = best.gather(1, (cuts.top_k - 1).clamp_min(0))
        lowest = torch.where(cuts.top_k > 0, kth, lowest)
    if cuts.sorts:
        descending = scores.sort(dim=-1, descending=True).values
        weights = torch.where(descending >= lowest, descending, -math.inf).exp().double()
        sums = weights.cumsum(dim=-1)
        needed = ((sums - weights) < cuts.top_p * sums[:, -1:]).sum(dim=-1, keepdim=True).clamp_min(1)
        last = descending.gather(1, needed - 1)
        lowest = torch.where(cuts.top_p < 1.0, torch.maximum(lowest, last), lowest)
    return torch.maximum(lowest, cuts.least_score)


def best_of_rows(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, count) tokens and values of the best, best first; of equal ones the lowest token.

    The order is that of one integer: the value's bits, made to sort as the value does, then the token counted backwards.
    """
    bits = rows.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    backwards = torch.arange(rows.shape[-1] - 1, -1, -1, device=rows.device)
    best = (ordered * (1 << 32) + backwards).topk(min(count, rows.shape[-1]), dim=-1).values
    tokens = rows.shape[-1] - 1 - (best & 0xFFFFFFFF)
    return tokens, rows.gather(1, tokens)


def seed_tensor(mixed_seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """(rows,) int64."""
    return to_device(torch.tensor([signed_64(seed) for seed in mixed_seeds]), device)
