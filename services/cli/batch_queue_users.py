"""`roundhouse batch queue-user` and what goes with it: users of the queue, with rights on their team's own names there."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from services.cli.acting import api, find_id
from services.cli.output import Json, print_json, print_table
from shared.amqp_url import with_user

USERS = "/api/queue-credentials"
NameOrId = Annotated[str, typer.Argument(help="The user's name or id.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to those of `roundhouse batch`."""
    for name, command in (
        ("queue-user", queue_user),
        ("queue-users", queue_users),
        ("queue-rotate", queue_rotate),
        ("queue-revoke", queue_revoke),
    ):
        app.command(name)(command)


def queue_user(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Lower case letters, digits and dashes.")],
    as_json: Json = False,
) -> None:
    """Make a user of the queue, and show what a client needs as lines for the shell; the secret is shown only now."""
    _show(api(context).post(USERS, {"name": name}), as_json=as_json)


def queue_users(context: typer.Context, as_json: Json = False) -> None:
    """All users of the queue that the team has."""
    found = list(api(context).list(USERS))
    if as_json:
        print_json(found)
        return
    print_table(
        ("id", "name", "ready", "reply queue"),
        ((each["credential_id"], each["name"], each["ready"], each["reply_queue"]) for each in found),
    )


def queue_rotate(context: typer.Context, user: NameOrId, as_json: Json = False) -> None:
    """Give it another secret; what is connected with the one before is cut off."""
    client = api(context)
    found = find_id(client, USERS, "credential_id", user)
    _show(client.post(f"{USERS}/{found}/rotate"), as_json=as_json)


def queue_revoke(context: typer.Context, user: NameOrId) -> None:
    """Take it away, with its reply queue and what is in it."""
    client = api(context)
    client.delete(f"{USERS}/{find_id(client, USERS, 'credential_id', user)}")


def _show(made: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    for name, value in (
        ("QUEUE_URL", with_user(made["url"], made["username"], made["secret"])),
        ("QUEUE_EXCHANGE", made["exchange"]),
        ("QUEUE_REPLY", made["reply_queue"]),
    ):
        print(f"export {name}={shlex.quote(value)}")
