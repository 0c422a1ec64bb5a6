"""From facts to money, in one database transaction: keep the facts, settle their jobs, post what is still missing.

The amount posted is always the difference between what all facts of a job come to and what the ledger has for it, so a
duplicate posts nothing, a late correction posts one more transaction, and the order does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import asyncpg
import structlog

from services.billing import budget_store, job_charges, ledger, store
from services.billing.budget_account import settle as settle_lease
from services.billing.budget_spend import add_up, reservations_freed, tokens_spend
from services.billing.instants import from_unix_ms
from services.billing.instruments import Instruments
from services.billing.job_charges import job_charge
from services.billing.ledger import Charge, PostedCharges
from services.billing.pricing import Price, price_in_force, tokens_amount_nanousd
from services.billing.settle import Settlement, check_fact, settle
from services.billing.store import RequestRow
from shared.database import Connection, Database
from shared.messages import UsageEvent, type_of
from shared.outcomes import Unavailable

log = structlog.get_logger()

BAD_ROW_ERRORS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
"""The fault of what was written. Any other refusal (read-only server, missing table, ...) is the server's state."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A fact as it came, with the trace of the request that it is about."""

    fact: UsageEvent
    trace_id: str | None


@dataclass(frozen=True, slots=True)
class Posted:
    """A ledger transaction that a commit has made."""

    job_id: str
    transaction_id: str
    kind: str
    amount_nanousd: int


def charge_due(
    job_id: str,
    settlement: Settlement,
    price: Price | None,
    posted: PostedCharges | None,
    trace_id: str | None,
) -> Charge | None:
    """The transaction that makes the ledger say what the settlement comes to; None if it does already. Pure.

    Only pay-per-token jobs are charged here, and only by a price. The first transaction of a job is its charge, each
    later one a numbered correction, so two processes that compute the same one collide on its unique key.
    """
    amount = amount_nanousd(settlement, price)
    before = posted or PostedCharges(0, 0)
    difference = amount - before.amount_nanousd
    if difference == 0:
        return None
    source = settlement.source
    prompt, completion = settlement.billable_prompt_tokens, settlement.billable_completion_tokens
    words = f"{source.model_name}: {prompt} prompt and {completion} completion tokens, {settlement.outcome}"
    first = before.transactions == 0
    return Charge(
        unique_key=f"tokens:{job_id}" if first else f"tokens:{job_id}:{before.transactions}",
        kind="tokens" if first else "correction",
        team_id=source.team_id,
        other_account=ledger.REVENUE_TOKENS,
        amount_nanousd=difference,
        words=words if first else f"correction to {words}",
        job_id=job_id,
        resource_id=source.resource_id,
        trace_id=trace_id,
        corrects_key=None if first else f"tokens:{job_id}",
    )


def amount_nanousd(settlement: Settlement, price: Price | None) -> int:
    """What the team pays for the job by the token, in all."""
    if settlement.source.billing != "ppt" or price is None:
        return 0
    return tokens_amount_nanousd(
        price, settlement.billable_prompt_tokens, settlement.billable_completion_tokens
    )


def request_row(job_id: str, settlement: Settlement, price: Price | None) -> RequestRow:
    """What is told about the job to its team. Pure."""
    source, usage = settlement.source, settlement.usage
    first_token_unix_ms = usage.first_token_unix_ms if usage is not None else None
    return RequestRow(
        job_id=job_id,
        request_id=source.request_id,
        team_id=source.team_id,
        key_id=source.key_id,
        resource_id=source.resource_id,
        billing_mode=source.billing,
        work_class=source.work_class,
        operation=source.operation,
        model_type=source.model_type,
        model_id=source.model_id,
        model_name=source.model_name,
        revision=source.revision,
        outcome=settlement.outcome,
        error_code=settlement.error_code,
        attempt=settlement.attempt,
        prompt_tokens=settlement.prompt_tokens,
        completion_tokens=settlement.delivered_tokens,
        charged_nanousd=amount_nanousd(settlement, price),
        price_id=price.price_id if price is not None and source.billing == "ppt" else None,
        queue_ms=usage.timings.queue_ms if usage is not None else None,
        swap_ms=usage.timings.swap_ms if usage is not None else None,
        prefill_ms=usage.timings.prefill_ms if usage is not None else None,
        decode_ms=usage.timings.decode_ms if usage is not None else None,
        first_token_at=None if first_token_unix_ms is None else from_unix_ms(first_token_unix_ms),
        accepted_at=from_unix_ms(source.accepted_unix_ms),
        finished_at=from_unix_ms(settlement.finished_unix_ms),
    )


class Intake:
    """Records facts. Any number of processes may do so at once: a job is settled under a lock of its own."""

    def __init__(self, database: Database, instruments: Instruments) -> None:
        self._database = database
        self._instruments = instruments

    async def record(self, arrivals: Sequence[Arrival]) -> list[Posted]:
        """Keep the facts and settle their jobs, all or nothing; return what was posted.

        Raises `Unavailable` when the database cannot take anything now (nothing changed; try again), and `BadFact`,
        `FactsDisagree` or one of `BAD_ROW_ERRORS` when one of the facts can never be taken.
        """
        try:
            return await self._record(arrivals)
        except BAD_ROW_ERRORS:
            raise
        except asyncpg.PostgresError as error:
            raise Unavailable(f"database: {type(error).__name__}") from error

    async def _record(self, arrivals: Sequence[Arrival]) -> list[Posted]:
        for arrival in arrivals:
            check_fact(arrival.fact)
        traces: dict[str, str] = {}
        for arrival in arrivals:
            if arrival.trace_id is not None:
                traces.setdefault(arrival.fact.job_id, arrival.trace_id)
        async with self._database.transaction() as connection:
            await store.lock_jobs(connection, {arrival.fact.job_id for arrival in arrivals})
            new = await store.insert_facts(connection, [arrival.fact for arrival in arrivals])
            known = [a.fact for a in arrivals if a.fact.event_id not in new]
            conflicts = await store.find_conflicts(connection, known) if known else []
            # A fact that is known was settled in the transaction that kept it.
            touched = sorted({a.fact.job_id for a in arrivals if a.fact.event_id in new})
            posted = await self._settle(connection, touched, traces, new)
        for event_id in conflicts:
            log.error("fact_conflicts_with_known", event_id=event_id)
        self._count(arrivals, new, posted)
        return posted

    async def charge_unpriced(self, limit: int) -> int:
        """Settle again up to `limit` requests that had no price and have one now; return how many there were."""
        async with self._database.transaction() as connection:
            job_ids = await store.chargeable_jobs(connection, limit)
            await store.lock_jobs(connection, job_ids)
            posted = await self._settle(connection, job_ids, {}, set())
        self._count([], set(), posted)
        return len(job_ids)

    async def fill_job_charges(self, after: str, limit: int) -> str | None:
        """Tell from their facts what jobs were charged that lack the record: up to `limit` with ids behind `after`.

        Returns the last of these ids; None when there are no more.
        """
        async with self._database.transaction() as connection:
            job_ids = await job_charges.jobs_without(connection, after, limit)
            await store.lock_jobs(connection, job_ids)
            facts = await store.load_facts(connection, job_ids)
            settlements = {job_id: settle(facts[job_id]) for job_id in facts}
            prices = await store.load_prices(connection, {s.source.model_type for s in settlements.values()})
            charged = []
            for job_id, settlement in settlements.items():
                source = settlement.source
                price = price_in_force(prices, source.model_type, source.work_class, source.accepted_unix_ms)
                if price is not None:
                    charged.append(job_charge(job_id, settlement, price))
            if charged:
                await job_charges.save(connection, charged)
        if len(charged) < len(job_ids):
            # The ledger stays as it is; statements lack these, and recomputing them says so.
            log.error("charged_without_facts_or_price", jobs=len(job_ids) - len(charged))
        return job_ids[-1] if job_ids else None

    async def _settle(
        self, connection: Connection, job_ids: Sequence[str], traces: Mapping[str, str], new: set[str]
    ) -> list[Posted]:
        if not job_ids:
            return []
        facts = await store.load_facts(connection, job_ids)
        settlements = {job_id: settle(facts[job_id]) for job_id in job_ids}
        prices = await store.load_prices(connection, {s.source.model_type for s in settlements.values()})
        already = await ledger.load_posted(connection, job_ids)
        rows, charges, charged, spends = [], [], [], []
        for job_id, settlement in settlements.items():
            source = settlement.source
            price = price_in_force(prices, source.model_type, source.work_class, source.accepted_unix_ms)
            _warn_if_unpriced(job_id, settlement, price)
            rows.append(request_row(job_id, settlement, price))
            charge = charge_due(job_id, settlement, price, already.get(job_id), traces.get(job_id))
            if charge is not None:
                charges.append(charge)
                spends.append(tokens_spend(source, charge.amount_nanousd))
                if price is not None:  # without one nothing was ever charged
                    charged.append(job_charge(job_id, settlement, price))
        await store.upsert_requests(connection, rows)
        ids = await ledger.post(connection, charges)
        if charged:
            await job_charges.save(connection, charged)
        await budget_store.add_spend(connection, add_up(spends))
        await _free_leases(connection, reservations_freed(facts, new, prices))
        return [
            Posted(charge.job_id or "", transaction_id, charge.kind, charge.amount_nanousd)
            for charge, transaction_id in zip(charges, ids, strict=True)
        ]

    def _count(self, arrivals: Sequence[Arrival], new: set[str], posted: Sequence[Posted]) -> None:
        for arrival in arrivals:
            result = "new" if arrival.fact.event_id in new else "known"
            self._instruments.events.add(1, {"type": type_of(arrival.fact), "result": result})
        for transaction in posted:
            self._instruments.transactions.add(1, {"kind": transaction.kind})


async def _free_leases(connection: Connection, freed: Mapping[str, int]) -> None:
    """What was reserved for jobs is posted now: their leases hold it no more."""
    if freed:
        leases = await budget_store.lock_leases(connection, freed)
        settled = {lease_id: settle_lease(lease, freed[lease_id]) for lease_id, lease in leases.items()}
        await budget_store.save_leases(connection, settled)


def _warn_if_unpriced(job_id: str, settlement: Settlement, price: Price | None) -> None:
    billable = settlement.billable_prompt_tokens + settlement.billable_completion_tokens
    source = settlement.source
    if price is None and billable and source.billing == "ppt":
        log.error("price_missing", job_id=job_id, model_type=source.model_type, work_class=source.work_class)
