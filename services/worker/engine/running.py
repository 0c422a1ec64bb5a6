"""One forward pass for pieces of several sequences of one model or adapters on it, and what came of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .api import TokenLogprob
from .decoder import Decoder
from .kv_cache import KVPool
from .packing import PackedTokens, Span
from .pooling import Pooled, add_rows, rows_to_pool
from .sampling import SampledToken, Sampler
from .scoring import score_tokens
from .sequence import LiveSequence

# Prompt positions scored at once: their logits take 4 bytes x vocabulary each.
_SCORED_AT_ONCE = 64

NOT_FINITE = "the model's logits are not finite numbers"


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the sequence's known tokens [start, start + count); after the last known one, draw the next."""

    sequence: LiveSequence
    start: int
    count: int

    @property
    def draws(self) -> bool:
        return self.start + self.count == len(self.sequence.known) and self.sequence.finish_reason is None


@dataclass(frozen=True, slots=True)
class Outcome:
    """sampled: None when the work drew nothing. error: this sequence failed; its keys and values are worthless."""

    work: Work
    sampled: SampledToken | None = None
    error: str | None = None


def run_pass_isolated(
    decoder: Decoder, sampler: Sampler, works: Sequence[Work], pool: KVPool, device: torch.device
) -> list[Outcome]:
    """`run_pass`; when it breaks (out of memory, say), its halves run again, and theirs: only those that break alone fail.

    Running again is safe: a pass writes the same places of the pool, and a sequence's state changes only afterwards.
    A GPU that broke gives no answers any more, to nobody: that one is raised.
    """
    try:
        return run_pass(decoder, sampler, works, pool, device)
    except torch.AcceleratorError:
        raise
    except Exception as problem:  # noqa: BLE001 - it becomes the outcome of the one sequence that it belongs to
        if len(works) == 1:
            return [Outcome(works[0], error=f"{type(problem).__name__}: {problem}")]
    middle = len(works) // 2
    halves = (works[:middle], works[middle:])
    return [outcome for half in halves for outcome in run_pass_isolated(decoder, sampler, half, pool, device)]


def run_pass(
    decoder: Decoder, sampler: Sampler, works: Sequence[Work], pool: KVPool, device: torch.device
) -> list[Outcome]:
    spans = [span for work in works for span in _spans(work)]
    tokens = [token for work in works for token in work.sequence.known[work.start : work.start + work.count]]
    hidden = decoder.forward(PackedTokens(tokens, spans), pool)
    ends = torch.tensor([work.count for work in works]).cumsum(0).tolist()
    prompt_scores = [
        _score_prompt(decoder, work, hidden[end - work.count : end]) if work.sequence.unscored_prompt else []
        for work, end in zip(works, ends, strict=True)
    ]
    pooled = [
        _pool_prompt(decoder, work, hidden[end - work.count : end])
        for work, end in zip(works, ends, strict=True)
    ]
    drawing = [index for index, work in enumerate(works) if work.draws]
    outcomes = [Outcome(work) for work in works]
    if drawing:
        logits = decoder.logits(hidden[torch.tensor([ends[index] - 1 for index in drawing], device=device)])
        sampled = sampler.sample(logits, [works[index].sequence.sampling for index in drawing])
        for index, token in zip(drawing, sampled, strict=True):
            outcomes[index] = Outcome(works[index], token, NOT_FINITE if token is None else None)
    for index, (work, scores, pool_now) in enumerate(zip(works, prompt_scores, pooled, strict=True)):
        work.sequence.prompt_logprobs.extend(scores)
        work.sequence.pooled = pool_now
        is_finite = pool_now.total is None or bool(torch.isfinite(pool_now.total).all())
        if not is_finite or not all(math.isfinite(score.logprob) for score in scores):
            outcomes[index] = Outcome(work, error=NOT_FINITE)
    return outcomes


def _spans(work: Work) -> list[Span]:
    """A piece of the prompt attends as a whole; tokens of the answer one by one, as when they were generated."""
    blocks, adapter = work.sequence.blocks, work.sequence.model.adapter
    if work.start < len(work.sequence.request.prompt_tokens):
        return [Span(blocks, work.start, work.count, adapter)]
    return [Span(blocks, position, 1, adapter) for position in range(work.start, work.start + work.count)]


def _pool_prompt(decoder: Decoder, work: Work, hidden: torch.Tensor) -> Pooled:
    """hidden: (work.count, hidden_size). What the sequence has pooled after this work."""
    sequence, pooling = work.sequence, work.sequence.request.pooling
    if pooling is None:
        return sequence.pooled
    prompt_tokens = len(sequence.request.prompt_tokens)
    rows = rows_to_pool(sequence.pooled, pooling, prompt_tokens, work.start, work.count)
    if not rows:
        return sequence.pooled
    return add_rows(
        sequence.pooled, rows, decoder.final_hidden(hidden[rows.start - work.start : rows.stop - work.start])
    )


def _score_prompt(decoder: Decoder, work: Work, hidden: torch.Tensor) -> list[TokenLogprob]:
    """hidden: (work.count, hidden_size). Row i scores token start + i + 1 where that is a prompt token not yet scored."""
    sequence = work.sequence
    prompt = sequence.request.prompt_tokens
    first = max(work.start, len(sequence.prompt_logprobs))
    last = min(work.start + work.count, len(prompt) - 1)
    scores: list[TokenLogprob] = []
    for begin in range(first, last, _SCORED_AT_ONCE):
        end = min(begin + _SCORED_AT_ONCE, last)
        logprobs = torch.log_softmax(decoder.logits(hidden[begin - work.start : end - work.start]), dim=-1)
        scores += score_tokens(logprobs, prompt[begin + 1 : end + 1], sequence.request.sampling.logprobs)
    return scores
