"""One model's tokenizer and chat template: text to token ids and back, with users' words kept apart from control tokens.

A tokenizer turns the text `<|im_start|>` into the control token of that name, wherever it stands. In a template's own text that is
wanted; in what a user wrote it would let the user speak as the system. So users' text never yields a control token: not as a
prompt, not in a message, not by two pieces that only together spell one. Runs in a process with limits (`tokenizer_child`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template
from tokenizers import Tokenizer

from shared.chat_template import ChatTemplateError, compile_chat_template, render_chat_template
from shared.inference.tokenizer_protocol import (
    CONTROL_TOKEN,
    MODEL_UNREADABLE,
    NO_CHAT_TEMPLATE,
    NO_TOKENS,
    TEMPLATE_REFUSED,
)

_TOKENIZER, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# Unicode's noncharacters: never in text that is exchanged, so one of them can mark a place in it.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
# SentencePiece spells a byte that is no character of its own so.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_MATCHES_NOTHING = re.compile(r"(?!)")


def _byte_of_char() -> dict[str, bytes]:
    """Byte-level vocabularies write each byte as one visible character: Latin-1's own where it is visible, else one from U+0100 on,
    in order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in visible)
    table = {chr(byte): bytes([byte]) for byte in visible}
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_of_char()


class TokenizationRefused(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class LoadedTokenizer:
    """Not safe for threads: whether special tokens are read from text is a switch of the tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer, template: Template | None, special_tokens: Mapping[str, str]
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = special_tokens
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token: entry.content for token, entry in added.items()}
        self._is_byte_level = "ByteLevel" in str(tokenizer.decoder)
        control_texts = {entry.content for entry in added.values() if entry.special}
        # An unknown token may stand for any odd character of the user's; it controls nothing unless it has a second role.
        control_texts |= {text for name, text in special_tokens.items() if name != "unk_token"}
        ids = {text: tokenizer.token_to_id(text) for text in control_texts if text}
        self._control_ids: dict[str, int] = {text: token for text, token in ids.items() if token is not None}
        self._control_id_set = frozenset(self._control_ids.values())
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._control = (
            re.compile("|".join(map(re.escape, longest_first))) if longest_first else _MATCHES_NOTHING
        )
        self._beginnings = frozenset(text[:i] for text in self._control_ids for i in range(1, len(text)))
        self._endings = frozenset(text[i:] for text in self._control_ids for i in range(1, len(text)))
        self._longest = max(map(len, self._control_ids), default=0)

    def encode_text(self, text: str) -> list[int]:
        """A prompt as it is: the tokenizer adds what it adds to every text (often a first token), and parses nothing in it."""
        self._tokenizer.encode_special_tokens = True
        encoding = self._tokenizer.encode(text, add_special_tokens=True)
        ids: list[int] = encoding.ids
        strays = sum(
            token in self._control_id_set and not added
            for token, added in zip(ids, encoding.special_tokens_mask, strict=True)
        )
        if not strays:
            return ids
        mask = encoding.special_tokens_mask
        first = next((i for i, added in enumerate(mask) if not added), 0)
        last = len(mask) - next((i for i, added in enumerate(reversed(mask)) if not added), 0)
        return ids[:first] + self._encode_as_text(text) + ids[last:]

    def encode_word(self, word: str) -> list[list[int]]:
        """The ways a word is spelled within a text, each once: at its beginning and after a space; one that itself begins with
        a space only so."""
        forms = [word] if word[:1].isspace() else [word, f" {word}"]
        spelled = dict.fromkeys(tuple(self._encode_as_text(form)) for form in forms)
        if () in spelled:
            raise TokenizationRefused(NO_TOKENS, "the tokenizer makes nothing of a word")
        return [list(ids) for ids in spelled]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The conversation in the model's own template, up to where the assistant speaks.

        1. The template is rendered with marks within users' texts, wherever those could become a control token: what still
           reads as one is the template's own.
        2. Without the marks the whole, encoded at once as anyone would, has just the template's control tokens: that.
        3. Otherwise a user wrote a control token, or half of one: what stands between the template's own is encoded as text.
        """
        pieces, controls = self._cut(messages)  # 1
        text = pieces[0] + "".join(
            control + piece for control, piece in zip(controls, pieces[1:], strict=True)
        )
        wanted = [self._control_ids[control] for control in controls]
        self._tokenizer.encode_special_tokens = False
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if [token for token in ids if token in self._control_id_set] == wanted:  # 2
            return ids
        ids = self._encode_as_text(pieces[0])  # 3
        for token, piece in zip(wanted, pieces[1:], strict=True):
            ids += [token, *self._encode_as_text(piece)]
        return ids

    def _cut(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[str], list[str]]:
        """The rendered conversation, cut at the template's own control tokens: the pieces (one more), and the tokens.

        Marks stand in every control token of a user's, and at both ends of every text. A template that looks at how a text begins
        or ends would see them there: for such a one they stand only at ends that are a part of a control token.
        """
        mark = self._unused_mark(messages)
        plain = self._render(messages)
        try:
            marked = self._render(self._marked(messages, mark, at_all_ends=True))
        except TokenizationRefused:
            marked = ""
        if marked.replace(mark, "") != plain:
            marked = self._render(self._marked(messages, mark, at_all_ends=False))
        pieces, controls, end = [], [], 0
        for match in self._control.finditer(marked):
            pieces.append(marked[end : match.start()].replace(mark, ""))
            controls.append(match.group())
            end = match.end()
        return [*pieces, marked[end:].replace(mark, "")], controls

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def spell(self, token: int) -> bytes:
        """The bytes that the token stands for; none for an id that is only there to pad the vocabulary."""
        if token in self._added:
            return self._added[token].encode()
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._is_byte_level:
            return b"".join(_BYTE_OF_CHAR.get(char) or char.encode() for char in text)
        if match := _BYTE_TOKEN.fullmatch(text):
            return bytes([int(match[1], 16)])
        return text.replace("\u2581", " ").encode()

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        if self._template is None:
            raise TokenizationRefused(NO_CHAT_TEMPLATE, "the model has no chat template")
        try:
            return render_chat_template(
                self._template, messages, self._special_tokens, add_generation_prompt=True
            )
        except ChatTemplateError as error:
            raise TokenizationRefused(TEMPLATE_REFUSED, str(error)) from error

    def _marked(
        self, messages: Sequence[Mapping[str, str]], mark: str, *, at_all_ends: bool
    ) -> list[dict[str, str]]:
        return [
            {
                field: text if field == "role" else self._with_marks(text, mark, at_all_ends=at_all_ends)
                for field, text in message.items()
            }
            for message in messages
        ]

    def _with_marks(self, text: str, mark: str, *, at_all_ends: bool) -> str:
        """White space at the ends stays outside of the marks: templates like to trim it."""
        body = text.strip()
        if not body:
            return text
        start = text.index(body)
        broken = self._control.sub(lambda match: match.group()[0] + mark + match.group()[1:], body)
        before = mark if at_all_ends or self._starts_inside(body) else ""
        after = mark if at_all_ends or self._ends_inside(body) else ""
        return text[:start] + before + broken + after + text[start + len(body) :]

    def _starts_inside(self, text: str) -> bool:
        return any(text[:i] in self._endings for i in range(1, min(self._longest, len(text) + 1)))

    def _ends_inside(self, text: str) -> bool:
        return any(text[-i:] in self._beginnings for i in range(1, min(self._longest, len(text) + 1)))

    def _unused_mark(self, messages: Sequence[Mapping[str, str]]) -> str:
        for mark in _MARKS:
            if not any(mark in text for message in messages for text in message.values()):
                return mark
        raise TokenizationRefused(CONTROL_TOKEN, "the messages hold every Unicode noncharacter")

    def _encode_as_text(self, text: str) -> list[int]:
        """Encode without a control token. Some tokenizers know one as an ordinary word too: there the word is cut in two."""
        self._tokenizer.encode_special_tokens = True
        ids: list[int] = []
        pieces = [text]
        while pieces:
            piece = pieces.pop()
            encoding = self._tokenizer.encode(piece, add_special_tokens=False)
            strays = [
                span
                for token, span in zip(encoding.ids, encoding.offsets, strict=True)
                if token in self._control_id_set
            ]
            if not strays:
                ids += encoding.ids
                continue
            cuts = [0, *(start + 1 for start, end in strays if end - start > 1), len(piece)]
            if len(cuts) != len(strays) + 2:
                raise TokenizationRefused(
                    CONTROL_TOKEN, "a character of the text stands for a control token of the model"
                )
            # Last piece first: the list is read from its end.
            pieces += [piece[a:b] for a, b in itertools.pairwise(cuts) if a < b][::-1]
        return ids


def digest_of_files(folder: Path) -> bytes:
    """Of all that `load_tokenizer` reads; a file that is not there counts as such. Raises TokenizationRefused."""
    digest = hashlib.sha256()
    for name in (_TOKENIZER, _CONFIG, _TEMPLATE):
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            digest.update(b"-")
            continue
        except OSError as error:
            raise TokenizationRefused(MODEL_UNREADABLE, f"{name}: {error}"[:200]) from error
        digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.digest()


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Raises TokenizationRefused when the folder's files cannot be read as a tokenizer."""
    try:
        tokenizer = Tokenizer.from_str((folder / _TOKENIZER).read_text(encoding="utf-8"))
    # The library raises a bare Exception for a file it does not understand.
    except Exception as error:
        raise TokenizationRefused(
            MODEL_UNREADABLE, f"tokenizer.json: {type(error).__name__}: {error}"[:200]
        ) from error
    try:
        config = _read_json(folder / _CONFIG)
        source = _template_source(folder, config)
        template = None if source is None else compile_chat_template(source)
        return LoadedTokenizer(tokenizer, template, _special_tokens(config))
    except (OSError, ValueError, TypeError) as error:
        raise TokenizationRefused(MODEL_UNREADABLE, f"tokenizer_config.json: {error}"[:200]) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"{path.name} is not an object")
    return content


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own wins; a list of named templates is taken at its `default`."""
    path = folder / _TEMPLATE
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its kin by name, written as text or as an object with `content`."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if not name.endswith("_token"):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found
