"""What a team publishes to submit lines, and what it gets back: version 1. Pure.

`queue_format.v1.schema.json` beside this file says the same as JSON Schema; a test holds the two together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from shared.completion_window import WORDS, window_s

VERSION = 1
MAX_SUBMISSION_BYTES = 2 * 1024 * 1024
MAX_LINES = 200
DEFAULT_WINDOW = "24h"
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Submission(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Lines as a batch's file has them. `id` is the client's: the same id again is the same submission."""

    version: Any
    """It is 1: looked at before the rest is."""
    id: str
    lines: list[msgspec.Raw]
    completion_window: str = DEFAULT_WINDOW

    @property
    def window_s(self) -> int:
        found = window_s(self.completion_window)
        assert found is not None  # it was read by `read_submission`
        return found


@dataclass(frozen=True, slots=True)
class Refusal:
    """errors: what is wrong with which line, as in `errors.data[]` of a failed batch."""

    code: str
    message: str
    id: str | None = None
    errors: tuple[Mapping[str, Any], ...] = ()


class _Head(msgspec.Struct):
    version: Any = None
    id: Any = None


_decode_head = msgspec.json.Decoder(_Head).decode
_decode = msgspec.json.Decoder(Submission).decode
_encode = msgspec.json.Encoder().encode


def read_submission(body: bytes) -> Submission | Refusal:
    """Read a message's body; its lines stay as they are.

    1. Over 2 MiB -> message_too_large.
    2. Not one JSON object in UTF-8 -> invalid_json.
    3. Another `version` than 1, or none -> unsupported_version.
    4. Fields that are missing, unknown or of another kind, an `id` that is none -> invalid_message.
    5. No lines, or over 200 -> invalid_message, too_many_lines.
    """
    if len(body) > MAX_SUBMISSION_BYTES:  # 1
        return Refusal("message_too_large", f"A message has at most {MAX_SUBMISSION_BYTES} bytes.")
    try:  # 2
        body.decode("utf-8")
        head = _decode_head(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Refusal("invalid_json", "The message is not one JSON object in UTF-8.")
    known = head.id if isinstance(head.id, str) and _ID.fullmatch(head.id) else None
    if isinstance(head.version, bool) or head.version != VERSION:  # 3
        return Refusal("unsupported_version", f"The version must be {VERSION}.", known)
    try:  # 4
        submission = _decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        return Refusal("invalid_message", f"The message does not fit: {error}."[:300], known)
    if known is None:
        return Refusal("invalid_message", "id must be 1 to 128 visible ASCII characters.")
    if window_s(submission.completion_window) is None:
        return Refusal("invalid_message", f"completion_window {WORDS}.", known)
    if not submission.lines:  # 5
        return Refusal("invalid_message", "There are no lines.", known)
    if len(submission.lines) > MAX_LINES:
        return Refusal("too_many_lines", f"A message has at most {MAX_LINES} lines.", known)
    return submission


def write_accepted(submission_id: str, batch_id: str, first_line: int, lines: int) -> bytes:
    """The lines are kept, and will end; `first_line` is the number of the first of them in the batch."""
    return _encode(
        {
            "version": VERSION,
            "type": "accepted",
            "id": submission_id,
            "batch_id": batch_id,
            "first_line": first_line,
            "lines": lines,
        }
    )


def write_refused(refusal: Refusal) -> bytes:
    """Nothing of the message was kept."""
    return _encode(
        {
            "version": VERSION,
            "type": "refused",
            "id": refusal.id,
            "code": refusal.code,
            "message": refusal.message,
            "errors": list(refusal.errors),
        }
    )


def write_result(submission_id: str, batch_id: str, line: int, result: bytes) -> bytes:
    """What became of one line, as a batch's output file has it."""
    return _encode(
        {
            "version": VERSION,
            "type": "result",
            "id": submission_id,
            "batch_id": batch_id,
            "line": line,
            "result": msgspec.Raw(result),
        }
    )
