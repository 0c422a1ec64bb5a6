"""Settings are values: read from the environment once, checked all together, frozen, and passed down in pieces.

Each service declares a frozen dataclass whose fields are made with `env(...)`. A variable `X` may also be given as
`X_FILE`, a path to a file with its value (for secrets). A bad value stops the start, with every problem listed.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


class SettingsError(Exception):
    """One line per problem, each naming its variable."""


def env(
    variable: str,
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """Declare a field that is read from `variable`; without a default it is required.

    Numbers may be bounded. Text may be limited to `choices`: any case is taken, and the value is the choice's spelling.
    """
    metadata = {"variable": variable, "low": low, "high": high, "choices": choices, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What every service needs."""

    amqp_url: str = env("AMQP_URL", secret=True)
    ops_host: str = env("OPS_HOST", "127.0.0.1")
    ops_port: int = env("OPS_PORT", low=0, high=65535)
    log_level: str = env("LOG_LEVEL", "INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    drain_timeout_s: float = env("DRAIN_TIMEOUT_S", 30.0, low=0.0, high=3600.0)


def load(kind: type[T], environment: Mapping[str, str] | None = None) -> T:
    """Build `kind` from the environment. Raises `SettingsError` that lists every bad variable."""
    source = os.environ if environment is None else environment
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if "variable" not in field.metadata:
            continue
        try:
            raw = _raw(field.metadata["variable"], source)
            if raw is None:
                if field.default is dataclasses.MISSING:
                    problems.append(f"{field.metadata['variable']} is not set")
                continue
            values[field.name] = _parse(raw, hints[field.name], field.metadata)
        except ValueError as error:
            problems.append(f"{field.metadata['variable']} {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return kind(**values)


def _raw(variable: str, source: Mapping[str, str]) -> str | None:
    if variable in source:
        return source[variable]
    path = source.get(f"{variable}_FILE")
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"cannot be read from {path}: {error.strerror}") from error


def _parse(raw: str, kind: Any, metadata: Mapping[str, Any]) -> Any:
    parsers: dict[Any, Callable[[str], Any]] = {
        int: int,
        float: float,
        bool: _parse_bool,
        Path: Path,
        str: str,
        str | None: str,
        Path | None: Path,
    }
    try:
        value = parsers[kind](raw)
    except ValueError as error:
        raise ValueError(f"is not a valid {getattr(kind, '__name__', kind)}") from error
    low, high = metadata["low"], metadata["high"]
    if isinstance(value, int | float) and not isinstance(value, bool):
        inside = (low is None or value >= low) and (high is None or value <= high)
        if not inside or math.isnan(value):
            raise ValueError(f"must be between {low} and {high}")
    if metadata["choices"]:
        return _choose(value, metadata["choices"])
    return value


def _choose(raw: str, choices: tuple[str, ...]) -> str:
    for choice in choices:
        if raw.lower() == choice.lower():
            return choice
    raise ValueError(f"must be one of {', '.join(choices)}")


def _parse_bool(raw: str) -> bool:
    if raw.lower() in ("1", "true", "yes", "on"):
        return True
    if raw.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError
