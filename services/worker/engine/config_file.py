"""Values of a config.json, each checked as it is read. Raises ModelRefusal, which names the key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .api import ModelRefusal

Config = Mapping[str, Any]


def read_json(path: Path) -> Config:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelRefusal(f"{path.name}: {problem}") from problem
    if not isinstance(value, dict):
        raise ModelRefusal(f"{path.name}: must hold a JSON object")
    return value


def named(config: Config, keys: Sequence[str]) -> Any:
    """The value that stands under any of these names; None when under none."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise ModelRefusal(f"config.json: {' and '.join(found)} mean the same and differ")
    return values[0] if values else None


def positive(config: Config, keys: Sequence[str], default: int | None = None) -> int:
    value = named(config, keys)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ModelRefusal(f"config.json: {keys[0]} must be a positive integer, got {value!r}")
    return value


def number(config: Config, keys: Sequence[str], default: float) -> float:
    value = named(config, keys)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelRefusal(f"config.json: {keys[0]} must be a positive number, got {value!r}")
    return float(value)


def flag(config: Config, key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelRefusal(f"config.json: {key} must be true or false, got {value!r}")
    return value


def token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if type(value) is int:
        return (value,)
    if isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    raise ModelRefusal(f"eos_token_id must be an integer or a list of integers, got {value!r}")
