"""Renders chat templates, which are other people's programs, in Jinja's immutable sandbox.

The sandbox keeps a template from Python's objects; it does not bound time or memory: callers run it in a process with limits.
The environment is the one that templates are written for (transformers' `apply_chat_template`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """The template does not compile, or fails on these messages; the text says why, in the template's own words if it has any."""


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; for inference its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_chat_template(source: str) -> Template:
    """Raises ChatTemplateError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError, ValueError, SyntaxError) as error:
        raise ChatTemplateError(f"the chat template does not compile: {_short(error)}") from error


def render_chat_template(
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool,
) -> str:
    """`special_tokens` are bos_token and its kin, by name. Raises ChatTemplateError."""
    try:
        return template.render(
            messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens
        )
    except (ChatTemplateError, MemoryError):
        raise
    # A template can raise nearly anything: a type error on our values, a key it misses, a recursion of its own.
    except Exception as error:
        raise ChatTemplateError(f"the chat template failed: {_short(error)}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which would put \u003c where the model was trained on "<".
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(str(message)[:200])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
