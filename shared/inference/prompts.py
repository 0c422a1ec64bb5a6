"""Prompts and chat messages of a request body: what may stand in them, checked before any tokenizer sees them. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from shared.inference.errors import ApiError, bad_request
from shared.inference.rules import Schema, invalid_type, invalid_value, shown, unsupported

MAX_PROMPTS = 16
MAX_MESSAGES = 1024
MAX_CONTENT_PARTS = 256
MAX_TOKEN_ID = 2**31 - 1
MAX_PROMPT_TOKENS = 1_048_576

# A body says "developer" where models were trained on "system": OpenAI calls them the same thing.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Fields that the openai package writes back when an answer's message is appended to the next request: fine while empty.
_EMPTY_MESSAGE_FIELDS = frozenset(
    {"refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id"}
)

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Prompts:
    """A string, token ids, or a list of either; parsed to a tuple with one entry per prompt."""

    max_prompts: int = MAX_PROMPTS

    def parse(self, value: Any, param: str) -> tuple[Prompt, ...]:
        if isinstance(value, str):
            return (_text(value, param),)
        if not isinstance(value, list):
            raise invalid_type(param, "a string, a list of token ids, or a list of either")
        if not value:
            raise _empty(param)
        if isinstance(value[0], str):
            items = self._bounded(value, param)
            return tuple(_text(item, f"{param}[{index}]") for index, item in enumerate(items))
        if isinstance(value[0], list):
            items = self._bounded(value, param)
            return tuple(_token_ids(item, f"{param}[{index}]") for index, item in enumerate(items))
        return (_token_ids(value, param),)

    def _bounded(self, items: list[Any], param: str) -> list[Any]:
        if len(items) > self.max_prompts:
            raise bad_request(
                "too_many_prompts", f"{param} may hold at most {self.max_prompts} prompts.", param
            )
        return items

    def schema(self) -> Schema:
        text: Schema = {"type": "string", "minLength": 1}
        item: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
        ids: Schema = {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_PROMPT_TOKENS}
        several: Schema = {"type": "array", "minItems": 1, "maxItems": self.max_prompts}
        forms = [text, ids, {**several, "items": text}, {**several, "items": ids}]
        return {
            "anyOf": forms,
            "description": "Control tokens written in text stay text; send token ids for them.",
        }


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """The per-model URL's prompt: one string."""

    def parse(self, value: Any, param: str) -> str:
        return _text(value, param)

    def schema(self) -> Schema:
        return {"type": "string", "minLength": 1}


@dataclass(frozen=True, slots=True)
class Messages:
    max_messages: int = MAX_MESSAGES

    def parse(self, value: Any, param: str) -> tuple[ChatMessage, ...]:
        if not isinstance(value, list):
            raise invalid_type(param, "a list of messages")
        if not 1 <= len(value) <= self.max_messages:
            raise bad_request(
                "invalid_messages", f"{param} must hold 1 to {self.max_messages} messages.", param
            )
        return tuple(_message(item, f"{param}[{index}]") for index, item in enumerate(value))

    def schema(self) -> Schema:
        part: Schema = {
            "type": "object",
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            "required": ["type", "text"],
            "additionalProperties": False,
        }
        parts: Schema = {"type": "array", "items": part, "minItems": 1, "maxItems": MAX_CONTENT_PARTS}
        message: Schema = {
            "type": "object",
            "properties": {
                "role": {"enum": list(ROLES)},
                "content": {"anyOf": [{"type": "string"}, parts]},
                "name": {"anyOf": [{"type": "string", "pattern": f"^{_NAME.pattern}$"}, {"type": "null"}]},
                **{name: {"enum": [None, []]} for name in sorted(_EMPTY_MESSAGE_FIELDS)},
            },
            "required": ["role", "content"],
            "additionalProperties": False,
        }
        return {"type": "array", "items": message, "minItems": 1, "maxItems": self.max_messages}


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise invalid_type(param, "a string")
    if not value.strip():
        raise _empty(param)
    return value


def _token_ids(value: Any, param: str) -> tuple[int, ...]:
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        raise invalid_type(param, "a list of token ids (integers)")
    if not value:
        raise _empty(param)
    if len(value) > MAX_PROMPT_TOKENS:
        raise invalid_value(param, f"may hold at most {MAX_PROMPT_TOKENS} token ids")
    if min(value) < 0 or max(value) > MAX_TOKEN_ID:
        raise bad_request("invalid_token_id", f"{param} holds a number that is not a token id.", param)
    return tuple(value)


def _message(value: Any, param: str) -> ChatMessage:
    """1. An object. 2. A role that is known. 3. Only known fields, and nothing in those that are not built. 4. Content is text."""
    if not isinstance(value, dict):  # 1
        raise invalid_type(param, "an object")
    role = value.get("role")  # 2
    if role is None:
        raise bad_request("missing_parameter", f"{param}.role is required.", f"{param}.role")
    if not isinstance(role, str):
        raise invalid_type(f"{param}.role", "a string")
    if role in ("tool", "function"):
        raise unsupported(f"{param}.role")
    if role not in ROLES:
        raise bad_request(
            "invalid_messages", f"{param}.role must be one of {', '.join(ROLES)}.", f"{param}.role"
        )
    for name, field in value.items():  # 3
        if name in _EMPTY_MESSAGE_FIELDS:
            if field is not None and field != []:
                raise unsupported(f"{param}.{name}")
        elif name not in ("role", "content", "name"):
            path = f"{param}.{shown(name)}"
            raise bad_request("unknown_parameter", f"Unknown parameter: {path}.", path)
    name = value.get("name")
    if name is not None and not isinstance(name, str):
        raise invalid_type(f"{param}.name", "a string")
    if name is not None and not _NAME.fullmatch(name):
        raise invalid_value(f"{param}.name", "must have 1 to 64 letters, digits, underscores or hyphens")
    return ChatMessage(ROLES[role], _content(value.get("content"), f"{param}.content"), name)  # 4


def _content(value: Any, param: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise bad_request("missing_parameter", f"{param} is required.", param)
    if not isinstance(value, list):
        raise invalid_type(param, "a string or a list of text parts")
    if not 1 <= len(value) <= MAX_CONTENT_PARTS:
        raise bad_request("invalid_messages", f"{param} must hold 1 to {MAX_CONTENT_PARTS} parts.", param)
    texts = []
    for index, part in enumerate(value):
        path = f"{param}[{index}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise invalid_type(path, "an object with a type")
        if part["type"] != "text":
            raise unsupported(f"{path}.type")
        for name in part:
            if name not in ("type", "text"):
                raise bad_request(
                    "unknown_parameter", f"Unknown parameter: {path}.{shown(name)}.", f"{path}.{shown(name)}"
                )
        if not isinstance(part.get("text"), str):
            raise invalid_type(f"{path}.text", "a string")
        texts.append(part["text"])
    return "".join(texts)


def _empty(param: str) -> ApiError:
    return bad_request("empty_prompt", f"{param} is empty.", param)
