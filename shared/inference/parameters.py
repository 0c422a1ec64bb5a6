"""The three inference bodies as tables of fields, and their one meaning, `GenerationRequest`.

Pure. Every field of OpenAI's schemas stands here: built, accepted because it changes nothing, or refused as unsupported; then the
extras that vLLM's server takes. Any other name is unknown. OpenAPI's schemas are made from the same tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from shared.inference.errors import bad_request
from shared.inference.prompts import ChatMessage, Messages, Prompt, Prompts, TextPrompt
from shared.inference.rules import (
    Field,
    Flag,
    IntegerIn,
    LogitBias,
    Metadata,
    NumberIn,
    ObjectOf,
    Only,
    Schema,
    Strings,
    Text,
    TokenIds,
    by_name,
    invalid_value,
    object_schema,
    parse_fields,
)
from shared.messages import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_N = 8
MAX_COMPLETION_LOGPROBS = 5
MAX_TOP_LOGPROBS = 20
MAX_BAD_WORDS = 64


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the client wants, whichever door it came through. Exactly one of `prompts` and `messages` is filled."""

    operation: Literal["chat", "text_completion"]
    model: str
    prompts: tuple[Prompt, ...]
    messages: tuple[ChatMessage, ...]
    n: int
    max_tokens: int | None
    """None: as many as the context leaves, up to the server's bound (chat only)."""
    sampling: SamplingParams
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    bad_words: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: bool

    def named_tokens(self) -> Iterator[tuple[str, Sequence[int]]]:
        """All token ids that the client named, by field."""
        for prompt in self.prompts:
            if not isinstance(prompt, str):
                yield "prompt", prompt
        yield "logit_bias", [token for token, _ in self.sampling.logit_bias]
        yield "stop_token_ids", self.stop_token_ids

    def with_bad_words(self, spellings: Sequence[Sequence[int]]) -> GenerationRequest:
        """The same, its bad words known by their token ids."""
        words = [list(ids) for ids in spellings]
        return replace(self, sampling=msgspec.structs.replace(self.sampling, bad_words=words))


_BAD_WORDS = Strings(
    MAX_BAD_WORDS,
    Text(1, 64),
    "May not stand in the answer, spelled as the tokenizer spells them: by themselves and after a space, or, if they begin "
    "with a space, as they are. Another case, or another cut into tokens, is another word.",
)
MODEL = Field("model", Text(1, 256), required=True)
_SAMPLING = (
    Field("temperature", NumberIn(0, 2), 1.0),
    Field("top_p", NumberIn(0, 1, low_excluded=True), 1.0),
    Field("top_k", IntegerIn(-1, 1_000_000), 0),
    Field("min_p", NumberIn(0, 1), 0.0),
    Field("repetition_penalty", NumberIn(0.01, 10), 1.0),
    Field("presence_penalty", NumberIn(-2, 2), 0.0),
    Field("frequency_penalty", NumberIn(-2, 2), 0.0),
    Field("logit_bias", LogitBias(300, NumberIn(-100, 100)), ()),
    Field("seed", IntegerIn(0, MAX_SEED)),
    Field("stop_token_ids", TokenIds(64, IntegerIn(0, 2**31 - 1)), ()),
    Field("ignore_eos", Flag(), False),
    Field("min_tokens", IntegerIn(0, MAX_TOKENS), 0),
    Field("bad_words", _BAD_WORDS, ()),
)
_STOP = Strings(4, Text(1, 64))
_STREAM_OPTIONS = ObjectOf(
    (
        Field("include_usage", Flag(), False),
        Field("include_obfuscation", Only((False,))),
        Field("continuous_usage_stats", Only((False,))),
    )
)
_N = Field("n", IntegerIn(1, MAX_N), 1)
_SHARED = (
    MODEL,
    _N,
    Field("stop", _STOP, ()),
    Field("stream", Flag(), False),
    Field("stream_options", _STREAM_OPTIONS),
    *_SAMPLING,
    # Change nothing here, so any good value is taken.
    Field("user", Text(0, 512)),
    # vLLM's extras that are not built.
    *(
        Field(name, Only((False,)))
        for name in ("use_beam_search", "include_stop_str_in_output", "return_token_ids")
    ),
    *(Field(name, Only((False,))) for name in ("return_tokens_as_token_ids",)),
    *(Field(name, Only((True,))) for name in ("skip_special_tokens", "spaces_between_special_tokens")),
    Field("length_penalty", Only((1, 1.0))),
    Field("priority", Only((0,))),
    *(
        Field(name, Only())
        for name in (
            "allowed_token_ids",
            "cache_salt",
            "guided_choice",
            "guided_grammar",
            "guided_json",
            "guided_regex",
            "logits_processors",
            "prompt_logprobs",
            "structured_outputs",
            "truncate_prompt_tokens",
        )
    ),
)


COMPLETION_FIELDS = by_name(
    *_SHARED,
    Field("prompt", Prompts(), required=True),
    # 0 is for a prompt that is only to be scored.
    Field("max_tokens", IntegerIn(0, MAX_TOKENS), DEFAULT_COMPLETION_TOKENS),
    Field("best_of", IntegerIn(1, MAX_N)),
    Field("echo", Flag(), False),
    Field("logprobs", IntegerIn(0, MAX_COMPLETION_LOGPROBS)),
    Field("suffix", Only(("",))),
    Field("add_special_tokens", Only((True,))),
    Field("response_format", Only(({"type": "text"},))),
)

CHAT_FIELDS = by_name(
    *_SHARED,
    Field("messages", Messages(), required=True),
    Field("max_tokens", IntegerIn(1, MAX_TOKENS)),
    Field("max_completion_tokens", IntegerIn(1, MAX_TOKENS)),
    Field("logprobs", Flag(), False),
    Field("top_logprobs", IntegerIn(0, MAX_TOP_LOGPROBS)),
    # Change nothing here: nothing is stored, there is one tier, and prompts are cached by team without a key.
    Field("metadata", Metadata()),
    Field("store", Only((False,))),
    Field("service_tier", Only(("auto", "default"))),
    Field("safety_identifier", Text(0, 512)),
    Field("prompt_cache_key", Text(0, 512)),
    Field("prompt_cache_retention", Only(("in_memory", "in-memory"))),
    Field("verbosity", Only(("medium",))),
    Field("modalities", Only((["text"],))),
    Field("response_format", Only(({"type": "text"},))),
    Field("tools", Only(([],))),
    Field("tool_choice", Only(("none",))),
    Field("functions", Only(([],))),
    Field("function_call", Only(("none",))),
    *(
        Field(name, Only())
        for name in (
            "audio",
            "moderation",
            "parallel_tool_calls",
            "prediction",
            "prompt_cache_options",
            "reasoning_effort",
            "web_search_options",
            "chat_template",
            "chat_template_kwargs",
            "documents",
        )
    ),
    *(Field(name, Only((False,))) for name in ("echo", "continue_final_message", "add_special_tokens")),
    Field("add_generation_prompt", Only((True,))),
)

VENDOR_FIELDS = by_name(
    Field("prompt", TextPrompt()),
    Field("text", TextPrompt()),
    Field("max_tokens", IntegerIn(1, MAX_TOKENS)),
    Field("length", IntegerIn(1, MAX_TOKENS)),
    _N,
    Field("stop", _STOP),
    Field("stop_sequences", _STOP),
    Field("stream", Flag(), False),
    Field("echo", Flag(), False),
    Field("logprobs", IntegerIn(0, MAX_COMPLETION_LOGPROBS)),
    *_SAMPLING,
)


def completion_schema() -> Schema:
    return object_schema(COMPLETION_FIELDS.values())


def chat_schema() -> Schema:
    return object_schema(CHAT_FIELDS.values())


def vendor_schema() -> Schema:
    return object_schema(VENDOR_FIELDS.values())


def parse_completion(body: Mapping[str, Any], *, random_seed: int) -> GenerationRequest:
    """Read the body of `/v1/completions`. `random_seed` serves a body without one. Raises ApiError 400."""
    values = parse_fields(body, COMPLETION_FIELDS)
    best_of = values["best_of"]
    if best_of is not None and best_of < values["n"]:
        raise invalid_value("best_of", "must not be below n")
    if best_of is not None and best_of > values["n"]:
        raise bad_request("unsupported_parameter", "best_of above n is not supported.", "best_of")
    if values["max_tokens"] == 0 and not values["echo"]:
        raise invalid_value("max_tokens", "must be at least 1 without echo")
    return _request(values, "text_completion", values["logprobs"], random_seed, prompts=values["prompt"])


def parse_chat(body: Mapping[str, Any], *, random_seed: int) -> GenerationRequest:
    """Read the body of `/v1/chat/completions`. Raises ApiError 400."""
    values = parse_fields(body, CHAT_FIELDS)
    values["max_tokens"] = _either(values, "max_completion_tokens", "max_tokens")
    values["echo"] = False
    logprobs, top = values["logprobs"], values["top_logprobs"]
    if top is not None and not logprobs:
        raise invalid_value("top_logprobs", "needs logprobs to be true")
    return _request(
        values, "chat", (top or 0) if logprobs else None, random_seed, messages=values["messages"]
    )


def parse_vendor(body: Mapping[str, Any], *, model: str, random_seed: int) -> GenerationRequest:
    """Read the body of the per-model URL, whose path names the model. Raises ApiError 400."""
    values = parse_fields(body, VENDOR_FIELDS)
    prompt = _either(values, "prompt", "text")
    if prompt is None:
        raise bad_request("missing_parameter", "prompt is required.", "prompt")
    values |= {
        "model": model,
        "max_tokens": _either(values, "max_tokens", "length") or DEFAULT_COMPLETION_TOKENS,
        "stop": _either(values, "stop", "stop_sequences") or (),
        "stream_options": None,
    }
    if values["stream"] and values["n"] > 1:
        # Its events carry one text and no index.
        raise bad_request("unsupported_combination", "stream and n above 1 do not go together.", "n")
    return _request(values, "text_completion", values["logprobs"], random_seed, prompts=(prompt,))


def _request(
    values: Mapping[str, Any],
    operation: Literal["chat", "text_completion"],
    logprobs: int | None,
    random_seed: int,
    *,
    prompts: tuple[Prompt, ...] = (),
    messages: tuple[ChatMessage, ...] = (),
) -> GenerationRequest:
    max_tokens, stream, echo = values["max_tokens"], values["stream"], values["echo"]
    if max_tokens is not None and values["min_tokens"] > max_tokens:
        raise invalid_value("min_tokens", "must not be above max_tokens")
    options = values["stream_options"]
    if options is not None and not stream:
        raise invalid_value("stream_options", "needs stream to be true")
    if stream and echo and logprobs is not None:
        # The prompt's log-probabilities are known for sure only when the job is over.
        raise bad_request(
            "unsupported_combination", "stream, echo and logprobs do not go together.", "logprobs"
        )
    seed = values["seed"]
    sampling = SamplingParams(
        temperature=values["temperature"],
        top_k=max(values["top_k"], 0),  # vLLM writes -1 for off
        top_p=values["top_p"],
        min_p=values["min_p"],
        repetition_penalty=values["repetition_penalty"],
        presence_penalty=values["presence_penalty"],
        frequency_penalty=values["frequency_penalty"],
        logit_bias=list(values["logit_bias"]),
        seed=random_seed if seed is None else seed,
        logprobs=logprobs,
        ignore_eos=values["ignore_eos"],
        min_tokens=values["min_tokens"],
        echo_logprobs=echo and logprobs is not None,
    )
    return GenerationRequest(
        operation=operation,
        model=values["model"],
        prompts=prompts,
        messages=messages,
        n=values["n"],
        max_tokens=max_tokens,
        sampling=sampling,
        stop=values["stop"],
        stop_token_ids=values["stop_token_ids"],
        bad_words=values["bad_words"],
        stream=stream,
        include_usage=bool(options and options["include_usage"]),
        echo=echo,
    )


def _either(values: Mapping[str, Any], name: str, alias: str) -> Any:
    """One value that may be given by two names; both only if they agree."""
    first, second = values[name], values[alias]
    if first is not None and second is not None and first != second:
        raise invalid_value(alias, f"differs from {name}")
    return second if first is None else first
