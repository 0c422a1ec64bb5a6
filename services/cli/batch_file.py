"""What is read of a batch's file before it is sent; and the messages that it becomes, if it goes through the queue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from services.cli.client import CliError
from shared.queue_format import MAX_LINES, MAX_SUBMISSION_BYTES

HEAD_BYTES = 1024
"""Room in a message for all but its lines."""
MAX_LINE_BYTES = 1024 * 1024
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Part:
    """Lines of a file that go in one message; first_line: its number in the file, from 1."""

    number: int
    first_line: int
    offset: int
    length: int
    lines: int


def first_url(file: Path) -> str:
    """The `url` of the first line that says something. Raises `CliError`."""
    try:
        with file.open("rb") as opened:
            first = next((line for line in opened if line.strip().removeprefix(b"\xef\xbb\xbf")), b"")
        url = json.loads(first.decode("utf-8-sig"))["url"]
    except OSError as error:
        raise CliError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CliError(f"the first line of {file} is no JSON object with a url") from error
    return str(url)


def parts_of(file: Path) -> list[Part]:
    """Cut a file so that each part is a message: all its lines name one endpoint and one model. Raises `CliError`."""
    parts: list[Part] = []
    begun, kind, size = None, None, 0
    try:
        with file.open("rb") as opened:
            for number, offset, length, text in _lines(opened):
                line_kind = _kind(file, number, text)
                size += len(text) + 1
                full = begun is not None and (
                    begun.lines == MAX_LINES or size > MAX_SUBMISSION_BYTES - HEAD_BYTES
                )
                if begun is None or full or line_kind != kind:
                    parts += [begun] if begun else []
                    begun, kind, size = Part(len(parts) + 1, number, offset, 0, 0), line_kind, len(text) + 1
                end = offset + length
                begun = Part(
                    begun.number, begun.first_line, begun.offset, end - begun.offset, begun.lines + 1
                )
    except OSError as error:
        raise CliError(f"{file} cannot be read: {error.strerror}") from error
    if begun is None:
        raise CliError(f"{file} has no lines")
    return [*parts, begun]


def message_of(file: Path, part: Part, submission_id: str, window: str) -> bytes:
    """The message that a part goes in."""
    with file.open("rb") as opened:
        opened.seek(part.offset)
        lines = [text for raw in opened.read(part.length).split(b"\n") if (text := _text(raw))]
    head = json.dumps({"version": 1, "id": submission_id, "completion_window": window})
    return head[:-1].encode() + b', "lines": [' + b",".join(lines) + b"]}"


def _lines(opened: BinaryIO) -> Iterator[tuple[int, int, int, bytes]]:
    """Number, offset, length and text of each line that says something."""
    offset = 0
    for number, raw in enumerate(opened, start=1):
        if text := _text(raw):
            yield number, offset, len(raw), text
        offset += len(raw)


def _text(raw: bytes) -> bytes:
    return raw.removeprefix(_BOM).strip()


def _kind(file: Path, number: int, text: bytes) -> tuple[str, str]:
    """Endpoint and model of a line. The rest of it is judged by whom it is sent to."""
    if len(text) > MAX_LINE_BYTES:
        raise CliError(f"line {number} of {file} has over {MAX_LINE_BYTES} bytes")
    try:
        line = json.loads(text.decode("utf-8"))
        return str(line["url"]), str(line["body"]["model"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CliError(f"line {number} of {file} is no JSON object with a url and a body.model") from error
