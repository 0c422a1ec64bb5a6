"""One sequence's life in the engine: its tokens, its blocks, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .api import SequenceRequest, TokenLogprob
from .batching import SequenceView
from .detokenize import TextStream
from .loading import LoadedModel
from .pooling import Pooled, vector_of
from .prefix_cache import PrefixNames, prefix_seed
from .sampling import SamplingState, make_state


@dataclass(frozen=True, slots=True)
class Advance:
    """What a generated token brought: text released by it, and the reason if it was the last."""

    text: str
    finish_reason: str | None


@dataclass(slots=True, eq=False)
class LiveSequence:
    """known: prompt and generated tokens. names: of the blocks that they fill.

    blocks: held, in order of the tokens; the first `findable_blocks` of them can be found by others of the same team,
    those named in `announced` will be.
    cached_prompt_tokens: of the prompt, how many were found computed when it started.
    """

    request: SequenceRequest
    model: LoadedModel
    text: TextStream
    sampling: SamplingState
    known: list[int]
    ending_tokens: frozenset[int]
    view: SequenceView
    names: PrefixNames
    blocks: list[int] = field(default_factory=list)
    findable_blocks: int = 0
    announced: list[bytes] = field(default_factory=list)
    cached_prompt_tokens: int = 0
    is_prefill_reported: bool = False
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    are_prompt_logprobs_taken: bool = False
    pooled: Pooled = field(default_factory=Pooled)

    @property
    def sequence_id(self) -> str:
        return self.request.sequence_id

    @property
    def generated(self) -> int:
        return self.view.known_tokens - self.view.prompt_tokens

    @property
    def unscored_prompt(self) -> int:
        """How many prompt tokens still lack the logprobs that were asked for."""
        if not self.request.echo_logprobs:
            return 0
        return len(self.request.prompt_tokens) - 1 - len(self.prompt_logprobs)

    @property
    def needs_prompt(self) -> bool:
        """Whether the prompt has to be computed although nothing is left to generate: it is scored, or embedded."""
        return self.unscored_prompt > 0 or self.request.pooling is not None

    def embedding(self) -> tuple[float, ...]:
        """Once the whole prompt is computed; empty when none was asked for."""
        pooling = self.request.pooling
        return () if pooling is None else vector_of(self.pooled, pooling, len(self.request.prompt_tokens))

    def take_prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Once: with the first delta. Later calls get nothing."""
        if self.are_prompt_logprobs_taken:
            return ()
        self.are_prompt_logprobs_taken = True
        return tuple(self.prompt_logprobs)

    @property
    def reusable_tokens(self) -> int:
        """How many of its first tokens need no computing when their keys and values are there already.

        1. The last token's row is needed: it draws the next, or is the embedding.
        2. Each row that scores a prompt token, or goes into a mean, is needed once, and everything after it.
        """
        tokens = len(self.known) - 1
        if self.unscored_prompt:
            tokens = min(tokens, len(self.prompt_logprobs))
        if self.request.pooling == "mean":
            tokens = min(tokens, self.pooled.rows)
        return tokens

    def advance(self, token: int) -> Advance:
        """Takes a generated token, drawn now or replayed.

        1. An end-of-sequence or stop token at or after `min_tokens` ends it; the token's own text is not shown.
        2. A stop string ends it; the text before it is shown.
        3. `max_tokens` ends it; what was held back is shown.
        """
        request = self.request
        index = self.generated
        self.known.append(token)
        self.view.known_tokens += 1
        self.sampling.note(token)
        if index >= request.sampling.min_tokens and token in self.ending_tokens:
            return self._finish(self.text.flush(), "stop")
        released = self.text.push(token)
        if released.is_stopped:
            return self._finish(released.text, "stop")
        if self.generated >= request.max_tokens:
            return self._finish(released.text + self.text.flush(), "length")
        return Advance(released.text, None)

    def _finish(self, text: str, reason: str) -> Advance:
        self.finish_reason = reason
        return Advance(text, reason)


def ending_tokens(request: SequenceRequest, model: LoadedModel) -> tuple[int, ...]:
    eos = () if request.sampling.ignore_eos else model.info.eos_token_ids
    return (*eos, *request.stop_token_ids)


def make_sequence(
    request: SequenceRequest, model: LoadedModel, arrival: int, block_tokens: int
) -> LiveSequence:
    """A sequence with its prior tokens replayed: finished already if these say so."""
    prompt: Sequence[int] = list(request.prompt_tokens)
    endings = ending_tokens(request, model)
    sequence = LiveSequence(
        request=request,
        model=model,
        text=TextStream(model.byte_table, request.stop, request.sampling.min_tokens),
        sampling=make_state(request.sampling, prompt, endings),
        known=list(prompt),
        ending_tokens=frozenset(endings),
        view=SequenceView(
            sequence_id=request.sequence_id,
            model=model.info.handle,
            base=model.base,
            arrival=arrival,
            prompt_tokens=len(prompt),
            most_tokens=len(prompt) + request.max_tokens,
            known_tokens=len(prompt),
            team=request.isolation_key,
            background=request.background,
        ),
        names=PrefixNames(_prefix_seed(request.isolation_key, model), block_tokens),
    )
    for token in request.prior_tokens:
        if sequence.finish_reason is None:
            sequence.advance(token)
    if request.max_tokens <= sequence.generated and sequence.finish_reason is None:
        sequence.finish_reason = "length"
    return sequence


def _prefix_seed(isolation_key: str, model: LoadedModel) -> bytes:
    handle = model.info.handle
    adapter = None if handle == model.base else handle
    return prefix_seed(isolation_key, model.base, adapter, model.info.kernels)
