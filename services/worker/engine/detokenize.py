"""From token ids to text, as a stream: whole characters only, stop strings held back and cut.

The released text is a function of the token list alone. Replaying a list therefore leaves a stream where it was, which
is how a resumed answer continues. Works on bytes: each token of a byte-level or byte-fallback tokenizer stands for fixed
bytes, so no text is ever released that a later token would change.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .api import ModelRefusal

_SPACE_MARK = "\u2581"


class ByteTable:
    """The bytes of each token id; special tokens and ids beyond the tokenizer have none."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def __getitem__(self, token: int) -> bytes:
        return self.pieces[token] if token < len(self.pieces) else b""


def read_byte_table(tokenizer_json: bytes) -> ByteTable:
    """tokenizer_json: the content of a tokenizer.json. Raises ModelRefusal for decoders that are not byte by byte."""
    try:
        document = json.loads(tokenizer_json)
        vocabulary = _vocabulary(document["model"])
        kinds = _decoder_kinds(document.get("decoder"))
        added = [
            (int(token["id"]), str(token["content"]), bool(token["special"]))
            for token in document["added_tokens"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ModelRefusal(f"tokenizer.json: {problem!r}") from problem
    if "ByteLevel" in kinds:
        to_bytes = _byte_level_decoder()
    elif kinds & {"ByteFallback", "Metaspace"}:
        to_bytes = _fallback_bytes
    else:
        raise ModelRefusal(
            f"tokenizer.json: decoder {sorted(kinds)} is not served; known: ByteLevel, ByteFallback"
        )
    size = 1 + max([*vocabulary.values(), *(token for token, _, _ in added)], default=-1)
    pieces = [b""] * size
    for text, token in vocabulary.items():
        pieces[token] = to_bytes(text)
    for token, content, is_special in added:
        pieces[token] = b"" if is_special else content.encode()
    return ByteTable(pieces)


def read_tokenizer_file(folder: Path) -> bytes:
    try:
        return (folder / "tokenizer.json").read_bytes()
    except OSError as problem:
        raise ModelRefusal(f"tokenizer.json: {problem}") from problem


def _vocabulary(model: Mapping[str, Any]) -> Mapping[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return {entry[0]: token for token, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        raise TypeError("model.vocab must be an object or a list")
    return vocabulary


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return {kind for part in decoder["decoders"] for kind in _decoder_kinds(part)}
    return {decoder["type"]}


def _byte_level_decoder() -> Callable[[str], bytes]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others for U+0100 upward in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    stand_ins.update({chr(0x100 + offset): byte for offset, byte in enumerate(hidden)})

    def to_bytes(text: str) -> bytes:
        try:
            return bytes([stand_ins[character] for character in text])
        except KeyError:
            return text.encode()

    return to_bytes


def _fallback_bytes(text: str) -> bytes:
    """SentencePiece: `<0xAB>` is one byte, the space mark a space, the rest is text.

    The leading space that a whole text's decoder strips stays: an answer continues a prompt.
    """
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass  # A piece that only looks like a byte is text.
    return text.replace(_SPACE_MARK, " ").encode()


@dataclass(frozen=True, slots=True)
class Released:
    text: str
    is_stopped: bool = False


class TextStream:
    """The text of one answer. Push each token once, in order; flush when it ends without a stop string."""

    def __init__(self, table: ByteTable, stop: Sequence[str], min_tokens: int = 0) -> None:
        """min_tokens: stop strings are not looked for in the first that many tokens."""
        self._table = table
        self._stop = tuple(text for text in stop if text)
        self._tokens_before_stop = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> Released:
        """Text that is now certain. After `is_stopped` the stream is at its end."""
        self._held += self._decoder.decode(self._table[token])
        if self._tokens_before_stop > 0:
            self._tokens_before_stop -= 1
            return Released(self._release(len(self._held)))
        stop_at = earliest_stop(self._held, self._stop)
        if stop_at is not None:
            text = self._release(stop_at)
            self._held = ""
            return Released(text, is_stopped=True)
        return Released(self._release(len(self._held) - possible_stop_length(self._held, self._stop)))

    def flush(self) -> str:
        """What was held back; an unfinished character comes as U+FFFD."""
        self._held += self._decoder.decode(b"", final=True)
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


def earliest_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string in `text` begins; None when there is none."""
    return min((at for at in (text.find(each) for each in stop) if at >= 0), default=None)


def possible_stop_length(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    longest = 0
    for each in stop:
        for length in range(min(len(each) - 1, len(text)), longest, -1):
            if text.endswith(each[:length]):
                longest = length
                break
    return longest
