"""How a command gets its client: built when it is first needed, so that `--help` needs no server and no key."""

from __future__ import annotations

import re

import typer

from services.cli.client import ApiClient, CliError
from services.cli.settings import load_server

_ID = re.compile(r"[a-z]{2,10}_[0-9a-f]{32}")


def api(context: typer.Context) -> ApiClient:
    """The client for this run; `--team` before the command's name says for which team it acts."""
    root = context.find_root()
    return ApiClient(load_server(), root.params.get("team"))


def find_id(client: ApiClient, path: str, id_field: str, name_or_id: str) -> str:
    """The id of what the list at `path` calls so. A name that two things bear is refused."""
    if _ID.fullmatch(name_or_id):
        return name_or_id
    found = [str(item[id_field]) for item in client.list(path) if item["name"] == name_or_id]
    if len(found) != 1:
        raise CliError(
            f"nothing is called '{name_or_id}'" if not found else f"{len(found)} are called '{name_or_id}'"
        )
    return found[0]
