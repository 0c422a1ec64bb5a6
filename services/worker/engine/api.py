"""The engine's public values: what goes in, what comes out, and the refusals.

Plain data without behaviour; the worker maps its messages to these and back. Token indices count generated tokens
from 0, tokens given as `prior_tokens` included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

RefusalCode = Literal[
    "context_length_exceeded", "invalid_token_id", "invalid_request", "unknown_model", "duplicate_sequence"
]
Pooling = Literal["mean", "last"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """kv_tokens: the KV pool in tokens, shared by all models. max_batch: sequences resident at once over all models.

    prefill_chunk_tokens: prompts are cut at multiples of it. step_tokens: what one step computes over all models; answers
    take theirs first, prompts the rest. None: one chunk beside a full batch.
    block_tokens: of one block of the pool; kernels know 16 only. kernels: "auto" takes the fastest that can serve a model;
    "torch" and "native" are for comparing them. threads: that compute on a CPU; 0 measures what is best for the C kernels, at the
    first model and again while models answer (plain torch then takes one).
    steps_ahead: 1 launches a step before the last one's tokens are read, so that a GPU never waits for the host; an answer
    comes one call of `Engine.step` later. None: 1 on a GPU, 0 on a CPU.
    host_image_bytes: of pinned memory for images of models that come and go on a GPU; a CPU maps theirs.
    """

    device: str = "cpu"
    precision: str = "bf16"
    max_batch: int = 16
    max_context_tokens: int = 2048
    kv_tokens: int = 32768
    prefill_chunk_tokens: int = 256
    step_tokens: int | None = None
    block_tokens: int = 16
    threads: int = 1
    kernels: Literal["auto", "torch", "native"] = "auto"
    steps_ahead: int | None = None
    host_image_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer's tokens are drawn.

    temperature: 0 is greedy. top_k: 0 is off. logit_bias: (token, addend) pairs. logprobs: None is off, k asks for the
    k most likely alternatives of each token, 0 for the chosen token alone. min_tokens: before that many tokens neither
    an end-of-sequence token, nor a stop token, nor a stop string ends the answer. bad_words: sequences of tokens that the
    answer does not hold; their last token is never drawn after the others.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One answer to generate, or one text to embed.

    isolation_key: the team; cached state is never shared across it. max_tokens: length of the whole answer,
    `prior_tokens` included. prior_tokens: already generated before a resume; they are context and are not emitted again.
    echo_logprobs: also score the prompt; the scores come with the first delta. pooling: no answer (`max_tokens` is 0) but
    one vector from the prompt's states after the final norm: their mean, or the last token's. It comes with the only delta.
    background: it runs in what others leave, and waits within a step when they need the device.
    """

    sequence_id: str
    model: str
    isolation_key: str
    prompt_tokens: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    prior_tokens: Sequence[int] = ()
    echo_logprobs: bool = False
    pooling: Pooling | None = None
    background: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logs under the model's own distribution, before temperature, penalties and bias."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one sequence.

    text: released by these tokens; "" while half a character or a possible stop string is held back.
    error: this sequence failed, alone and for good; `finish_reason` is None then.
    prompt_logprobs: with `echo_logprobs`, once: one entry for each prompt token after the first. embedding: with `pooling`,
    fp32 numbers, not normalised.
    cached_prompt_tokens: of the prompt, how many were found computed, by an earlier request of the same team and model;
    the same in all deltas of a sequence.
    """

    sequence_id: str
    token_start: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    embedding: tuple[float, ...] = ()
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """Outcome of the passes that a step read. prefilled: ids of sequences whose first prefill was completed by them.

    damaged: models (not adapters) whose weights turned out to differ from what was written, and what is said of it: every
    sequence of theirs fails until they are unloaded.
    """

    deltas: list[Delta] = field(default_factory=list)
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefilled: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """weight_bytes: what the weights hold in memory in the engine's precision. context_tokens: prompt and answer.

    kernels: what computes it, in words for a log; a slower way says why.
    """

    handle: str
    weight_bytes: int
    vocab_size: int
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    kernels: str = ""


class EngineRefusal(Exception):
    """The request can never be served as it is; nothing of it was kept."""

    def __init__(self, code: RefusalCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class ModelRefusal(ValueError):
    """The model folder cannot be served; the message says which file and why."""
