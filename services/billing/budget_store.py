"""SQL of budgets, their leases and what was spent by day. Runs inside the caller's transaction; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date, datetime, timedelta

import asyncpg

from services.billing.budget_account import Account, Grant, Lease
from services.billing.budget_rules import Alert, Budget
from services.billing.budget_spend import SpendKey
from services.billing.instants import from_unix_ms, to_unix_ms
from shared.budgets.period import credit_budget_id, period_end
from shared.database import Connection

MAX_SPENDABLE_NANOUSD = 2**62


async def add_spend(connection: Connection, spend: Mapping[SpendKey, int]) -> None:
    """Count what the same transaction posts. In one order everywhere: two of them wait instead of deadlocking."""
    keys = sorted(key for key, amount in spend.items() if amount)
    if keys:
        await connection.execute(
            """
            INSERT INTO billing.spend_days AS s (team_id, scope, scope_id, day, posted_nanousd)
            SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::date[], $5::bigint[])
            ON CONFLICT (team_id, scope, scope_id, day)
                DO UPDATE SET posted_nanousd = s.posted_nanousd + EXCLUDED.posted_nanousd
            """,
            [key.team_id for key in keys],
            [key.scope for key in keys],
            [key.scope_id for key in keys],
            [key.day for key in keys],
            [spend[key] for key in keys],
        )


def _budget(row: asyncpg.Record) -> Budget:
    return Budget(
        budget_id=row["budget_id"],
        team_id=row["team_id"],
        scope=row["scope"],
        scope_id=row["scope_id"],
        period=row["period"],
        limit_nanousd=row["limit_nanousd"],
        alert_percents=tuple(row["alert_percents"]),
        actions=tuple(row["actions"]),
    )


async def lock_budget(connection: Connection, budget_id: str) -> Budget | None:
    """The budget, whose leases and limit nobody else changes until the transaction ends; None if it is gone."""
    row = await connection.fetchrow(
        "SELECT * FROM billing.budgets WHERE budget_id = $1 AND deleted_at IS NULL FOR UPDATE", budget_id
    )
    return None if row is None else _budget(row)


async def count_budgets(connection: Connection, team_id: str) -> int:
    return int(
        await connection.fetchval(
            "SELECT count(*) FROM billing.budgets WHERE team_id = $1 AND deleted_at IS NULL", team_id
        )
    )


async def insert_budget(connection: Connection, budget: Budget) -> bool:
    """Keep a new budget; False if there is one for the same thing and period."""
    return bool(
        await connection.fetchval(
            """
            INSERT INTO billing.budgets
                (budget_id, team_id, scope, scope_id, period, limit_nanousd, alert_percents, actions)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
            ON CONFLICT (team_id, scope, scope_id, period) WHERE deleted_at IS NULL DO NOTHING RETURNING true
            """,
            budget.budget_id,
            budget.team_id,
            budget.scope,
            budget.scope_id,
            budget.period,
            budget.limit_nanousd,
            list(budget.alert_percents),
            list(budget.actions),
        )
    )


async def save_budget(connection: Connection, budget: Budget) -> None:
    """Write what may change of a budget; the caller has it locked."""
    await connection.execute(
        """
        UPDATE billing.budgets SET limit_nanousd = $2, alert_percents = $3, actions = $4, changed_at = now()
        WHERE budget_id = $1
        """,
        budget.budget_id,
        budget.limit_nanousd,
        list(budget.alert_percents),
        list(budget.actions),
    )


async def delete_budget(connection: Connection, budget_id: str) -> None:
    """Its leases and alerts stay, for what still refers to them."""
    await connection.execute("UPDATE billing.budgets SET deleted_at = now() WHERE budget_id = $1", budget_id)


async def load_budgets(connection: Connection, day: date) -> list[tuple[Budget, date, int]]:
    """All budgets, each with the start of its period that the day is in, and what is spent of it."""
    rows = await connection.fetch(
        """
        SELECT b.*, p.period_start, coalesce((
                   SELECT sum(s.posted_nanousd) FROM billing.spend_days s
                   WHERE s.team_id = b.team_id AND s.scope = b.scope AND s.scope_id = b.scope_id
                     AND s.day >= p.period_start AND s.day < p.period_start + ('1 ' || b.period)::interval), 0)::bigint
               AS spent
        FROM billing.budgets b
        CROSS JOIN LATERAL (SELECT date_trunc(b.period, $1::date::timestamp)::date AS period_start) p
        WHERE b.deleted_at IS NULL
        """,
        day,
    )
    return [(_budget(row), row["period_start"], row["spent"]) for row in rows]


async def insert_alerts(connection: Connection, alerts: Iterable[tuple[str, Alert]]) -> int:
    """Keep those of the alerts (each with an id for it) that nobody was told yet; return how many."""
    rows = list(alerts)
    new = await connection.fetch(
        """
        INSERT INTO billing.alerts (alert_id, budget_id, team_id, scope, scope_id, period, period_start, percent,
                                    limit_nanousd, spent_nanousd)
        SELECT x.alert_id, b.budget_id, b.team_id, b.scope, b.scope_id, b.period, x.period_start, x.percent,
               x.limit_nanousd, x.spent
        FROM unnest($1::text[], $2::text[], $3::date[], $4::int[], $5::bigint[], $6::bigint[])
            x (alert_id, budget_id, period_start, percent, limit_nanousd, spent)
        JOIN billing.budgets b USING (budget_id)
        ORDER BY x.alert_id
        ON CONFLICT (budget_id, period_start, percent, limit_nanousd) DO NOTHING RETURNING 1
        """,
        [alert_id for alert_id, _ in rows],
        [alert.budget.budget_id for _, alert in rows],
        [alert.period_start for _, alert in rows],
        [alert.percent for _, alert in rows],
        [alert.budget.limit_nanousd for _, alert in rows],
        [alert.spent_nanousd for _, alert in rows],
    )
    return len(new)


async def alerts_to_announce(connection: Connection, limit: int) -> list[asyncpg.Record]:
    """Alerts whose event was not sent, locked; another process passes over them."""
    return await connection.fetch(
        """
        SELECT alert_id, budget_id, team_id, scope, scope_id, period, period_start, percent, limit_nanousd, spent_nanousd
        FROM billing.alerts WHERE announced_at IS NULL ORDER BY alert_id LIMIT $1 FOR UPDATE SKIP LOCKED
        """,
        limit,
    )


async def mark_announced(connection: Connection, alert_ids: Iterable[str]) -> None:
    await connection.execute(
        "UPDATE billing.alerts SET announced_at = now() WHERE alert_id = ANY($1::text[])", list(alert_ids)
    )


async def resources_on(connection: Connection) -> list[tuple[str, str]]:
    """(resource id, team id) of dedicated resources that are wanted on."""
    rows = await connection.fetch(
        """
        SELECT resource_id, team_id FROM scheduler_api.resources_v1
        WHERE wanted = 'on' AND NOT pool AND deleted_at IS NULL ORDER BY resource_id
        """
    )
    return [(row["resource_id"], row["team_id"]) for row in rows]


async def load_account(connection: Connection, budget: Budget, period_start: date) -> Account:
    """How the budget stands in one period. The caller holds its lock.

    One statement, so that a posting that commits meanwhile is seen whole or not at all: never a lease that it has
    freed without the amount that it has posted.
    """
    row = await connection.fetchrow(
        """
        SELECT (SELECT coalesce(sum(posted_nanousd), 0)::bigint FROM billing.spend_days
                WHERE team_id = $1 AND scope = $2 AND scope_id = $3 AND day >= $4 AND day < $5) AS posted,
               (SELECT coalesce(sum(held_nanousd), 0)::bigint FROM billing.budget_leases
                WHERE budget_id = $6 AND period_start = $4 AND held_nanousd > 0) AS held
        """,
        budget.team_id,
        budget.scope,
        budget.scope_id,
        period_start,
        period_end(budget.period, period_start),
        budget.budget_id,
    )
    assert row is not None  # two sums are always a row
    return Account(budget.limit_nanousd, row["posted"], row["held"])


async def load_credit_account(connection: Connection, team_id: str) -> Account:
    """How the team's credit stands: what it may spend is beyond all that is posted. The caller holds its lock.

    One statement, as in `load_account`. A team without a bound has all that an amount can be.
    """
    row = await connection.fetchrow(
        """
        SELECT (SELECT spendable_nanousd FROM billing_api.spendable_v1 WHERE team_id = $1) AS spendable,
               (SELECT coalesce(sum(held_nanousd), 0)::bigint FROM billing.budget_leases
                WHERE budget_id = $2 AND held_nanousd > 0) AS held
        """,
        team_id,
        credit_budget_id(team_id),
    )
    assert row is not None  # two values are always a row
    return Account(MAX_SPENDABLE_NANOUSD if row["spendable"] is None else row["spendable"], 0, row["held"])


def _lease(row: asyncpg.Record) -> Lease:
    return Lease(
        granted_nanousd=row["granted_nanousd"],
        spent_nanousd=row["spent_nanousd"],
        settled_nanousd=row["settled_nanousd"],
        horizon_unix_ms=to_unix_ms(row["horizon_at"]),
        written_off=row["written_off"],
    )


async def lock_leases(connection: Connection, lease_ids: Iterable[str]) -> dict[str, Lease]:
    """Those of the leases that exist, locked in one order everywhere."""
    rows = await connection.fetch(
        "SELECT * FROM billing.budget_leases WHERE lease_id = ANY($1::text[]) ORDER BY lease_id FOR UPDATE",
        sorted(set(lease_ids)),
    )
    return {row["lease_id"]: _lease(row) for row in rows}


async def save_leases(connection: Connection, leases: Mapping[str, Lease]) -> None:
    """Write what moves of the leases; the caller has them locked."""
    ordered = sorted(leases.items())
    await connection.execute(
        """
        UPDATE billing.budget_leases l
        SET spent_nanousd = x.spent, settled_nanousd = x.settled, written_off = x.written_off
        FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::boolean[]) x (lease_id, spent, settled, written_off)
        WHERE l.lease_id = x.lease_id
        """,
        [lease_id for lease_id, _ in ordered],
        [lease.spent_nanousd for _, lease in ordered],
        [lease.settled_nanousd for _, lease in ordered],
        [lease.written_off for _, lease in ordered],
    )


async def load_grant(connection: Connection, lease_id: str) -> Grant | None:
    """What was answered when this lease was asked for before."""
    row = await connection.fetchrow("SELECT * FROM billing.budget_leases WHERE lease_id = $1", lease_id)
    return (
        None if row is None else Grant(row["granted_nanousd"], tuple(row["refused"]), row["unposted_nanousd"])
    )


async def insert_lease(
    connection: Connection,
    lease_id: str,
    budget_id: str,
    period_start: date,
    gateway_id: str,
    grant: Grant,
    horizon_at: datetime,
    *,
    closed: bool = False,
) -> None:
    """Keep a lease with what was answered. closed: nobody may ever use it."""
    await connection.execute(
        """
        INSERT INTO billing.budget_leases
            (lease_id, budget_id, period_start, gateway_id, granted_nanousd, refused, unposted_nanousd, spent_nanousd, horizon_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (lease_id) DO NOTHING
        """,
        lease_id,
        budget_id,
        period_start,
        gateway_id,
        grant.granted_nanousd,
        list(grant.refused),
        grant.unposted_nanousd,
        0 if closed else None,
        horizon_at,
    )


async def holding_leases(connection: Connection, horizon_unix_ms: int, limit: int) -> list[str]:
    """Leases that hold something though their horizon is past."""
    rows = await connection.fetch(
        """
        SELECT lease_id FROM billing.budget_leases
        WHERE held_nanousd > 0 AND horizon_at <= $1 ORDER BY lease_id LIMIT $2
        """,
        from_unix_ms(horizon_unix_ms),
        limit,
    )
    return [row["lease_id"] for row in rows]


async def delete_old_leases(connection: Connection, keep: timedelta, limit: int) -> int:
    """Forget leases that hold nothing any more; return how many."""
    rows = await connection.fetch(
        """
        DELETE FROM billing.budget_leases WHERE lease_id IN (
            SELECT lease_id FROM billing.budget_leases
            WHERE held_nanousd = 0 AND created_at < now() - $1::interval ORDER BY created_at LIMIT $2)
        RETURNING 1
        """,
        keep,
        limit,
    )
    return len(rows)
