"""Plays the scheduler's stored decisions again, from the inputs that were stored with them, and compares what comes out.

A decision that comes out otherwise was made by other code, or by something that its inputs do not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import msgspec

from loadtest.report import Row, print_table, write_json
from services.scheduler.reconcile import reconcile
from services.scheduler.store import decision_of
from services.scheduler.views import ResourceView

LAST = 1000
_SELECT = """
    SELECT decision_id, action, words, inputs FROM scheduler_api.decisions_v1
    WHERE ($1::text IS NULL OR resource_id = $1) ORDER BY decision_id DESC LIMIT $2
"""
COMMANDS = frozenset({"created", "scaled", "turned_on", "turned_off", "deleted"})
"""Actions that people take: their inputs are the command."""


@dataclass(frozen=True, slots=True)
class Stored:
    decision_id: int
    action: str
    words: str
    inputs: str


@dataclass(frozen=True, slots=True)
class Replayed:
    same: int
    different: list[str]
    unreadable: list[str]
    """Made by a version whose inputs had another shape."""


def replay(decisions: Iterable[Stored]) -> Replayed:
    """Decide anew from the inputs of each; commands are passed over."""
    same, different, unreadable = 0, [], []
    for stored in decisions:
        if stored.action in COMMANDS:
            continue
        try:
            view = msgspec.json.decode(stored.inputs, type=ResourceView)
        except msgspec.ValidationError as error:
            unreadable.append(f"{stored.decision_id} {stored.action}: {error}")
            continue
        now = [decision_of(view, action) for action in reconcile(view)]
        if (stored.action, stored.words) in now:
            same += 1
        else:
            said = "; ".join(f"{found[0]}: {found[1]}" for found in now if found is not None) or "nothing"
            different.append(f"{stored.decision_id} {stored.action}: {stored.words}\n    now {said}")
    return Replayed(same, different, unreadable)


async def read(database_url: str, resource_id: str | None, last: int) -> list[Stored]:
    connection = await asyncpg.connect(database_url, server_settings={"role": "roundhouse_audit"})
    try:
        return [Stored(**dict(row)) for row in await connection.fetch(_SELECT, resource_id, last)]
    finally:
        await connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.replay", description=__doc__)
    parser.add_argument("--resource", metavar="ID", help="only this resource's")
    parser.add_argument("--last", type=int, default=LAST, help="how many of the newest")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = asyncio.run(read(os.environ["DATABASE_URL"], arguments.resource, arguments.last))
    result = replay(found)
    for line in [*result.different, *result.unreadable]:
        print(line)
    count = result.same + len(result.different) + len(result.unreadable)
    rows = [
        Row("decisions replayed", "", count),
        Row("that come out the same", "", result.same, count, result.same / count if count else None, 1.0),
    ]
    print_table(rows)
    if arguments.json:
        write_json(rows, arguments.json)
    return 1 if any(row.is_below_floor for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
