"""What changes logits before a token is chosen: penalties on seen tokens, bias, forbidden tokens.

All of it lives on the logits' device and works on the few tokens concerned, never on the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .api import Sampling
from .transfer import to_device

# Columns kept free for tokens to come, before the list of seen tokens has to grow.
_ROOM_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PenalisedRow:
    """row: its place in the batch. seen: what the repetition penalty looks at; answer: what the others count."""

    row: int
    sampling: Sampling
    seen: Sequence[int]
    answer: Sequence[int]


class PenaltyTable:
    """Tokens seen by those rows of a batch that have a penalty; kept on the device, one token a step added.

    Bounded by rows x (5 bytes x vocabulary + 16 bytes x tokens of the longest), twice that while rows change.
    repetition: CTRL (arXiv 1909.05858) section 4.1 in transformers' form, over prompt and answer; presence and frequency:
    OpenAI's definition, over the answer.
    """

    def __init__(
        self, rows: Sequence[PenalisedRow], width: int, vocab_size: int, device: torch.device
    ) -> None:
        """width: of the longest row's history, those that `carry_over` will bring included."""
        count = len(rows)
        self._rows = to_device(torch.tensor([each.row for each in rows]).unsqueeze(1), device)
        self._seen = torch.zeros(count, vocab_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(count, vocab_size, dtype=torch.int32, device=device)
        # Each row's history, ending at the same column; what is left of it is token 0, whether seen or not.
        self._listed = torch.zeros(count, width + _ROOM_TOKENS, dtype=torch.long, device=device)
        self._used = width
        self._fill(rows, device)
        penalties = torch.tensor(
            [
                (
                    each.sampling.repetition_penalty,
                    each.sampling.frequency_penalty,
                    each.sampling.presence_penalty,
                )
                for each in rows
            ]
        )
        self._repetition, self._frequency, self._presence = to_device(penalties, device).split(1, dim=1)

    @property
    def listed_tokens(self) -> int:
        return self._used

    def carry_over(self, previous: PenaltyTable, places: Sequence[tuple[int, int]]) -> None:
        """Rows known to an earlier table, with tokens that the host may not have read yet. places: (here, there)."""
        here, there = to_device(torch.tensor(places), self._rows.device).unbind(dim=1)
        self._seen[here] = previous._seen[there]
        self._counts[here] = previous._counts[there]
        columns = min(self._used, previous._used)
        self._listed[here, self._used - columns : self._used] = previous._listed[
            there, previous._used - columns : previous._used
        ]

    def apply(self, logits: torch.Tensor) -> None:
        """logits: (rows of the batch, vocabulary), changed in place."""
        listed = self._listed[:, : self._used]
        values = logits[self._rows, listed]
        penalised = torch.where(values < 0, values * self._repetition, values / self._repetition)
        values = torch.where(self._seen.gather(1, listed), penalised, values)
        counts = self._counts.gather(1, listed).to(values.dtype)
        values = values - counts * self._frequency - (counts > 0).to(values.dtype) * self._presence
        # A token listed twice is written twice, with the same value.
        logits[self._rows, listed] = values

    def note(self, tokens: torch.Tensor) -> None:
        """tokens: (rows of the batch,), drawn just now."""
        drawn = tokens[self._rows]
        self._seen.scatter_(1, drawn, True)
        self._counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.int32))
        if self._used == self._listed.shape[1]:
            self._listed = torch.cat((self._listed, torch.zeros_like(self._listed)), dim=1)
        self._listed[:, self._used : self._used + 1] = drawn
        self._used += 1

    def _fill(self, rows: Sequence[PenalisedRow], device: torch.device) -> None:
        seen = [(place, token) for place, each in enumerate(rows) for token in each.seen]
        answer = [(place, token) for place, each in enumerate(rows) for token in each.answer]
        if not seen:
            return
        columns = [column for each in rows for column in range(self._used - len(each.seen), self._used)]
        places, tokens = to_device(torch.tensor(seen), device).unbind(dim=1)
        self._seen[places, tokens] = True
        self._listed[places, to_device(torch.tensor(columns), device)] = tokens
        if answer:
            places, tokens = to_device(torch.tensor(answer), device).unbind(dim=1)
            one = torch.ones((), dtype=torch.int32, device=device)
            self._counts.index_put_((places, tokens), one, accumulate=True)


class TokenAddends:
    """What is added to single logits, the same at every step: bias."""

    def __init__(self, entries: Sequence[tuple[int, int, float]], device: torch.device) -> None:
        """entries: (row, token, addend); of one token several add up."""
        self._rows, self._tokens = _pairs([(row, token) for row, token, _ in entries], device)
        self._values = to_device(torch.tensor([value for _, _, value in entries]), device)

    def apply(self, logits: torch.Tensor) -> None:
        logits.index_put_((self._rows, self._tokens), self._values, accumulate=True)


class ForbiddenEndings:
    """Tokens that may not come before a row's `min_tokens`."""

    def __init__(self, entries: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        """entries: (row, token, steps from now for which it is forbidden)."""
        self._rows, self._tokens = _pairs([(row, token) for row, token, _ in entries], device)
        self._steps = to_device(torch.tensor([steps for _, _, steps in entries]), device)
        self._most_steps = max(steps for _, _, steps in entries)

    def apply(self, logits: torch.Tensor, step: int) -> None:
        if step < self._most_steps:
            addends = torch.zeros(len(self._steps), device=logits.device)
            addends.masked_fill_(self._steps > step, -math.inf)
            logits.index_put_((self._rows, self._tokens), addends, accumulate=True)


def forbid(logits: torch.Tensor, entries: Sequence[tuple[int, int]]) -> None:
    """entries: (row, token), for one step."""
    rows, tokens = _pairs(entries, logits.device)
    logits[rows, tokens] = -math.inf


def _pairs(entries: Sequence[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens = to_device(torch.tensor(entries), device).unbind(dim=1)
    return rows, tokens
