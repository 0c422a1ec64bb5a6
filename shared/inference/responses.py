"""Answers in OpenAI's and the vendor's shapes: whole bodies, and usage and log-probabilities within them. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import msgspec

from shared.inference.errors import ApiError, error_type
from shared.messages import Timings, TokenLogprob

# JSON has no infinity; this is what OpenAI writes for a token that cannot be.
MIN_LOGPROB = -9999.0

encode = msgspec.json.Encoder().encode

Spellings = Mapping[int, bytes]
"""The bytes of each token that an answer shows by itself, for log-probabilities."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every answer and chunk of one request repeats."""

    request_id: str
    created_unix_s: int
    model: str
    revision: int

    @property
    def short_id(self) -> str:
        return self.request_id.removeprefix("req_")

    @property
    def fingerprint(self) -> str:
        return f"rev_{self.revision}"


@dataclass(slots=True)
class Choice:
    """One answer so far. `prompt_logprobs` has one entry less than the prompt has tokens."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt, given back before the answer."""

    text: str
    first_token: int
    logprobs: Sequence[TokenLogprob]


def usage_of(prompt_tokens: int, completion_tokens: int, timings: Iterable[Timings]) -> dict[str, Any]:
    """OpenAI's counts, and how long the slowest job of the request spent in each stage."""
    all_timings = list(timings)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "roundhouse": {
            name: round(max((getattr(t, name) for t in all_timings), default=0.0), 3)
            for name in ("queue_ms", "swap_ms", "prefill_ms", "decode_ms")
        },
    }


def chat_body(
    head: Head, choices: Sequence[Choice], usage: dict[str, Any], *, spellings: Spellings | None
) -> bytes:
    return encode(
        {
            "id": f"chatcmpl-{head.short_id}",
            "object": "chat.completion",
            "created": head.created_unix_s,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                    "logprobs": None if spellings is None else chat_logprobs(choice.logprobs, spellings),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
        }
    )


def completion_body(
    head: Head,
    choices: Sequence[Choice],
    usage: dict[str, Any],
    *,
    spellings: Spellings | None,
    echoes: Sequence[Echo | None],
) -> bytes:
    """`echoes`: one entry per choice. `spellings`: None without log-probabilities."""
    return encode(
        {
            "id": f"cmpl-{head.short_id}",
            "object": "text_completion",
            "created": head.created_unix_s,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
            "choices": [
                {
                    "index": index,
                    "text": _full_text(choice, echo),
                    "logprobs": _logprobs(choice, spellings, echo),
                    "finish_reason": choice.finish_reason,
                }
                for index, (choice, echo) in enumerate(zip(choices, echoes, strict=True))
            ],
            "usage": usage,
        }
    )


def vendor_body(
    choices: Sequence[Choice], now_unix_s: int, *, spellings: Spellings | None, echoes: Sequence[Echo | None]
) -> bytes:
    result = []
    for choice, echo in zip(choices, echoes, strict=True):
        entry: dict[str, Any] = {"completion": _full_text(choice, echo)}
        if spellings is not None:
            entry["logprobs"] = _logprobs(choice, spellings, echo)
        result.append(entry)
    return encode({"result": result, "timestamp": now_unix_s})


class TextOffsets:
    """Where each token begins in its choice's text, in characters. A character of several tokens counts with its last."""

    def __init__(self, start: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._chars = start

    def next(self, spelling: bytes) -> int:
        offset = self._chars
        self._chars += len(self._decoder.decode(spelling))
        return offset


def chat_logprobs(entries: Iterable[TokenLogprob], spellings: Spellings) -> dict[str, Any]:
    return {
        "content": [
            {
                **_chat_token(entry.token, entry.logprob, spellings),
                "top_logprobs": [_chat_token(token, logprob, spellings) for token, logprob in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def completion_logprobs(
    entries: Sequence[TokenLogprob], spellings: Spellings, offsets: TextOffsets, echo: Echo | None = None
) -> dict[str, list[Any]]:
    """Parallel lists. With an echo the prompt's tokens come first; its first has no probability: nothing comes before it."""
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    if echo is not None:
        spelling = spellings[echo.first_token]
        _append(lists, spelling, None, None, offsets)
        entries = [*echo.logprobs, *entries]
    for entry in entries:
        _append(lists, spellings[entry.token], _finite(entry.logprob), _top(entry, spellings), offsets)
    return lists


def _append(
    lists: dict[str, list[Any]],
    spelling: bytes,
    logprob: float | None,
    top: dict[str, float] | None,
    offsets: TextOffsets,
) -> None:
    lists["tokens"].append(_text(spelling))
    lists["token_logprobs"].append(logprob)
    lists["top_logprobs"].append(top)
    lists["text_offset"].append(offsets.next(spelling))


def tokens_in(entries: Iterable[TokenLogprob]) -> Iterator[int]:
    """All token ids whose spelling an answer with these entries needs."""
    for entry in entries:
        yield entry.token
        for token, _ in entry.top:
            yield token


def model_entry(name: str, team_slug: str, created_unix_s: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created_unix_s, "owned_by": team_slug}


def error_frame(error: ApiError) -> bytes:
    """An error after the stream has begun: OpenAI's clients raise on it."""
    body = {
        "message": error.message,
        "type": error_type(error.status),
        "param": error.param,
        "code": error.code,
    }
    return b"data: " + encode({"error": body}) + b"\n\n"


def url_encoded(text: str) -> bytes:
    return quote(text, safe="").encode("ascii")


def _logprobs(choice: Choice, spellings: Spellings | None, echo: Echo | None) -> dict[str, list[Any]] | None:
    if spellings is None:
        return None
    return completion_logprobs(choice.logprobs, spellings, TextOffsets(), echo)


def _full_text(choice: Choice, echo: Echo | None) -> str:
    return (echo.text if echo is not None else "") + "".join(choice.text)


def _top(entry: TokenLogprob, spellings: Spellings) -> dict[str, float]:
    """By text, the drawn token always among them; of two tokens with the same text the likelier is shown."""
    top: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        text = _text(spellings[token])
        top[text] = max(_finite(logprob), top.get(text, MIN_LOGPROB))
    return top


def _chat_token(token: int, logprob: float, spellings: Spellings) -> dict[str, Any]:
    spelling = spellings[token]
    return {"token": _text(spelling), "logprob": _finite(logprob), "bytes": list(spelling)}


def _text(spelling: bytes) -> str:
    return spelling.decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
