"""docker-compose.yml as Compose reads it: merged, and with its variables filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
ENV_EXAMPLE = ROOT / ".env.example"

# ${NAME}, ${NAME:-default}, ${NAME:?message}; a $$ is a dollar sign.
_VARIABLE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)(?:(:-|:\?)([^}]*))?\})")
_PERIOD = re.compile(r"(?:(\d+)m)?(?:(\d+)s)?")


class MissingVariable(Exception):
    """Compose would refuse to start."""


def raw() -> dict[str, Any]:
    """Anchors and merge keys resolved, variables not."""
    loaded = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def rendered(environ: Mapping[str, str]) -> dict[str, Any]:
    """With variables filled in from `environ`. Raises MissingVariable for a required one."""
    filled = _fill(raw(), environ)
    assert isinstance(filled, dict)
    return filled


def variables() -> dict[str, set[str]]:
    """Each variable that the file uses, with its forms: "" (plain), "required", or "default"."""
    forms = {None: "", ":-": "default", ":?": "required"}
    found: dict[str, set[str]] = {}
    # Comments may show variables that are not used.
    for name, operator, _ in _VARIABLE.findall(yaml.safe_dump(raw(), width=10_000)):
        if name:
            found.setdefault(name, set()).add(forms[operator or None])
    return found


def read_env_file(text: str) -> dict[str, str]:
    lines = (line.strip() for line in text.splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def sample_environ() -> dict[str, str]:
    """What .env.example asks for, with something in each empty place."""
    given = read_env_file(ENV_EXAMPLE.read_text(encoding="utf-8"))
    return {name: value or f"sample-{name.lower().replace('_', '-')}" for name, value in given.items()}


def seconds(period: str) -> int:
    match = _PERIOD.fullmatch(period)
    assert match and period, f"{period!r} is not a period like 1m30s"
    return 60 * int(match[1] or 0) + int(match[2] or 0)


def _fill(value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(each, environ) for key, each in value.items()}
    if isinstance(value, list):
        return [_fill(each, environ) for each in value]
    return _VARIABLE.sub(lambda match: _value(match, environ), value) if isinstance(value, str) else value


def _value(match: re.Match[str], environ: Mapping[str, str]) -> str:
    name, operator, word = match.groups()
    if name is None:
        return "$"
    if value := environ.get(name, ""):
        return value
    if operator == ":?":
        raise MissingVariable(name)
    return word if operator == ":-" else ""
