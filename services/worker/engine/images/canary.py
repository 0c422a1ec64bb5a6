"""What a model says to a fixed prompt: kept when its image is made, asked again before the model's first use.

Checksums show that the bytes are those that were written; this shows that they were the right bytes, in the right order,
on this machine's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..decoder import Decoder, kv_dtype
from ..kv_cache import BLOCK_TOKENS, KVPool, blocks_for
from ..packing import PackedTokens, Span

_PROMPT_TOKENS = 12
_MORE_TOKENS = 4
# Spreads the prompt over the vocabulary: Knuth's multiplier.
_STRIDE = 2654435761
# Logits of two bf16 passes on GPUs differ by less than this; nearer ones may change places.
_SURE_MARGIN = 0.5


@dataclass(frozen=True, slots=True)
class Canary:
    """greedy: the likeliest token after each of the prompt's tokens, and after each of some more that continue it by the
    last of these. margins: by how much its logit is above the next one's.
    """

    greedy: tuple[int, ...]
    margins: tuple[float, ...]

    def differs_from(self, other: Canary, *, is_exact: bool) -> bool:
        """is_exact: the kernels give the same bits each time; else only where the choice was not close."""
        if len(self.greedy) != len(other.greedy):
            return True
        return any(
            mine != theirs and (is_exact or margin > _SURE_MARGIN)
            for mine, theirs, margin in zip(self.greedy, other.greedy, self.margins, strict=True)
        )


def sing(decoder: Decoder, precision: str, device: torch.device) -> Canary:
    """Two passes over a pool of their own. Nobody else may use the decoder meanwhile."""
    vocab_size = decoder.spec.vocab_size
    prompt = [(number * _STRIDE) % vocab_size for number in range(1, _PROMPT_TOKENS + 1)]
    blocks = blocks_for(_PROMPT_TOKENS + _MORE_TOKENS, BLOCK_TOKENS)
    table = tuple(range(1, blocks + 1))
    with torch.inference_mode():
        pool = KVPool(decoder.spec.kv_shape, blocks, kv_dtype(precision), device)
        first = _greedy(decoder, pool, prompt, Span(table, 0, len(prompt)))
        # What the prompt left in the cache is read by the second pass.
        more = [first.greedy[-1], *prompt[: _MORE_TOKENS - 1]]
        second = _greedy(decoder, pool, more, Span(table, len(prompt), len(more)))
    return Canary(first.greedy + second.greedy, first.margins + second.margins)


def _greedy(decoder: Decoder, pool: KVPool, tokens: Sequence[int], span: Span) -> Canary:
    logits = decoder.logits(decoder.forward(PackedTokens(tokens, (span,)), pool)).float().cpu()
    best = logits.topk(2, dim=1)
    margins = best.values[:, 0] - best.values[:, 1]
    return Canary(
        tuple(int(token) for token in best.indices[:, 0]),
        tuple(round(float(margin), 4) for margin in margins),
    )
