"""How likely tokens were: their logprobs and those of the most likely ones, for many rows at once, in one copy to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .api import TokenLogprob
from .draw_batch import best_of_rows
from .draw_rows import best_tokens


@dataclass(frozen=True, slots=True)
class Scores:
    """Logprobs of some rows' chosen tokens, (rows,), and of the most likely, (rows, top); on the device."""

    chosen: torch.Tensor
    top_tokens: torch.Tensor
    top_values: torch.Tensor


def score_tokens(logprobs: torch.Tensor, tokens: Sequence[int], top: int | None) -> list[TokenLogprob]:
    """logprobs: (positions, vocabulary); the score of one token at each."""
    scores = score(logprobs, torch.tensor(tokens, device=logprobs.device), top or 0)
    host = packed(parts_of(scores)).cpu()
    return read_scores(host, scores.top_tokens.shape[1], tokens, [top or 0] * len(tokens))


def score(logprobs: torch.Tensor, tokens: torch.Tensor, top: int) -> Scores:
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    if top == 0:
        return Scores(chosen, tokens.new_empty(len(tokens), 0), chosen.new_empty(len(tokens), 0))
    if logprobs.device.type == "cpu":
        best = torch.from_numpy(best_tokens(logprobs.numpy(), top))
        return Scores(chosen, best, logprobs.gather(1, best))
    return Scores(chosen, *best_of_rows(logprobs, top))


def parts_of(scores: Scores | None) -> list[torch.Tensor]:
    return [] if scores is None else [scores.chosen, scores.top_tokens, scores.top_values]


def packed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One int32 vector: integers as they are, floats as their bits."""
    return torch.cat(
        [
            (part.view(torch.int32) if part.is_floating_point() else part.to(torch.int32)).flatten()
            for part in parts
        ]
    )


def read_scores(
    host: torch.Tensor, width: int, tokens: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprob]:
    """host: `packed(parts_of(scores))`. width: of its top; tops: how many of them each row asked for."""
    count = len(tokens)
    floats = host.view(torch.float32)
    chosen = floats[:count].tolist()
    best = host[count : count * (1 + width)].view(count, width).tolist()
    values = floats[count * (1 + width) :].view(count, width).tolist()
    return [
        TokenLogprob(token, logprob, tuple(zip(row[:top], row_values[:top], strict=True)))
        for token, logprob, row, row_values, top in zip(tokens, chosen, best, values, tops, strict=True)
    ]
