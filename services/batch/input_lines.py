"""The rules of an input file: what is a line, and what is wrong with it. Pure; bytes in, lines and problems out.

1. A line ends with LF or CR LF; the last one may end without. A byte order mark before the first is passed over.
2. Blank lines are passed over; they count when lines are numbered, from 1.
3. Each line is an object with `custom_id`, `method`, `url` and `body`, in UTF-8.
4. `custom_id` is text of 1 to 256 characters, and no other line of the file has it.
5. `method` is POST, `url` the batch's endpoint, and `body.model` the same in all lines.
What else a body says is judged when the line runs: it fails alone, with the answer that the endpoint would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

MAX_LINES = 50_000
MAX_LINE_BYTES = 1024 * 1024
"""As large as a body over HTTP."""
MAX_PROBLEMS = 100
MAX_CUSTOM_ID_CHARS = 256
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class FileLine:
    """number: from 1, blank lines counted. offset: of its first byte in the file. content: None if it is too long."""

    number: int
    offset: int
    length: int
    content: bytes | None


class LineSplitter:
    """Cuts a stream of bytes into lines; holds no more than one line."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._rest_offset = 0
        self._skipped = 0
        """Bytes of an over-long line that were let go."""
        self._number = 0
        self._first = True

    def feed(self, piece: bytes) -> Iterator[FileLine]:
        """Yield the lines that end in this piece."""
        start = 0
        while (end := piece.find(b"\n", start)) >= 0:
            self._keep(piece[start:end])
            if (line := self._take(newline=1)) is not None:
                yield line
            start = end + 1
        self._keep(piece[start:])

    def close(self) -> Iterator[FileLine]:
        """Yield the last line if nothing ended it."""
        if (self._rest or self._skipped) and (line := self._take(newline=0)) is not None:
            yield line

    def _keep(self, piece: bytes) -> None:
        if self._skipped or len(self._rest) + len(piece) > MAX_LINE_BYTES + 2:
            self._skipped += len(self._rest) + len(piece)
            self._rest.clear()
        else:
            self._rest += piece

    def _take(self, newline: int) -> FileLine | None:
        raw, offset, skipped = bytes(self._rest), self._rest_offset, self._skipped
        self._rest.clear()
        self._skipped = 0
        self._rest_offset += len(raw) + skipped + newline
        self._number += 1
        if self._first and raw.startswith(_BOM):
            raw, offset = raw[len(_BOM) :], offset + len(_BOM)
        self._first = False
        if skipped:
            return FileLine(self._number, offset, skipped, None)
        content = raw.removesuffix(b"\r")
        if not content.strip():
            return None
        if len(content) > MAX_LINE_BYTES:
            return FileLine(self._number, offset, len(content), None)
        return FileLine(self._number, offset, len(content), content)


class _Body(msgspec.Struct):
    model: str


class InputLine(msgspec.Struct):
    """One line as its file spells it."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


_decode_line = msgspec.json.Decoder(InputLine).decode
_decode_body = msgspec.json.Decoder(_Body).decode


@dataclass(frozen=True, slots=True)
class Problem:
    """Shown in `errors.data[]` of a failed batch."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class AcceptedLine:
    number: int
    custom_id: str
    offset: int
    length: int


@dataclass(slots=True)
class FileCheck:
    """Judges a file line by line. At the first line over the limit, or at too many problems, it is `full`."""

    endpoint: str
    model: str | None = None
    """What the first good line names; all others must."""
    accepted: list[AcceptedLine] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _count: int = 0

    @property
    def full(self) -> bool:
        return self._count > MAX_LINES or len(self.problems) >= MAX_PROBLEMS

    def add(self, line: FileLine) -> None:
        self._count += 1
        if self._count > MAX_LINES:
            self.problems = [Problem("too_many_tasks", f"A batch has at most {MAX_LINES} lines.")]
            return
        found = self._judge(line)
        if isinstance(found, Problem):
            self.problems.append(found)
        else:
            self._seen.add(found.custom_id)
            self.accepted.append(found)

    def finish(self) -> None:
        """All lines were given."""
        if self._count == 0:
            self.problems = [Problem("empty_file", "The input file has no lines.")]

    def _judge(self, line: FileLine) -> AcceptedLine | Problem:
        if line.content is None:
            return Problem("line_too_large", f"A line has at most {MAX_LINE_BYTES} bytes.", line.number)
        try:
            line.content.decode("utf-8")  # the decoder looks at the texts that it needs alone
            parsed = _decode_line(line.content)
            body = _decode_body(parsed.body)
        except UnicodeDecodeError:
            return Problem("invalid_json_line", "The line is not UTF-8.", line.number)
        except msgspec.ValidationError as error:
            return Problem("invalid_json_line", _shorten(str(error)), line.number)
        except msgspec.DecodeError:
            return Problem("invalid_json_line", "The line is not valid JSON.", line.number)
        if not 1 <= len(parsed.custom_id) <= MAX_CUSTOM_ID_CHARS or "\x00" in parsed.custom_id:
            message = f"custom_id must have 1 to {MAX_CUSTOM_ID_CHARS} characters, none of them null."
            return Problem("invalid_custom_id", message, line.number, "custom_id")
        if parsed.custom_id in self._seen:
            return Problem(
                "duplicate_custom_id", "Another line has this custom_id.", line.number, "custom_id"
            )
        if parsed.method != "POST":
            return Problem("invalid_method", "The method must be POST.", line.number, "method")
        if parsed.url != self.endpoint:
            return Problem(
                "url_mismatch", f"The url is not the batch's endpoint, {self.endpoint}.", line.number, "url"
            )
        if self.model is None:
            self.model = body.model
        elif body.model != self.model:
            return Problem(
                "model_mismatch", "All lines of a batch must name the same model.", line.number, "body.model"
            )
        return AcceptedLine(line.number, parsed.custom_id, line.offset, line.length)


def read_body(content: bytes) -> bytes:
    """Return the body of a line that was accepted before."""
    return bytes(_decode_line(content).body)


def _shorten(message: str) -> str:
    return f"The line does not fit: {message}."[:300]
