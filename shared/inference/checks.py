"""What can be judged only with the model at hand: the context, the vocabulary, and how a job ended. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from shared.inference.errors import ApiError, bad_request, must_not_retry
from shared.inference.parameters import GenerationRequest
from shared.inference.principal import ModelView, Route
from shared.inference.rules import invalid_value


class NamesTokens(Protocol):
    def named_tokens(self) -> Iterable[tuple[str, Sequence[int]]]: ...


class Ended(Protocol):
    """What of a job's end is told to its client."""

    @property
    def outcome(self) -> str: ...

    @property
    def error_code(self) -> str | None: ...


LOST_RETRY_S = 1
_WORKERS_REFUSALS = {
    "context_length_exceeded": ("The model's worker refused the prompt.", "prompt"),
    "invalid_token_id": ("The model's worker refused the prompt.", "prompt"),
    "invalid_request": ("The model's worker refused the request.", None),
    "invalid_dimensions": ("The model's vectors have not so many dimensions.", "dimensions"),
    "result_too_large": ("So many vectors of this size are too much for one answer: send fewer.", "input"),
}


def context_tokens(model: ModelView, route: Route) -> int:
    """What the model can attend to and its resource has room for."""
    return min(model.context_tokens, route.resource.max_context_tokens)


def check_vocabulary(wanted: NamesTokens, vocab_size: int) -> None:
    """Every token id that the client named exists in the model. Raises ApiError 400."""
    for param, tokens in wanted.named_tokens():
        if max(tokens, default=0) >= vocab_size:
            raise _unknown_token(param, vocab_size)


def check_inputs(inputs: Sequence[Sequence[int]], context: int) -> None:
    """Each text to embed has a token, and fits. Raises ApiError 400."""
    for index, tokens in enumerate(inputs):
        if not tokens:
            raise bad_request("empty_prompt", f"input[{index}] is empty.", "input")
        if len(tokens) > context:
            message = (
                f"This model's context length is {context} tokens, and input[{index}] has {len(tokens)}."
            )
            raise bad_request("context_length_exceeded", message, "input")


def choose_max_tokens(
    wanted: GenerationRequest, prompts: Sequence[Sequence[int]], context: int, default_max_tokens: int
) -> int:
    """The answer's token limit. Raises ApiError 400.

    1. A prompt that came to no token -> empty_prompt.
    2. A prompt that leaves no room for one token -> context_length_exceeded.
    3. A limit was given: prompt and limit must fit -> that limit.
    4. None was given -> what the longest prompt leaves, at most `default_max_tokens`; `min_tokens` must fit in it.
    """
    longest = max(map(len, prompts))
    param = "messages" if wanted.operation == "chat" else "prompt"
    if not all(prompts):  # 1
        raise bad_request("empty_prompt", f"{param} is empty.", param)
    if longest >= context:  # 2
        raise _too_long(context, longest, wanted.max_tokens or 1, param)
    if wanted.max_tokens is not None:  # 3
        if longest + wanted.max_tokens > context:
            raise _too_long(context, longest, wanted.max_tokens, param)
        return wanted.max_tokens
    room = min(context - longest, default_max_tokens)  # 4
    if wanted.sampling.min_tokens > room:
        raise invalid_value("min_tokens", f"must not be above {room}, the most tokens of this answer")
    return room


def refusal_of(finished: Ended) -> ApiError | None:
    """How a job that is over is told to its client; None for a success.

    1. Its deadline passed -> 504, and no retry: it would take as long again.
    2. Its resource was turned off -> 409, and no retry.
    3. It ended several workers -> 500, and no retry.
    4. The worker could not take it as it is -> 400.
    5. Anything else was our fault and cost nothing -> 503, to be tried again. What the worker said stays inside.
    """
    if finished.outcome == "succeeded":
        return None
    code = finished.error_code
    if finished.outcome == "expired":  # 1
        return must_not_retry(
            ApiError(504, "deadline_exceeded", "The request was not finished before its deadline.")
        )
    if code == "resource_off":  # 2
        return must_not_retry(ApiError(409, "resource_off", "The resource was turned off."))
    if code == "poison":  # 3
        return must_not_retry(
            ApiError(500, "poison", "The request failed on several workers and is given up.")
        )
    if code in _WORKERS_REFUSALS:  # 4
        return bad_request(code, *_WORKERS_REFUSALS[code])
    return ApiError(
        503, code or "generation_failed", "The generation failed.", retry_after_s=LOST_RETRY_S
    )  # 5


def _unknown_token(param: str, vocab_size: int) -> ApiError:
    return bad_request("invalid_token_id", f"{param} names a token id that is not below {vocab_size}.", param)


def _too_long(context: int, prompt: int, answer: int, param: str) -> ApiError:
    message = (
        f"This model's context length is {context} tokens. You asked for {prompt + answer} tokens: "
        f"{prompt} in the prompt and {answer} for the completion."
    )
    return bad_request("context_length_exceeded", message, param)
