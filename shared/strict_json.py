"""Request bytes to a Python value, refusing what readers of JSON disagree about.

`json.loads` alone accepts NaN, 1e999, doubled keys, lone surrogates and NUL, and raises three kinds of errors for the
rest. Whatever passes here can be stored in PostgreSQL and encoded as UTF-8. Knows nothing of HTTP or of fields.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from shared.inference.errors import ApiError, bad_request

MAX_DEPTH = 32
MAX_CONTAINERS = 20_000
"""Objects and lists in one body. Ten times the longest conversation; a megabyte of `[],` would hold the loop 0.2 s."""
# Beyond 2**64 no field of ours has a meaning; Python's own limit of 4300 digits would raise something else.
MAX_INTEGER_DIGITS = 20
MAX_PARAM_CHARS = 128

# A string may lack its end, and the parts are possessive: one pass over any input, however broken.
_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class _Flaw:
    """Stands in the parsed tree where something is wrong, so that the walk can name its place."""

    code: str
    message: str


_NOT_A_NUMBER = _Flaw("invalid_json", "NaN and Infinity are not JSON.")
_OUT_OF_RANGE = _Flaw("number_out_of_range", "The number is out of range.")
_BAD_TEXT = _Flaw("invalid_unicode", "Text may not contain NUL or lone surrogates.")


def loads(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`, in time linear in its length. Raises `ApiError` 400:

    1. Not UTF-8, or with a byte order mark -> invalid_encoding.
    2. Deeper than 32 -> json_too_deep; more than 20,000 objects and lists -> json_too_complex.
    3. Not one JSON document, NaN, Infinity, or not an object -> invalid_json.
    4. A key twice in one object -> duplicate_key.
    5. A number that is no finite double, or over 20 digits -> number_out_of_range.
    6. NUL or a lone surrogate in any text or key -> invalid_unicode.
    """
    try:  # 1
        text = body.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise bad_request("invalid_encoding", "The body is not valid UTF-8.") from error
    if text.startswith("\ufeff"):
        raise bad_request("invalid_encoding", "The body begins with a byte order mark.")
    if not text or text.isspace():
        raise bad_request("invalid_json", "The body is empty; a JSON object is expected.")
    _check_structure(text)  # 2
    try:  # 3
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=lambda _text: _NOT_A_NUMBER,
        )
    except json.JSONDecodeError as error:
        raise bad_request(
            "invalid_json", f"The body is not valid JSON (at character {error.pos})."
        ) from error
    flaw = _find_flaw(value)  # 3 to 6
    if flaw is not None:
        raise _refusal(*flaw)
    if not isinstance(value, dict):
        raise bad_request("invalid_json", "The body must be a JSON object.")
    return value


def _check_structure(text: str) -> None:
    # Counting brackets, even those inside strings, is far cheaper than the scan and nearly always enough.
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = containers = 0
    for match in _STRUCTURE.finditer(text):
        character = match[0][0]
        if character in "[{":
            depth += 1
            containers += 1
            if depth > MAX_DEPTH:
                raise bad_request("json_too_deep", f"The body is nested deeper than {MAX_DEPTH} levels.")
            if containers > MAX_CONTAINERS:
                raise bad_request(
                    "json_too_complex", f"The body has more than {MAX_CONTAINERS} objects and lists."
                )
        elif character in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Flaw:
    found = dict(pairs)
    if len(found) != len(pairs):
        return _Flaw("duplicate_key", "A key comes twice in one object.")
    return found


def _integer(text: str) -> int | _Flaw:
    return int(text) if len(text.lstrip("-")) <= MAX_INTEGER_DIGITS else _OUT_OF_RANGE


def _number(text: str) -> float | _Flaw:
    value = float(text)
    return value if math.isfinite(value) else _OUT_OF_RANGE


def _find_flaw(value: Any) -> tuple[_Flaw, list[str | int]] | None:
    """Return the first flaw in the tree with the keys that lead to it, innermost first."""
    if isinstance(value, _Flaw):
        return value, []
    if isinstance(value, str):
        return None if _is_sound(value) else (_BAD_TEXT, [])
    if isinstance(value, dict):
        for key, child in value.items():
            if not _is_sound(key):
                return _BAD_TEXT, []
            found = _find_flaw(child)
            if found is not None:
                found[1].append(key)
                return found
    elif isinstance(value, list):
        for index, child in enumerate(value):
            found = _find_flaw(child)
            if found is not None:
                found[1].append(index)
                return found
    return None


def _is_sound(text: str) -> bool:
    if "\x00" in text:
        return False
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refusal(flaw: _Flaw, path: list[str | int]) -> ApiError:
    param = ""
    for step in reversed(path):
        if isinstance(step, int):
            param += f"[{step}]"
        else:
            shown = step if _PLAIN_KEY.fullmatch(step) else "?"
            param += f".{shown}" if param else shown
    return bad_request(flaw.code, flaw.message, param[:MAX_PARAM_CHARS] or None)
