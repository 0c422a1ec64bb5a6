"""A stream's events as bytes, one class per shape. All that repeats is serialized once per request; a token costs one escape.

Each class knows how a stream begins, what a delta adds, and how it ends. The caller writes the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from services.gateway.owner import TextDelta
from shared.inference.errors import ApiError
from shared.inference.responses import (
    Head,
    Spellings,
    TextOffsets,
    chat_logprobs,
    completion_logprobs,
    encode,
    error_frame,
    url_encoded,
)

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"


class Frames(Protocol):
    def begin(self) -> bytes:
        """What stands before the first token."""

    def delta(self, choice: int, delta: TextDelta, spellings: Spellings) -> bytes:
        """Empty while there is nothing to show yet. `choice` counts over all prompts; `spellings` has the tokens in its
        log-probabilities."""

    def end(self, usage: dict[str, Any]) -> bytes: ...

    def error(self, error: ApiError) -> bytes:
        """The last bytes of a stream that failed."""


class _OpenAIFrames:
    def __init__(self, head: Head, kind: str, id_prefix: str, *, include_usage: bool) -> None:
        common = {
            "id": f"{id_prefix}-{head.short_id}",
            "object": kind,
            "created": head.created_unix_s,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }
        self._start = b"data: " + encode(common)[:-1]
        self._end = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._include_usage = include_usage

    def end(self, usage: dict[str, Any]) -> bytes:
        if not self._include_usage:
            return DONE
        return self._start + b',"choices":[],"usage":' + encode(usage) + b"}\n\n" + DONE

    def error(self, error: ApiError) -> bytes:
        return error_frame(error)


class ChatFrames(_OpenAIFrames):
    """`chat.completion.chunk`: first each choice's role, then contents, last its finish reason."""

    def __init__(self, head: Head, choices: int, *, include_usage: bool, with_logprobs: bool) -> None:
        super().__init__(head, "chat.completion.chunk", "chatcmpl", include_usage=include_usage)
        self._with_logprobs = with_logprobs
        self._openings = [
            self._start + b',"choices":[{"index":%d,"delta":' % index for index in range(choices)
        ]

    def begin(self) -> bytes:
        role = (
            b'{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}]'
            + self._end
        )
        return b"".join(opening + role for opening in self._openings)

    def delta(self, choice: int, delta: TextDelta, spellings: Spellings) -> bytes:
        opening, out = self._openings[choice], b""
        with_logprobs = self._with_logprobs and delta.logprobs
        if delta.text or with_logprobs:
            logprobs = encode(chat_logprobs(delta.logprobs, spellings)) if with_logprobs else b"null"
            out = b"".join(
                (
                    opening, b'{"content":', encode(delta.text), b'},"logprobs":', logprobs,
                    b',"finish_reason":null}]', self._end,
                )
            )  # fmt: skip
        if delta.finish_reason is not None:
            reason = encode(delta.finish_reason)
            out += opening + b'{},"logprobs":null,"finish_reason":' + reason + b"}]" + self._end
        return out


class CompletionFrames(_OpenAIFrames):
    """`text_completion` chunks. `echoes`: the text that stands before each choice's answer, empty for none."""

    def __init__(
        self, head: Head, echoes: Sequence[str], *, include_usage: bool, with_logprobs: bool
    ) -> None:
        super().__init__(head, "text_completion", "cmpl", include_usage=include_usage)
        self._with_logprobs = with_logprobs
        self._echoes = echoes
        self._openings = [
            self._start + b',"choices":[{"index":%d,"text":' % index for index in range(len(echoes))
        ]
        self._offsets = [TextOffsets(len(text)) for text in echoes]

    def begin(self) -> bytes:
        return b"".join(self._chunk(i, text, b"null", None) for i, text in enumerate(self._echoes) if text)

    def delta(self, choice: int, delta: TextDelta, spellings: Spellings) -> bytes:
        with_logprobs = self._with_logprobs and delta.logprobs
        if not delta.text and not with_logprobs and delta.finish_reason is None:
            return b""
        logprobs = b"null"
        if with_logprobs:
            logprobs = encode(completion_logprobs(delta.logprobs, spellings, self._offsets[choice]))
        return self._chunk(choice, delta.text, logprobs, delta.finish_reason)

    def _chunk(self, choice: int, text: str, logprobs: bytes, finish_reason: str | None) -> bytes:
        return b"".join(
            (
                self._openings[choice], encode(text), b',"logprobs":', logprobs,
                b',"finish_reason":', encode(finish_reason), b"}]", self._end,
            )
        )  # fmt: skip


class VendorFrames:
    """`update` events with all of the text so far, URL-encoded, then `end` with the whole. One choice only."""

    def __init__(self, echo: str) -> None:
        self._text = bytearray(url_encoded(echo))

    def begin(self) -> bytes:
        return b"event: update\ndata: " + bytes(self._text) + b"\n\n" if self._text else b""

    def delta(self, choice: int, delta: TextDelta, spellings: Spellings) -> bytes:
        del choice, spellings
        if not delta.text:
            return b""
        self._text += url_encoded(delta.text)
        return b"event: update\ndata: " + bytes(self._text) + b"\n\n"

    def end(self, usage: dict[str, Any]) -> bytes:
        del usage
        return b"event: end\ndata: " + bytes(self._text) + b"\n\n"

    def error(self, error: ApiError) -> bytes:
        return b"event: error\n" + error_frame(error)
