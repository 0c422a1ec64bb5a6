"""What each job was charged by the token, kept beside the ledger so that a statement can be told from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec

from services.billing.instants import from_unix_ms
from services.billing.pricing import Price, tokens_amount_nanousd
from services.billing.settle import Settlement
from shared.database import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCharge:
    """All that a job's transactions come to."""

    job_id: str
    request_id: str
    team_id: str
    key_id: str
    model_type: str
    model_name: str
    work_class: str
    price_id: str
    accepted_at: datetime
    prompt_tokens: int
    completion_tokens: int
    amount_nanousd: int


def job_charge(job_id: str, settlement: Settlement, price: Price) -> JobCharge:
    """Pure: the job as its team pays for it, by this price."""
    source = settlement.source
    prompt, completion = settlement.billable_prompt_tokens, settlement.billable_completion_tokens
    return JobCharge(
        job_id=job_id,
        request_id=source.request_id,
        team_id=source.team_id,
        key_id=source.key_id,
        model_type=source.model_type,
        model_name=source.model_name,
        work_class=source.work_class,
        price_id=price.price_id,
        accepted_at=from_unix_ms(source.accepted_unix_ms),
        prompt_tokens=prompt,
        completion_tokens=completion,
        amount_nanousd=tokens_amount_nanousd(price, prompt, completion),
    )


async def save(connection: Connection, charges: Sequence[JobCharge]) -> None:
    """Write what these jobs were charged in all. The first time is remembered as what was charged first."""
    await connection.execute(
        """
        INSERT INTO billing.job_charges (
            job_id, request_id, team_id, key_id, model_type, model_name, work_class, price_id, accepted_at,
            first_prompt_tokens, first_completion_tokens, first_nanousd, prompt_tokens, completion_tokens, amount_nanousd)
        SELECT job_id, request_id, team_id, key_id, model_type, model_name, work_class, price_id, accepted_at,
               prompt_tokens, completion_tokens, amount_nanousd, prompt_tokens, completion_tokens, amount_nanousd
        FROM jsonb_populate_recordset(NULL::billing.job_charges, $1::jsonb)
        ON CONFLICT (job_id) DO UPDATE SET prompt_tokens = EXCLUDED.prompt_tokens,
            completion_tokens = EXCLUDED.completion_tokens, amount_nanousd = EXCLUDED.amount_nanousd
        """,
        msgspec.json.encode(sorted(charges, key=lambda charge: charge.job_id)).decode(),
    )


async def jobs_without(connection: Connection, after: str, limit: int) -> list[str]:
    """Jobs that the ledger charged and that have no row here, by id: from before there were any."""
    rows = await connection.fetch(
        """
        SELECT t.job_id FROM billing.transactions t
        WHERE t.kind = 'tokens' AND t.job_id > $1
          AND NOT EXISTS (SELECT FROM billing.job_charges c WHERE c.job_id = t.job_id)
        ORDER BY t.job_id LIMIT $2
        """,
        after,
        limit,
    )
    return [row["job_id"] for row in rows]
