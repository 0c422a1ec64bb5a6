"""As much of PromQL as is needed to see which metrics and labels an expression reads."""

from __future__ import annotations

import re
from typing import NamedTuple

_WORDS = {
    "and",
    "or",
    "unless",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "offset",
    "bool",
    "inf",
}
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"([A-Za-z_:][\w:]*)?\s*\{([^{}]*)\}")
_MATCHER = re.compile(r"([A-Za-z_]\w*)\s*(=~|!~|!=|=)\s*(\d+)")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_NAME = re.compile(r"(?<![\w:.])([A-Za-z_:][\w:]*)\b(?!\s*\()")


class Matcher(NamedTuple):
    label: str
    operator: str
    value: str


class Reads(NamedTuple):
    metrics: set[str]
    labels: set[str]
    matchers: list[Matcher]


def reads(expression: str) -> Reads:
    """What the expression looks at: metrics, labels in selectors and groupings, and the selectors' conditions."""
    texts: list[str] = []

    def number(match: re.Match[str]) -> str:
        texts.append(match[0][1:-1])
        return str(len(texts) - 1)

    bare = _STRING.sub(number, expression)
    matchers = [
        Matcher(label, operator, texts[int(index)])
        for _, inside in _SELECTOR.findall(bare)
        for label, operator, index in _MATCHER.findall(inside)
    ]
    groups = {
        label.strip() for inside in _GROUPING.findall(bare) for label in inside.split(",") if label.strip()
    }
    rest = _RANGE.sub(" ", _GROUPING.sub(" ", _SELECTOR.sub(r"\1 ", bare)))
    metrics = set(_NAME.findall(rest)) - _WORDS
    return Reads(metrics, groups | {matcher.label for matcher in matchers}, matchers)
