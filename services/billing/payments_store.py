"""Keeps what the provider reports of payments and posts what is missing, in one database transaction."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg
import structlog

from services.billing import ledger, store
from services.billing.instruments import Instruments
from services.billing.intake import BAD_ROW_ERRORS
from services.billing.payments import PostedPayment, check_payment, postings_due
from shared.database import Connection, Database
from shared.messages import PaymentReported, decoder, encode
from shared.outcomes import Unavailable

log = structlog.get_logger()
_decode = decoder(PaymentReported).decode


class PaymentIntake:
    """Records facts about payments. Any number of processes may do so at once: a payment has a lock of its own."""

    def __init__(self, database: Database, instruments: Instruments) -> None:
        self._database = database
        self._instruments = instruments

    async def record(self, facts: Sequence[PaymentReported]) -> int:
        """Keep the facts and post what they come to, each in its own transaction; return how many were posted.

        Raises `Unavailable` when the database cannot take anything now, and `BadPayment`, `PaymentsDisagree` or one of
        `BAD_ROW_ERRORS` when one of them can never be taken: then nothing of that one is kept.
        """
        posted = 0
        for fact in facts:
            check_payment(fact)
            try:
                posted += await self._record(fact)
            except BAD_ROW_ERRORS:
                raise
            except asyncpg.PostgresError as error:
                raise Unavailable(f"database: {type(error).__name__}") from error
        return posted

    async def _record(self, fact: PaymentReported) -> int:
        async with self._database.transaction() as connection:
            await store.lock_name(connection, f"billing payment {fact.provider} {fact.payment_id}")
            if not await _insert(connection, fact):
                return 0  # a fact that is known was posted in the transaction that kept it
            facts = await _load_facts(connection, fact.provider, fact.payment_id)
            posted = await _load_posted(connection, fact.provider, fact.payment_id)
            due = postings_due(fact.payment_id, facts, posted)
            for charge in due:  # one after the other: a correction looks for what it corrects
                await ledger.post(connection, [charge])
        for charge in due:
            self._instruments.transactions.add(1, {"kind": charge.kind})
            log.info("payment_posted", payment_id=fact.payment_id, team_id=charge.team_id, kind=charge.kind)
        return len(due)


async def _insert(connection: Connection, fact: PaymentReported) -> bool:
    row = await connection.fetchrow(
        """
        INSERT INTO billing.payment_events (provider, event_id, payment_id, what, payload)
        VALUES ($1, $2, $3, $4, $5::jsonb) ON CONFLICT (provider, event_id) DO NOTHING RETURNING 1
        """,
        fact.provider,
        fact.event_id,
        fact.payment_id,
        fact.what,
        encode(fact).decode(),
    )
    return row is not None


async def _load_facts(connection: Connection, provider: str, payment_id: str) -> list[PaymentReported]:
    rows = await connection.fetch(
        "SELECT payload FROM billing.payment_events WHERE provider = $1 AND payment_id = $2 ORDER BY event_id",
        provider,
        payment_id,
    )
    return [_decode(row["payload"]) for row in rows]


async def _load_posted(connection: Connection, provider: str, payment_id: str) -> PostedPayment | None:
    row = await connection.fetchrow(
        """
        WITH paid AS (SELECT transaction_id, team_id FROM billing.transactions WHERE unique_key = $1)
        SELECT sum(e.amount_nanousd)::bigint AS amount_nanousd, count(*) AS transactions
        FROM paid JOIN billing.transactions t ON t.transaction_id = paid.transaction_id
                                              OR t.corrects = paid.transaction_id
        JOIN billing.entries e ON e.transaction_id = t.transaction_id AND e.account_id = 'team:' || paid.team_id
        """,
        f"payment:{provider}:{payment_id}",
    )
    if row is None or row["amount_nanousd"] is None:
        return None
    return PostedPayment(row["amount_nanousd"], row["transactions"])
