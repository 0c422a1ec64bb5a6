"""Joins what clients saw with what billing wrote: `python -m loadtest.audit --client-log FILE`.

Reads the clients' own log (JSON lines, see `audit_snapshot.ClientRecord`) and, with the auditor's rights only, the
request records, raw facts, ledger and state intervals. Everything that can be computed is computed again from the raw
facts. Exits 1 if anything is found, 2 if there is nothing to look at or it cannot be read.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

import asyncpg

from loadtest.audit_checks import Result, audit
from loadtest.audit_snapshot import ClientRecord, Snapshot, read_client_log, read_snapshot
from loadtest.report import Row, print_table, write_json

SHOWN_FINDINGS = 20
POLL_S = 1.0
EXIT_FINDINGS = 1
EXIT_UNUSABLE = 2


async def settled_audit(
    url: str, records: list[ClientRecord], wait_s: float
) -> tuple[Snapshot, list[Result]]:
    """Audit, and again until it is clean or `wait_s` are over: billing may still have facts to read.

    A server that was killed may still be on its way back: for as long its refusals are waited out, too.
    """
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            snapshot = await read_snapshot(url)
        except (OSError, asyncpg.CannotConnectNowError):
            if time.monotonic() >= deadline_s:
                raise
        else:
            results = audit(snapshot, records)
            if not any(result.findings for result in results) or time.monotonic() >= deadline_s:
                return snapshot, results
        await asyncio.sleep(POLL_S)


def rows_of(snapshot: Snapshot, records: list[ClientRecord], results: list[Result]) -> list[Row]:
    """How much was looked at, then the findings of each check (ratio 1 when there are none)."""
    sizes = [
        Row("client log", "requests", len(records)),
        Row("jobs with facts", "jobs", len(snapshot.facts)),
        Row("ledger", "transactions", len({entry.transaction_id for entry in snapshot.entries})),
        Row("minutes posted", "minutes", sum(posted.minutes for posted in snapshot.posted_minutes.values())),
    ]
    checks = [
        Row(
            r.name,
            f"findings in {r.looked_at}",
            len(r.findings),
            ratio=0 if r.findings else 1,
            floor=1,
            target=1,
        )
        for r in results
    ]
    return sizes + checks


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.audit", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--client-log", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--database-url", default=os.environ.get("DATABASE_URL"), help="default: DATABASE_URL"
    )
    parser.add_argument(
        "--wait-s", type=float, default=0.0, help="look again until clean, for at most this long"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parsed = parser.parse_args(arguments)
    if not parsed.database_url:
        parser.error("set DATABASE_URL or give --database-url")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    try:
        records = read_client_log(parsed.client_log)
        if not records:
            raise ValueError(f"{parsed.client_log} has no records: an audit of nothing proves nothing")
        snapshot, results = asyncio.run(settled_audit(parsed.database_url, records, parsed.wait_s))
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    rows = rows_of(snapshot, records, results)
    print_table(rows)
    for result in results:
        for finding in result.findings[:SHOWN_FINDINGS]:
            print(f"{result.name}: {finding}")
        if len(result.findings) > SHOWN_FINDINGS:
            print(f"{result.name}: and {len(result.findings) - SHOWN_FINDINGS} more")
    if parsed.json:
        write_json(rows, parsed.json)
    return EXIT_FINDINGS if any(result.findings for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
