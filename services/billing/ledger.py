"""The double-entry ledger: posts balanced transactions and says what was posted. Never changes a row.

Signs: a charge takes from the team's account and adds to a revenue account, so a team's balance is what it has with
the platform: negative means that it owes. Money in is a charge the other way round: it adds to the team's account and
takes from the account of where it came from. The entries of a transaction sum to zero, which the database enforces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from shared.database import Connection
from shared.ids import new_id

REVENUE_TOKENS = "revenue:tokens"
REVENUE_MINUTES = "revenue:minutes"
CREDITS_GRANTED = "credits:granted"

TransactionKind = Literal["tokens", "minutes", "correction", "credit", "payment"]


def team_account(team_id: str) -> str:
    return f"team:{team_id}"


def payments_account(provider: str) -> str:
    """What came in through a payment provider."""
    return f"payments:{provider}"


@dataclass(frozen=True, slots=True)
class Charge:
    """One transaction: `amount_nanousd` from the team to the other account; a negative amount goes to the team."""

    unique_key: str
    kind: TransactionKind
    team_id: str
    other_account: str
    amount_nanousd: int
    words: str
    job_id: str | None = None
    resource_id: str | None = None
    place: int | None = None
    hour: datetime | None = None
    trace_id: str | None = None
    corrects_key: str | None = None
    """Of a correction: the unique key of the transaction that it corrects, which is in the ledger already."""


@dataclass(frozen=True, slots=True)
class PostedCharges:
    """What the ledger has for one job: the net amount, and in how many transactions."""

    amount_nanousd: int
    transactions: int


async def post(connection: Connection, charges: Sequence[Charge]) -> list[str]:
    """Post all charges, one transaction each, and return their transaction ids in the same order.

    Runs inside the caller's database transaction, which holds the lock on what is charged. A unique key that exists
    raises `asyncpg.UniqueViolationError`, and nothing is posted.
    """
    if any(charge.amount_nanousd == 0 for charge in charges):
        raise ValueError("a charge of nothing is not posted")
    if not charges:
        return []
    await _ensure_accounts(connection, charges)
    ids = [new_id("txn") for _ in charges]
    await connection.execute(
        """
        INSERT INTO billing.transactions
            (transaction_id, unique_key, kind, team_id, job_id, resource_id, place, hour, words, trace_id, corrects)
        SELECT transaction_id, unique_key, kind, team_id, job_id, resource_id, place, hour, words, trace_id,
               (SELECT t.transaction_id FROM billing.transactions t WHERE t.unique_key = x.corrects_key)
        FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::int[],
                    $8::timestamptz[], $9::text[], $10::text[], $11::text[])
            x (transaction_id, unique_key, kind, team_id, job_id, resource_id, place, hour, words, trace_id, corrects_key)
        """,
        ids,
        [charge.unique_key for charge in charges],
        [charge.kind for charge in charges],
        [charge.team_id for charge in charges],
        [charge.job_id for charge in charges],
        [charge.resource_id for charge in charges],
        [charge.place for charge in charges],
        [charge.hour for charge in charges],
        [charge.words for charge in charges],
        [charge.trace_id for charge in charges],
        [charge.corrects_key for charge in charges],
    )
    await connection.execute(
        """
        INSERT INTO billing.entries (transaction_id, account_id, amount_nanousd)
        SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[])
        """,
        ids + ids,
        [team_account(c.team_id) for c in charges] + [c.other_account for c in charges],
        [-c.amount_nanousd for c in charges] + [c.amount_nanousd for c in charges],
    )
    return ids


async def _ensure_accounts(connection: Connection, charges: Iterable[Charge]) -> None:
    accounts: dict[str, str | None] = {}
    for charge in charges:
        accounts[charge.other_account] = None  # its kind is what its name begins with
        accounts[team_account(charge.team_id)] = charge.team_id
    # In one order everywhere: two processes that make the same accounts wait for each other instead of deadlocking.
    names = sorted(accounts)
    await connection.execute(
        """
        INSERT INTO billing.accounts (account_id, team_id, kind)
        SELECT a, t, split_part(a, ':', 1) FROM unnest($1::text[], $2::text[]) x (a, t)
        ON CONFLICT (account_id) DO NOTHING
        """,
        names,
        [accounts[name] for name in names],
    )


async def find(connection: Connection, unique_key: str) -> str | None:
    """The id of the transaction with this key, if it was posted."""
    found: str | None = await connection.fetchval(
        "SELECT transaction_id FROM billing.transactions WHERE unique_key = $1", unique_key
    )
    return found


async def load_posted(connection: Connection, job_ids: Sequence[str]) -> dict[str, PostedCharges]:
    """What was posted for these jobs; a job without a transaction is left out. The caller holds the jobs' locks."""
    rows = await connection.fetch(
        """
        SELECT t.job_id, -sum(e.amount_nanousd)::bigint AS amount_nanousd, count(*) AS transactions
        FROM billing.transactions t JOIN billing.entries e USING (transaction_id)
        WHERE t.job_id = ANY($1::text[]) AND e.account_id = 'team:' || t.team_id
        GROUP BY t.job_id
        """,
        job_ids,
    )
    return {row["job_id"]: PostedCharges(row["amount_nanousd"], row["transactions"]) for row in rows}


async def count_unbalanced(connection: Connection, since_unix_ms: int) -> int:
    """Transactions made since then whose entries do not sum to zero or are missing.

    Ids are made in order of time, so their range is the range of time; it is read from the primary key's index.
    """
    first_id = f"txn_{since_unix_ms:012x}"
    count = await connection.fetchval(
        """
        SELECT count(*) FROM (
            SELECT t.transaction_id FROM billing.transactions t LEFT JOIN billing.entries e USING (transaction_id)
            WHERE t.transaction_id >= $1
            GROUP BY t.transaction_id HAVING coalesce(sum(e.amount_nanousd), 0) <> 0 OR count(e.account_id) < 2
        ) unbalanced
        """,
        first_id,
    )
    return int(count)
