"""Pure: every check of the audit, over one snapshot of the database and the clients' log."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from loadtest.audit_snapshot import ClientRecord, Request, Snapshot
from services.billing.budget_spend import SpendKey, minutes_spend, tokens_spend
from services.billing.instants import HOUR_US, MINUTE_US
from services.billing.intake import amount_nanousd
from services.billing.ledger import team_account
from services.billing.minutes import HourKey, billed_minutes
from services.billing.pricing import minutes_amount_nanousd, price_in_force
from services.billing.settle import FactsDisagree, Settlement, settle
from shared.budgets.period import day_of
from shared.messages import JobUsage, JobVoided

KEPT_US = 29 * 24 * HOUR_US
"""Request records younger than this must exist; billing deletes them at 30 days unless it is set otherwise."""

LEASE_LATE_S = 300
"""Billing lets go of a lost lease once it has read all facts, which takes a while after an outage."""

Found = Iterator[str | None]
"""One item for each thing that was looked at: what is wrong with it, or None."""


@dataclass(frozen=True, slots=True)
class Result:
    """A check, how many things it looked at, and what it found."""

    name: str
    looked_at: int
    findings: list[str]


@dataclass(slots=True)
class JobLedger:
    """What the ledger has for one job."""

    amount_nanousd: int = 0
    charges: set[str] = field(default_factory=set)
    teams: set[str] = field(default_factory=set)


class Books:
    """A snapshot with what follows from it: settlements and amounts from raw facts, the ledger by job."""

    def __init__(self, snapshot: Snapshot, records: Sequence[ClientRecord]) -> None:
        self.snapshot = snapshot
        self.records = records
        self.settlements: dict[str, Settlement] = {}
        self.expected_nanousd: dict[str, int] = {}
        self.unpriced: set[str] = set()
        self.disagreeing: dict[str, str] = {}
        for job_id in snapshot.facts:
            self._settle(job_id)
        self.ledger: dict[str, JobLedger] = defaultdict(JobLedger)
        for entry in snapshot.entries:
            if entry.job_id is not None and entry.account_id == team_account(entry.team_id):
                job = self.ledger[entry.job_id]
                job.amount_nanousd -= entry.amount_nanousd
                job.teams.add(entry.team_id)
                if entry.kind == "tokens":
                    job.charges.add(entry.transaction_id)
        self.rows_by_request: dict[str, list[Request]] = defaultdict(list)
        for row in snapshot.requests.values():
            self.rows_by_request[row.request_id].append(row)
        self.jobs_by_request: dict[str, set[str]] = defaultdict(set)
        for job_id, facts in snapshot.facts.items():
            for fact in facts:
                self.jobs_by_request[fact.request_id].add(job_id)

    def _settle(self, job_id: str) -> None:
        try:
            settlement = settle(self.snapshot.facts[job_id])
        except FactsDisagree as error:
            self.disagreeing[job_id] = str(error)
            return
        source = settlement.source
        price = price_in_force(
            self.snapshot.prices, source.model_type, source.work_class, source.accepted_unix_ms
        )
        self.settlements[job_id] = settlement
        self.expected_nanousd[job_id] = amount_nanousd(settlement, price)
        if price is None and source.billing == "ppt":
            self.unpriced.add(job_id)

    def of_outcome(self, *outcomes: str) -> Iterator[ClientRecord]:
        return (record for record in self.records if record.outcome in outcomes)

    def jobs_of(self, record: ClientRecord) -> set[str]:
        """All jobs that facts or request records connect with the request."""
        if record.request_id is None:
            return set()
        rows = {row.job_id for row in self.rows_by_request.get(record.request_id, [])}
        return rows | self.jobs_by_request.get(record.request_id, set())


def audit(snapshot: Snapshot, records: Sequence[ClientRecord]) -> list[Result]:
    """Run all checks. Their order is that of the table."""
    books = Books(snapshot, records)
    results = []
    for name, check in CHECKS.items():
        found = list(check(books))
        results.append(Result(name, len(found), [finding for finding in found if finding is not None]))
    return results


# ---- what clients saw


def log_names_requests_once(books: Books) -> Found:
    seen = Counter(record.request_id for record in books.records if record.request_id is not None)
    for request_id, times in seen.items():
        yield f"{request_id}: {times} records in the clients' log" if times > 1 else None


def answered_is_recorded(books: Books) -> Found:
    """Each answered request has exactly one request record, and it says succeeded."""
    for record in books.of_outcome("answered"):
        rows = books.rows_by_request.get(record.request_id or "", [])
        if record.request_id is None:
            yield f"answered at {record.started_unix_ms} without a request id"
        elif len(rows) != 1:
            yield f"{record.request_id}: answered, but has {len(rows)} request records"
        elif rows[0].outcome != "succeeded":
            yield f"{record.request_id}: answered, but is recorded as {rows[0].outcome}"
        else:
            yield None


def answered_tokens_are_equal(books: Books) -> Found:
    for record in books.of_outcome("answered"):
        for row in books.rows_by_request.get(record.request_id or "", []):
            told = (record.prompt_tokens, record.completion_tokens)
            recorded = (row.prompt_tokens, row.completion_tokens)
            differ = any(a is not None and a != b for a, b in zip(told, recorded, strict=True))
            yield (
                f"{record.request_id}: client saw {told} tokens, recorded are {recorded}" if differ else None
            )


def answered_is_charged_once(books: Books) -> Found:
    """Per-token answers: one charge, by a price, for one job. Dedicated answers: no charge by the token."""
    for record in books.of_outcome("answered"):
        job_ids = books.jobs_of(record)
        charges = sum(len(books.ledger[job_id].charges) for job_id in job_ids if job_id in books.ledger)
        expected = sum(books.expected_nanousd.get(job_id, 0) for job_id in job_ids)
        if charges != (1 if expected else 0):
            yield f"{record.request_id}: {charges} charges for {expected} nano-USD"
        elif job_ids & books.unpriced:
            yield f"{record.request_id}: answered, and no price covers it"
        else:
            yield None


def errors_cost_nothing(books: Books) -> Found:
    for record in books.of_outcome("error"):
        amount = sum(
            books.ledger[job_id].amount_nanousd for job_id in books.jobs_of(record) if job_id in books.ledger
        )
        yield (
            f"{record.request_id}: an error ({record.error_code}) that cost {amount} nano-USD"
            if amount
            else None
        )


def partial_answers_pay_what_was_delivered(books: Books) -> Found:
    """Cut or cancelled: what the gateway says was delivered is what is paid, and the client saw no more than that."""
    for record in books.of_outcome("cut", "cancelled_by_client"):
        yield _partial_finding(books, record)


def _partial_finding(books: Books, record: ClientRecord) -> str | None:
    seen = record.completion_tokens or 0
    job_ids = books.jobs_of(record)
    if not job_ids:
        return f"{record.request_id}: client saw {seen} tokens, billing knows nothing of it" if seen else None
    for job_id in job_ids & books.settlements.keys():
        settlement, row = books.settlements[job_id], books.snapshot.requests.get(job_id)
        if settlement.outcome not in ("succeeded", "cancelled"):
            continue  # our fault: free, whatever was seen of it
        paid = settlement.billable_completion_tokens
        voids = [
            f for f in books.snapshot.facts[job_id] if isinstance(f, JobVoided) and f.reason == "client_gone"
        ]
        if voids and paid != min(void.delivered_tokens for void in voids):
            return f"{record.request_id}: pays for {paid} tokens, delivered were {voids[0].delivered_tokens}"
        if row is not None and row.completion_tokens != settlement.delivered_tokens:
            return f"{record.request_id}: {row.completion_tokens} tokens recorded, {settlement.delivered_tokens} delivered"
        if paid < seen:
            return f"{record.request_id}: client saw {seen} tokens, delivered were {paid}"
    return None


def requests_belong_to_the_callers_team(books: Books) -> Found:
    for record in books.records:
        for row in books.rows_by_request.get(record.request_id or "", []):
            asked = books.snapshot.teams.get(record.team)
            wrong = asked != row.team_id
            yield (
                f"{record.request_id}: asked by {record.team}, recorded for {row.team_id}" if wrong else None
            )


# ---- jobs


def facts_of_a_job_agree(books: Books) -> Found:
    """One subject, and no two different ends of the same attempt."""
    for job_id, facts in books.snapshot.facts.items():
        attempts: dict[int, set[bytes]] = defaultdict(set)
        for fact in facts:
            if isinstance(fact, JobUsage):
                attempts[fact.attempt].add(msgspec.json.encode(msgspec.structs.replace(fact, event_id="")))
        double = [attempt for attempt, ends in attempts.items() if len(ends) > 1]
        if job_id in books.disagreeing:
            yield f"{job_id}: {books.disagreeing[job_id]}"
        elif double:
            yield f"{job_id}: attempt {double[0]} ended in two ways"
        else:
            yield None


def request_records_follow_from_facts(books: Books) -> Found:
    for job_id, settlement in books.settlements.items():
        row = books.snapshot.requests.get(job_id)
        if row is None:
            age_us = books.snapshot.now_us - settlement.source.accepted_unix_ms * 1000
            yield f"{job_id}: has facts and no request record" if age_us < KEPT_US else None
            continue
        recorded = (row.team_id, row.outcome, row.prompt_tokens, row.completion_tokens)
        computed = (
            settlement.source.team_id,
            settlement.outcome,
            settlement.prompt_tokens,
            settlement.delivered_tokens,
        )
        yield f"{job_id}: recorded as {recorded}, facts say {computed}" if recorded != computed else None
    for job_id in books.snapshot.requests.keys() - books.snapshot.facts.keys():
        yield f"{job_id}: request record without a fact"


def charges_follow_from_facts(books: Books) -> Found:
    """Sum of the job's transactions = its request record = facts and prices computed again."""
    for job_id, expected in books.expected_nanousd.items():
        posted = books.ledger[job_id].amount_nanousd if job_id in books.ledger else 0
        row = books.snapshot.requests.get(job_id)
        recorded = row.charged_nanousd if row is not None else expected
        if not posted == recorded == expected:
            yield f"{job_id}: ledger {posted}, request record {recorded}, facts {expected} nano-USD"
        elif job_id in books.ledger and books.ledger[job_id].teams != {
            books.settlements[job_id].source.team_id
        }:
            yield f"{job_id}: charged to {sorted(books.ledger[job_id].teams)}"
        else:
            yield None


def charges_have_a_fact(books: Books) -> Found:
    """Each transaction about tokens names a job that has facts; each about minutes names a seat and an hour."""
    transactions = {entry.transaction_id: entry for entry in books.snapshot.entries}
    for entry in transactions.values():
        if entry.kind in ("credit", "payment") or entry.unique_key.startswith("payment:"):
            continue  # money in, and what was taken back of it
        is_seat = entry.resource_id is not None and entry.place is not None and entry.hour_us is not None
        if entry.job_id is None and not is_seat:
            yield f"{entry.unique_key}: names neither a job nor a seat"
        elif entry.job_id is not None and entry.job_id not in books.snapshot.facts:
            yield f"{entry.unique_key}: no fact of job {entry.job_id}"
        else:
            yield None


# ---- ledger and minutes


def ledger_balances(books: Books) -> Found:
    amounts: dict[str, list[int]] = defaultdict(list)
    for entry in books.snapshot.entries:
        amounts[entry.transaction_id].append(entry.amount_nanousd)
    for transaction_id, values in amounts.items():
        unbalanced = sum(values) != 0 or len(values) < 2
        yield f"{transaction_id}: entries {values} do not balance" if unbalanced else None
    total = sum(entry.amount_nanousd for entry in books.snapshot.entries)
    yield f"the whole ledger sums to {total}" if total else None


def minutes_follow_from_intervals(books: Books) -> Found:
    """Posted = computed again from the state intervals; in an hour that is still open the last minute may be missing."""
    first_us = min((i.started_us for i in books.snapshot.intervals), default=0) // HOUR_US * HOUR_US
    minutes = billed_minutes(books.snapshot.intervals, first_us)
    for key in minutes.keys() | books.snapshot.posted_minutes.keys():
        yield _minutes_finding(books.snapshot, key, minutes.get(key, 0))


def _minutes_finding(snapshot: Snapshot, key: HourKey, computed: int) -> str | None:
    row = snapshot.posted_minutes.get(key)
    posted = row.posted_nanousd if row is not None else 0
    is_open = (
        snapshot.now_us < key.hour_us + HOUR_US + MINUTE_US
    )  # and a minute for the last round of the hour
    right = {minutes_amount_nanousd(key.hourly_rate_nanousd, computed)}
    if is_open:
        right.add(minutes_amount_nanousd(key.hourly_rate_nanousd, max(computed - 1, 0)))
    if posted in right:
        return None
    return f"{key}: {posted} nano-USD posted, intervals make {computed} minutes"


def minutes_are_in_the_ledger(books: Books) -> Found:
    """What the seats' hours remember as posted is what the ledger has."""
    in_ledger: Counter[tuple[str | None, int | None, int | None]] = Counter()
    for entry in books.snapshot.entries:
        if entry.hour_us is not None and entry.account_id == team_account(entry.team_id):
            in_ledger[entry.resource_id, entry.place, entry.hour_us] -= entry.amount_nanousd
    remembered: Counter[tuple[str | None, int | None, int | None]] = Counter()
    for key, posted in books.snapshot.posted_minutes.items():
        remembered[key.resource_id, key.place, key.hour_us] += posted.posted_nanousd
    for seat in in_ledger.keys() | remembered.keys():
        differ = in_ledger[seat] != remembered[seat]
        yield f"{seat}: ledger {in_ledger[seat]}, remembered {remembered[seat]} nano-USD" if differ else None


def spend_by_day_is_the_ledger(books: Books) -> Found:
    """What budgets count is what was posted. Of young days only: older ones were counted from rows that are deleted."""
    computed: Counter[SpendKey] = Counter()
    for job_id, settlement in books.settlements.items():
        computed.update(tokens_spend(settlement.source, books.ledger[job_id].amount_nanousd))
    for hour, posted in books.snapshot.posted_minutes.items():
        computed.update(minutes_spend(posted.team_id, hour.resource_id, hour.hour_us, posted.posted_nanousd))
    first = day_of((books.snapshot.now_us - KEPT_US) // 1000)
    for key in computed.keys() | books.snapshot.spend_days.keys():
        counted = books.snapshot.spend_days.get(key, 0)
        if key.day >= first:
            yield f"{key}: {counted} counted, {computed[key]} posted" if counted != computed[key] else None


def no_slice_is_left_over(books: Books) -> Found:
    """A lease lets go of what it holds when its jobs are posted, or at the latest when none can run any more."""
    for lease_id, horizon_us in books.snapshot.held_leases.items():
        late_s = (books.snapshot.now_us - horizon_us) // 1_000_000
        yield f"{lease_id}: holds something {late_s} s after its horizon" if late_s > LEASE_LATE_S else None


CHECKS: dict[str, Callable[[Books], Found]] = {
    check.__name__.replace("_", " "): check
    for check in (
        log_names_requests_once,
        answered_is_recorded,
        answered_tokens_are_equal,
        answered_is_charged_once,
        errors_cost_nothing,
        partial_answers_pay_what_was_delivered,
        requests_belong_to_the_callers_team,
        facts_of_a_job_agree,
        request_records_follow_from_facts,
        charges_follow_from_facts,
        charges_have_a_fact,
        ledger_balances,
        minutes_follow_from_intervals,
        minutes_are_in_the_ledger,
        spend_by_day_is_the_ledger,
        no_slice_is_left_over,
    )
}
