"""Passwords and keys of one clone: made at the first run, kept in `secrets.json` (0600), never printed by accident."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field, fields, replace

from infra.local.failures import SetupFailed
from infra.local.layout import Layout, write_private


@dataclass(frozen=True, slots=True)
class Credentials:
    """`repr` hides all of it, so that none lands in a log or a traceback."""

    postgres_password: str = field(repr=False)
    redis_password: str = field(repr=False)
    rabbitmq_password: str = field(repr=False)
    erlang_cookie: str = field(repr=False)
    admin_key: str = field(repr=False)
    demo_key: str = field(default="", repr=False)  # empty until the demo team has one


def ensure_credentials(layout: Layout, *, servers_have_data: bool) -> Credentials:
    """Load them, or make them for a first run.

    servers_have_data: whether a private server was already set up with earlier passwords; then missing or broken
    secrets cannot be made anew, and that is said.
    """
    try:
        stored = json.loads(layout.secrets_file.read_text())
        return Credentials(**{each.name: str(stored[each.name]) for each in fields(Credentials)})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        if servers_have_data:
            raise SetupFailed(
                f"{layout.secrets_file} is missing or broken, and the servers' data need its passwords: "
                "run 'make clean' to start from nothing, then 'make up'"
            ) from None
    made = Credentials(
        postgres_password=secrets.token_hex(16),
        redis_password=secrets.token_hex(16),
        rabbitmq_password=secrets.token_hex(16),
        erlang_cookie=secrets.token_hex(16).upper(),
        admin_key="sk-rh-" + secrets.token_urlsafe(32),
    )
    save_credentials(layout, made)
    return made


def save_credentials(layout: Layout, credentials: Credentials) -> None:
    write_private(layout.secrets_file, json.dumps(asdict(credentials), indent=2) + "\n")


def with_demo_key(credentials: Credentials, key: str) -> Credentials:
    return replace(credentials, demo_key=key)
