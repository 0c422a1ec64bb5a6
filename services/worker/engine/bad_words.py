"""Which tokens may not come next, because they would complete a banned sequence of tokens. Pure; knows no text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BadWords:
    """Banned sequences, sorted for one look per token.

    always: tokens that are a banned sequence by themselves. endings: by the token before the last of a sequence, all
    (tokens before the last, last token) that end so.
    """

    always: tuple[int, ...] = ()
    endings: Mapping[int, tuple[tuple[tuple[int, ...], int], ...]] | None = None


def compile_bad_words(sequences: Iterable[Sequence[int]]) -> BadWords:
    """Doubles count once; an empty sequence is in every answer and cannot be banned: ValueError."""
    always: dict[int, None] = {}
    endings: dict[int, dict[tuple[tuple[int, ...], int], None]] = {}
    for sequence in sequences:
        if not sequence:
            raise ValueError("an empty sequence cannot be banned")
        *beginning, last = sequence
        if beginning:
            endings.setdefault(beginning[-1], {})[tuple(beginning), last] = None
        else:
            always[last] = None
    return BadWords(tuple(always), {token: tuple(found) for token, found in endings.items()})


def banned_tokens(words: BadWords, answer: Sequence[int]) -> list[int]:
    """Tokens that may not follow, each once.

    1. A sequence of one token is banned everywhere.
    2. The last token of a longer one, where the answer ends with all of its other tokens.
    3. Only the answer counts: what the prompt began may be completed.
    """
    banned = list(words.always)  # 1
    if answer and words.endings:
        for beginning, last in words.endings.get(answer[-1], ()):
            # 2, 3: a slice of a shorter answer is shorter than the beginning, and so differs from it.
            if last not in banned and tuple(answer[-len(beginning) :]) == beginning:
                banned.append(last)
    return banned
