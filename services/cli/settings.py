"""Which server the command speaks to, with which key: from the environment, else from the clone's `.local/env`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from shared.settings import SettingsError, env, load

ENV_FILE = Path(__file__).resolve().parents[2] / ".local" / "env"
"""Written by `make up`, in shell syntax."""


@dataclass(frozen=True, kw_only=True)
class CliSettings:
    url: str | None = env("ROUNDHOUSE_URL", None)
    api_key: str | None = env("ROUNDHOUSE_API_KEY", None, secret=True)
    model: str | None = env("ROUNDHOUSE_MODEL", None)


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """A user of the queue, as `batch queue-user` shows it."""

    url: str | None = env("QUEUE_URL", None, secret=True)
    exchange: str | None = env("QUEUE_EXCHANGE", None)
    reply_queue: str | None = env("QUEUE_REPLY", None)


@dataclass(frozen=True, slots=True)
class QueueUser:
    """Where to publish and where the answers come. `url` holds the secret."""

    url: str = field(repr=False)
    exchange: str
    reply_queue: str


@dataclass(frozen=True, slots=True)
class Server:
    """Where to call. `model` is what `chat` asks when none is named."""

    url: str
    api_key: str
    model: str | None


def load_server(environment: Mapping[str, str] | None = None, env_file: Path = ENV_FILE) -> Server:
    """Raises `SettingsError` if there is no address or no key.

    1. What the environment says comes first.
    2. What it leaves out comes from the file, but only if both speak of the same server: the key that the file has
       is sent to no other address.
    """
    given = load(CliSettings, environment)
    stored = _read_env_file(env_file)
    if given.url is None or (stored.url is not None and given.url.rstrip("/") == stored.url.rstrip("/")):  # 2
        given = CliSettings(
            **{
                field.name: getattr(given, field.name) or getattr(stored, field.name)
                for field in fields(CliSettings)
            }
        )
    if not given.url or not given.api_key:
        missing = "ROUNDHOUSE_URL" if not given.url else "ROUNDHOUSE_API_KEY"
        raise SettingsError(f"{missing} is not set, and {env_file} does not say it: run 'make up', or set it")
    return Server(given.url.rstrip("/"), given.api_key, given.model)


def load_queue_user(environment: Mapping[str, str] | None = None) -> QueueUser:
    """Raises `SettingsError` if something is not set."""
    given = load(QueueSettings, environment)
    if not given.url or not given.exchange or not given.reply_queue:
        raise SettingsError(
            "QUEUE_URL, QUEUE_EXCHANGE and QUEUE_REPLY are not set: 'roundhouse batch queue-user NAME' shows them"
        )
    return QueueUser(given.url, given.exchange, given.reply_queue)


def _read_env_file(path: Path) -> CliSettings:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return CliSettings()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    values = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            values[name.strip()] = " ".join(shlex.split(value))
    return load(CliSettings, values)
