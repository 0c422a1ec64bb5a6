"""One forward pass for pieces of several sequences of one model or adapters on it, and what came of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from .api import TokenLogprob
from .decoder import Decoder, WeightsDamaged
from .kv_cache import KVPool
from .packing import PackedTokens, Span
from .pooling import Pooled, add_rows, rows_to_pool
from .sampling import SampledBatch, SampledToken, Sampler, sample_on_device
from .scoring import score_tokens
from .sequence import LiveSequence
from .transfer import to_device

# Prompt positions scored at once: their logits take 4 bytes x vocabulary each.
_SCORED_AT_ONCE = 64

NOT_FINITE = "the model's logits are not finite numbers"


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the sequence's tokens [start, start + count); after the last one, draw the next where `draws`."""

    sequence: LiveSequence
    start: int
    count: int
    draws: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """sampled: None when the work drew nothing. error: this sequence failed; its keys and values are worthless."""

    work: Work
    sampled: SampledToken | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LaunchedPass:
    """A pass that the device has been told to run. Until it is read, its draws are on the device alone.

    errors: of works that failed already, by their index. drawing: indices of works that draw, in the order of `sampled`.
    """

    works: Sequence[Work]
    drawing: Sequence[int] = ()
    sampled: SampledBatch | None = None
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return self.works[0].sequence.view.base

    def drawn_rows(self) -> dict[LiveSequence, int]:
        """Where in the draws each sequence's token is."""
        return {self.works[index].sequence: row for row, index in enumerate(self.drawing)}

    def read(self) -> list[Outcome]:
        """Waits for the device."""
        outcomes = [Outcome(work) for work in self.works]
        if self.sampled is not None:
            for index, token in zip(self.drawing, self.sampled.read(), strict=True):
                outcomes[index] = Outcome(self.works[index], token, NOT_FINITE if token is None else None)
        for index, error in self.errors.items():
            outcomes[index] = Outcome(self.works[index], error=error)
        return outcomes


def may_run_ahead(in_flight: Sequence[LaunchedPass]) -> bool:
    """Whether a further step may be launched before these passes are read.

    1. Each model has one pass in flight: a row's unread token is looked for in the last one only.
    2. No sequence has bad words of several tokens: the host compares them with the answer.
    """
    bases = [launched.base for launched in in_flight]
    if len(set(bases)) < len(bases):
        return False
    return not any(
        work.draws and work.sequence.sampling.bad_sequences is not None
        for launched in in_flight
        for work in launched.works
    )


def launch_isolated(
    decoder: Decoder, sampler: Sampler, works: Sequence[Work], pool: KVPool, device: torch.device
) -> list[LaunchedPass]:
    """`launch`; when it breaks (out of memory, say), its halves run again, and theirs: only those that break alone fail.

    Running again is safe: a pass writes the same places of the pool, and a sequence's state changes only afterwards.
    A GPU that broke gives no answers any more, to nobody: that one is raised, and so is WeightsDamaged, which is all of theirs.
    """
    try:
        return [launch(decoder, sampler, works, pool, device)]
    except (torch.AcceleratorError, WeightsDamaged):
        raise
    except Exception as problem:  # noqa: BLE001 - it becomes the outcome of the one sequence that it belongs to
        if len(works) == 1:
            return [LaunchedPass(works, errors={0: f"{type(problem).__name__}: {problem}"})]
    middle = len(works) // 2
    halves = (works[:middle], works[middle:])
    return [done for half in halves for done in launch_isolated(decoder, sampler, half, pool, device)]


def launch(
    decoder: Decoder,
    sampler: Sampler,
    works: Sequence[Work],
    pool: KVPool,
    device: torch.device,
    before: LaunchedPass | None = None,
) -> LaunchedPass:
    """before: the model's pass in flight, which holds the tokens of these works that are not known yet."""
    hidden = decoder.forward(_pack(works, before), pool)
    ends = list(accumulate(work.count for work in works))
    prompt_scores = [
        _score_prompt(decoder, work, hidden[end - work.count : end]) if work.sequence.unscored_prompt else []
        for work, end in zip(works, ends, strict=True)
    ]
    pooled = [
        _pool_prompt(decoder, work, hidden[end - work.count : end])
        for work, end in zip(works, ends, strict=True)
    ]
    drawing = [index for index, work in enumerate(works) if work.draws]
    sampled = None
    if drawing:
        if len(drawing) < len(hidden):
            hidden = hidden[to_device(torch.tensor([ends[index] - 1 for index in drawing]), device)]
        sequences = [works[index].sequence for index in drawing]
        batch = sampler.prepare(
            [sequence.sampling for sequence in sequences],
            [sequence.view.unread_tokens for sequence in sequences],
        )
        sampled = sample_on_device(decoder.logits(hidden), batch)
    errors: dict[int, str] = {}
    for index, (work, scores, pool_now) in enumerate(zip(works, prompt_scores, pooled, strict=True)):
        work.sequence.prompt_logprobs.extend(scores)
        work.sequence.pooled = pool_now
        is_finite = pool_now.total is None or bool(torch.isfinite(pool_now.total).all())
        if not is_finite or not all(math.isfinite(score.logprob) for score in scores):
            errors[index] = NOT_FINITE
    return LaunchedPass(works, drawing, sampled, errors)


def _pack(works: Sequence[Work], before: LaunchedPass | None) -> PackedTokens:
    rows = {} if before is None else before.drawn_rows()
    tokens: list[int] = []
    uses_drawn = False
    for work in works:
        known = work.sequence.known[work.start : work.start + work.count]
        tokens += known
        if len(known) < work.count:
            tokens.append(-1 - rows[work.sequence])
            uses_drawn = True
    drawn = (
        before.sampled.tokens if uses_drawn and before is not None and before.sampled is not None else None
    )
    return PackedTokens(tokens, [span for work in works for span in _spans(work)], drawn)


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
