"""What the database itself refuses: writes by the wrong role, illegal moves, money that changes or does not balance.

Each test runs in a transaction that is rolled back. The services' own tables of moves have to be the database's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

import asyncpg
import pytest

from services.batch.states import BATCH_TRANSITIONS
from services.scheduler.states import PLACE_TRANSITIONS, RESOURCE_TRANSITIONS, PlaceState, ResourceState

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
EPOCH = 7
ROLES = (
    "roundhouse_gateway",
    "roundhouse_scheduler",
    "roundhouse_batch",
    "roundhouse_billing",
    "roundhouse_audit",
)
# Of the tables that an owner may do more with than SELECT, INSERT and (but for billing) UPDATE.
DELETES = {
    "gateway.outbox",
    "gateway.idempotency_keys",
    "scheduler.places",
    "scheduler.command_results",
    "scheduler.starts",
    "scheduler.decisions",
    "scheduler.nodes",
    "scheduler.quotas",
    "scheduler.dead_letters",
    "scheduler.worker_models",
    "scheduler.model_alarms",
    "scheduler.model_pins",
    "scheduler.model_preloads",
    "billing.requests",
    "billing.request_costs",
    "billing.hour_costs",
    "billing.histogram_marks",
    "billing.minute_counts",
    "billing.minute_histograms",
    "billing.minute_busy",
    "billing.hour_counts",
    "billing.hour_histograms",
    "billing.hour_busy",
    "billing.command_results",
    "batch.outbox",
    "batch.command_results",
    "batch.lines",
    "batch.quotes",
    "batch.submissions",
    "gateway.model_uploads",
    "gateway.upload_files",
    "billing.budget_leases",
}
BILLING_UPDATES = {
    "billing.requests",
    "billing.minute_charges",
    "billing.job_charges",
    "billing.advice",
    "billing.spend_days",
    "billing.budgets",
    "billing.alerts",
    "billing.budget_leases",
    "billing.prices",
    "billing.rates",
}
"""Of prices and rates only that they were withdrawn."""
KEPT_BY_TRIGGERS = {"billing.balances"}
# Views that hold a team's text, or say where it lies: for those who need them.
FOR_SOME = {
    "batch_api.files_v1": {"gateway"},
    "batch_api.results_v1": {"gateway"},
    "batch_api.queue_credentials_v1": {"gateway"},
    "gateway_api.files_v1": {"batch"},
    "gateway_api.model_revisions_v1": {"batch"},
}
FOR_BATCH = {
    "gateway_api.teams_v1",
    "scheduler_api.resources_v1",
    "billing_api.prices_v1",
    "billing_api.spendable_v1",
    "billing_api.capped_batches_v1",
    "billing_api.budgets_v1",
    "batch_api.batches_v1",
    "batch_api.quotes_v1",
    "batch_api.own_resources_v1",
    "batch_api.schedules_v1",
    "batch_api.batch_events_v1",
    "batch_api.schedule_runs_v1",
    "scheduler_api.holds_v1",
    "scheduler_api.scaling_v1",
    "billing_api.capped_resources_v1",
    "scheduler_api.options_v1",
    "scheduler_api.devices_v1",
    "scheduler_api.quotas_v1",
    "scheduler_api.start_times_v1",
    "billing_api.rates_v1",
    "billing_api.requests_v1",
    "billing_api.hour_counts_v1",
    "billing_api.hour_busy_v1",
}
"""All that the batch service reads of the views that everybody else has."""
FOR_AUDIT_ALONE = {
    "billing_api.ledger_v1",
    "billing_api.usage_events_v1",
    "billing_api.spend_days_v1",
    "billing_api.held_leases_v1",
}


@pytest.fixture
async def connection(module_database: str) -> AsyncIterator[Connection]:
    opened = await asyncpg.connect(module_database)
    changes = opened.transaction()
    await changes.start()
    yield opened
    await changes.rollback()
    await opened.close()


async def attempt(connection: Connection, sql: str, *args: object) -> str | None:
    """The SQLSTATE that refuses the statement, deferred checks included; None if it is accepted (and kept)."""
    try:
        async with connection.transaction():
            await connection.execute(sql, *args)
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            await connection.execute("SET CONSTRAINTS ALL DEFERRED")
    except asyncpg.PostgresError as error:
        return error.sqlstate
    return None


CHECK_VIOLATION = "23514"
UNIQUE_VIOLATION = "23505"
RESTRICT_VIOLATION = "23001"
NO_PRIVILEGE = "42501"


# ---- roles


def _expected(role: str, relation: str) -> set[str]:
    owner = role.removeprefix("roundhouse_")
    schema = relation.partition(".")[0]
    if relation in FOR_SOME:
        return {"SELECT"} if owner in FOR_SOME[relation] else set()
    if schema.endswith("_api") and owner == "batch":
        return {"SELECT"} if relation in FOR_BATCH else set()
    if schema.endswith("_api"):
        return {"SELECT"} if owner == "audit" or relation not in FOR_AUDIT_ALONE else set()
    if schema != owner:
        return set()
    if relation in KEPT_BY_TRIGGERS:
        return {"SELECT"}
    rights = {"SELECT", "INSERT"}
    if owner != "billing" or relation in BILLING_UPDATES:
        rights.add("UPDATE")
    return rights | ({"DELETE"} if relation in DELETES else set())


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_has_exactly_the_rights_it_is_meant_to_have(connection: Connection, role: str) -> None:
    rows = await connection.fetch(
        """SELECT n.nspname || '.' || c.relname AS relation,
                  array(SELECT p FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES',
                                                   'TRIGGER']) p
                        WHERE has_table_privilege($1, c.oid, p) OR CASE WHEN p IN ('DELETE', 'TRUNCATE', 'TRIGGER')
                            THEN false ELSE has_any_column_privilege($1, c.oid, p) END) AS rights
           FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
           WHERE n.nspname ~ '^(gateway|scheduler|billing|batch)(_api)?$' AND c.relkind IN ('r', 'v', 'm', 'p')""",
        role,
    )
    assert len(rows) > 30
    actual = {row["relation"]: set(row["rights"]) for row in rows}
    assert actual == {relation: _expected(role, relation) for relation in actual}


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_makes_no_tables_and_has_no_power_over_others(connection: Connection, role: str) -> None:
    made = await connection.fetch(
        "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND has_schema_privilege($1, oid, 'CREATE')",
        role,
    )
    assert made == []
    row = await connection.fetchrow(
        "SELECT rolsuper, rolcreaterole, rolcreatedb, rolcanlogin, rolbypassrls FROM pg_roles WHERE rolname = $1",
        role,
    )
    assert row is not None and not any(row.values())
    member_of = await connection.fetch(
        "SELECT 1 FROM pg_auth_members WHERE member = (SELECT oid FROM pg_roles WHERE rolname = $1)", role
    )
    assert member_of == []


@pytest.mark.parametrize(
    ("role", "sql"),
    [
        ("gateway", "UPDATE scheduler.resources SET state = 'live'"),
        ("gateway", "DELETE FROM scheduler.places"),
        ("gateway", "INSERT INTO billing.accounts VALUES ('team:x', 'x', 'team')"),
        ("gateway", "UPDATE scheduler_api.options_v1 SET hourly_rate_nanousd = 0"),
        ("gateway", "INSERT INTO billing_api.prices_v1 (price_id) VALUES ('x')"),
        ("gateway", "SELECT * FROM billing_api.ledger_v1"),
        ("scheduler", "SELECT secret_sha256 FROM gateway.api_keys"),
        ("scheduler", "UPDATE gateway.teams SET suspended = false"),
        ("gateway", "UPDATE batch.batches SET state = 'completed'"),
        ("gateway", "SELECT * FROM batch.lines"),
        ("gateway", "SELECT password_hash FROM batch.queue_credentials"),
        ("batch", "DELETE FROM batch.queue_credentials"),
        ("batch", "UPDATE gateway.files SET bytes = 0"),
        ("batch", "SELECT secret_sha256 FROM gateway.api_keys"),
        ("audit", "SELECT * FROM batch_api.results_v1"),
        ("billing", "UPDATE billing.entries SET amount_nanousd = 1"),
        ("billing", "DELETE FROM billing.entries"),
        ("billing", "UPDATE billing.transactions SET team_id = 'x'"),
        ("billing", "DELETE FROM billing.transactions"),
        ("billing", "DELETE FROM billing.usage_events"),
        ("billing", "TRUNCATE billing.usage_events"),
        ("billing", "UPDATE scheduler.state_intervals SET hourly_rate_nanousd = 0"),
        ("audit", "SELECT * FROM billing.entries"),
        ("audit", "SELECT * FROM gateway.api_keys"),
    ],
)
async def test_a_forbidden_statement_is_refused(connection: Connection, role: str, sql: str) -> None:
    await connection.execute(f"SET LOCAL ROLE roundhouse_{role}")
    assert await attempt(connection, sql) == NO_PRIVILEGE


@pytest.mark.parametrize("role", ROLES)
async def test_every_view_can_be_read_by_those_it_is_granted_to(connection: Connection, role: str) -> None:
    views = await connection.fetch(
        "SELECT schemaname || '.' || viewname AS view FROM pg_views WHERE schemaname ~ '_api$'"
    )
    await connection.execute(f"SET LOCAL ROLE {role}")
    for (view,) in views:
        refusal = await attempt(connection, f"SELECT * FROM {view} LIMIT 1")
        assert refusal == (None if _expected(role, view) else NO_PRIVILEGE), view


async def test_no_view_shows_a_key(connection: Connection) -> None:
    columns = await connection.fetch(
        "SELECT table_name || '.' || column_name AS name FROM information_schema.columns WHERE table_schema ~ '_api$'"
    )
    assert columns
    shown = [row["name"] for row in columns if "secret" in row["name"] or "api_key" in row["name"]]
    assert shown == []


# ---- resources and places


@pytest.fixture
async def resource(connection: Connection) -> str:
    """A resource that is on, with two places, under the leader's epoch."""
    await connection.execute("INSERT INTO scheduler.lease VALUES ('leader', 'sch_1', $1, now())", EPOCH)
    await connection.execute(
        """INSERT INTO scheduler.performance_options
           VALUES ('opt_1', 'smollm2-135m', 'cpu-small', 'cpu', 'fp32', 8, 2048, 16384, 50000000)"""
    )
    await connection.execute(
        """INSERT INTO scheduler.resources (resource_id, team_id, name, model_type, option_id, wanted, fixed_count)
           VALUES ('res_1', 'team_1', 'r', 'smollm2-135m', 'opt_1', 'on', 2)"""
    )
    return "res_1"


_PLACE = """INSERT INTO scheduler.places (resource_id, place, state, incarnation, worker_id, node_id, device, epoch)
            VALUES ('res_1', $1, $2, $3, 'wrk_' || $3, 'node', 'cpu:0', $4)"""


async def _force(connection: Connection, sql: str) -> None:
    """A change that triggers would refuse: to set a state up."""
    await connection.execute("SET LOCAL session_replication_role = replica")
    await connection.execute(sql)
    await connection.execute("SET LOCAL session_replication_role = origin")


@pytest.mark.parametrize("state", ResourceState)
async def test_a_resource_moves_as_the_scheduler_s_table_says(
    connection: Connection, resource: str, state: ResourceState
) -> None:
    for to in ResourceState:
        await _force(connection, f"UPDATE scheduler.resources SET state = '{state}'")
        refusal = await attempt(connection, f"UPDATE scheduler.resources SET state = '{to}'")
        legal = to == state or to in RESOURCE_TRANSITIONS[state]
        assert refusal == (None if legal else CHECK_VIOLATION), f"{state} to {to}"


@pytest.mark.parametrize("state", PlaceState)
async def test_a_place_moves_as_the_scheduler_s_table_says(
    connection: Connection, resource: str, state: PlaceState
) -> None:
    await connection.execute(_PLACE, 0, "starting", "inc_1", EPOCH)
    for to in PlaceState:
        await _force(connection, f"UPDATE scheduler.places SET state = '{state}'")
        refusal = await attempt(connection, f"UPDATE scheduler.places SET state = '{to}'")
        legal = to == state or to in PLACE_TRANSITIONS[state]
        assert refusal == (None if legal else CHECK_VIOLATION), f"{state} to {to}"


async def test_states_that_do_not_exist_are_refused(connection: Connection, resource: str) -> None:
    await connection.execute(_PLACE, 0, "starting", "inc_1", EPOCH)
    # A table with checks to come may not be altered.
    await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
    await connection.execute("ALTER TABLE scheduler.resources DISABLE TRIGGER resource_state")
    await connection.execute("ALTER TABLE scheduler.places DISABLE TRIGGER place_rules")
    assert await attempt(connection, "UPDATE scheduler.resources SET state = 'online'") == CHECK_VIOLATION
    assert await attempt(connection, "UPDATE scheduler.resources SET wanted = 'maybe'") == CHECK_VIOLATION
    assert await attempt(connection, "UPDATE scheduler.places SET state = 'free'") == CHECK_VIOLATION


@pytest.mark.parametrize("state", [state for state in PlaceState if state is not PlaceState.STARTING])
async def test_a_place_begins_as_starting(connection: Connection, resource: str, state: PlaceState) -> None:
    assert await attempt(connection, _PLACE, 0, state.value, "inc_1", EPOCH) == CHECK_VIOLATION
    assert await attempt(connection, _PLACE, 0, "starting", "inc_1", EPOCH) is None


@pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH + 1, 0])
async def test_only_the_leader_s_epoch_writes_places(
    connection: Connection, resource: str, epoch: int
) -> None:
    assert await attempt(connection, _PLACE, 0, "starting", "inc_1", epoch) == CHECK_VIOLATION
    await connection.execute(_PLACE, 0, "starting", "inc_1", EPOCH)
    move = "UPDATE scheduler.places SET state = 'ready', epoch = $1"
    assert await attempt(connection, move, epoch) == CHECK_VIOLATION
    assert await attempt(connection, move, EPOCH) is None


async def test_a_deposed_leader_cannot_even_repeat_a_row_as_it_is(
    connection: Connection, resource: str
) -> None:
    await connection.execute(_PLACE, 0, "starting", "inc_1", EPOCH)
    await connection.execute("UPDATE scheduler.lease SET epoch = epoch + 1")
    touch = "UPDATE scheduler.places SET reported_at = now()"
    assert await attempt(connection, touch) == CHECK_VIOLATION


async def test_without_a_leader_nobody_writes_places(connection: Connection, resource: str) -> None:
    await connection.execute("DELETE FROM scheduler.lease")
    assert await attempt(connection, _PLACE, 0, "starting", "inc_1", EPOCH) == CHECK_VIOLATION


async def test_no_place_is_granted_at_or_over_the_count(connection: Connection, resource: str) -> None:
    assert await attempt(connection, _PLACE, 2, "starting", "inc_1", EPOCH) == CHECK_VIOLATION
    assert await attempt(connection, _PLACE, -1, "starting", "inc_1", EPOCH) == CHECK_VIOLATION
    assert await attempt(connection, _PLACE, 1, "starting", "inc_1", EPOCH) is None


@pytest.mark.parametrize(
    "change", ["wanted = 'off'", "fixed_count = 0", "deleted_at = now()"], ids=lambda change: change
)
async def test_no_place_is_granted_where_none_is_wanted_but_those_that_are_go_on_to_drain(
    connection: Connection, resource: str, change: str
) -> None:
    await connection.execute(_PLACE, 0, "starting", "inc_1", EPOCH)
    await connection.execute(f"UPDATE scheduler.resources SET {change}")
    assert await attempt(connection, _PLACE, 1, "starting", "inc_2", EPOCH) == CHECK_VIOLATION
    assert await attempt(connection, "UPDATE scheduler.places SET state = 'draining'") is None


async def test_what_is_asleep_has_no_worker_when_a_transaction_ends(
    connection: Connection, resource: str
) -> None:
    sleep = "UPDATE scheduler.resources SET state = 'asleep'"
    assert await attempt(connection, sleep) is None
    assert await attempt(connection, _PLACE, 0, "starting", "inc_1", EPOCH) == CHECK_VIOLATION
    # Waking grants the place first and moves the state after it.
    await connection.execute(_PLACE, 0, "starting", "inc_1", EPOCH)
    assert await attempt(connection, "UPDATE scheduler.resources SET state = 'starting'") is None
    assert await attempt(connection, sleep) == CHECK_VIOLATION
    await connection.execute("DELETE FROM scheduler.places")
    assert await attempt(connection, sleep) is None


async def test_a_seat_is_taken_once_and_an_incarnation_used_once(
    connection: Connection, resource: str
) -> None:
    await connection.execute(_PLACE, 0, "starting", "inc_1", EPOCH)
    assert await attempt(connection, _PLACE, 0, "starting", "inc_2", EPOCH) == UNIQUE_VIOLATION
    assert await attempt(connection, _PLACE, 1, "starting", "inc_1", EPOCH) == UNIQUE_VIOLATION


# ---- state intervals


_INTERVAL = """INSERT INTO scheduler.state_intervals VALUES ('inc_1', 'res_1', 'team_1', 0, false, 50000000, $1, $2, $3)"""


@pytest.fixture
async def interval(connection: Connection, resource: str) -> None:
    await connection.execute(_INTERVAL, NOON, NOON + timedelta(seconds=5), None)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ("proved_until = proved_until + interval '1 second'", None),
        ("proved_until = proved_until", None),
        ("ended_at = proved_until", None),
        ("proved_until = proved_until + interval '1 s', ended_at = proved_until + interval '1 s'", None),
        ("proved_until = proved_until - interval '1 second'", RESTRICT_VIOLATION),
        ("ended_at = proved_until + interval '1 second'", CHECK_VIOLATION),
        ("ended_at = proved_until - interval '1 second'", CHECK_VIOLATION),
        ("started_at = started_at - interval '1 hour'", RESTRICT_VIOLATION),
        ("team_id = 'team_2'", RESTRICT_VIOLATION),
        ("hourly_rate_nanousd = 1", RESTRICT_VIOLATION),
        ("place = 1", RESTRICT_VIOLATION),
        ("pool = true", RESTRICT_VIOLATION),
        ("incarnation = 'inc_2'", RESTRICT_VIOLATION),
    ],
    ids=lambda value: str(value),
)
async def test_an_interval_only_grows(
    connection: Connection, interval: None, change: str, refusal: str | None
) -> None:
    assert await attempt(connection, f"UPDATE scheduler.state_intervals SET {change}") == refusal


async def test_an_ended_interval_never_changes_again(connection: Connection, interval: None) -> None:
    await connection.execute("UPDATE scheduler.state_intervals SET ended_at = proved_until")
    for change in (
        "ended_at = NULL",
        "proved_until = proved_until + interval '1 s', ended_at = ended_at + interval '1 s'",
        "ended_at = ended_at",
    ):
        refusal = await attempt(connection, f"UPDATE scheduler.state_intervals SET {change}")
        assert refusal == RESTRICT_VIOLATION, change


async def test_an_interval_is_never_deleted(connection: Connection, interval: None) -> None:
    assert await attempt(connection, "DELETE FROM scheduler.state_intervals") == RESTRICT_VIOLATION


async def test_a_replica_has_one_open_interval_and_begins_a_new_one_after_its_end(
    connection: Connection, interval: None
) -> None:
    later = NOON + timedelta(minutes=1)
    assert await attempt(connection, _INTERVAL, later, later, None) == UNIQUE_VIOLATION
    await connection.execute("UPDATE scheduler.state_intervals SET ended_at = proved_until")
    assert await attempt(connection, _INTERVAL, later, later, None) is None


async def test_an_interval_does_not_end_before_it_begins(connection: Connection, resource: str) -> None:
    assert await attempt(connection, _INTERVAL, NOON, NOON - timedelta(seconds=1), None) == CHECK_VIOLATION


# ---- money


_ENTRY = "INSERT INTO billing.entries VALUES ('txn_1', $1, $2)"


@pytest.fixture
async def accounts(connection: Connection) -> None:
    await connection.execute(
        """INSERT INTO billing.accounts VALUES ('team:a', 'a', 'team'), ('revenue:tokens', NULL, 'revenue'),
                                               ('revenue:minutes', NULL, 'revenue')"""
    )


def _booking(*entries: tuple[str, int]) -> str:
    """One statement that books a transaction with its entries."""
    rows = ", ".join(f"('txn_1', '{account}', {amount}::bigint)" for account, amount in entries)
    booked = f", booked AS (INSERT INTO billing.entries VALUES {rows})" if entries else ""
    return f"""WITH header AS (
        INSERT INTO billing.transactions (transaction_id, unique_key, kind, team_id, words)
        VALUES ('txn_1', 'tokens:job_1', 'tokens', 'a', 'words'))
        {booked} SELECT 1"""


@pytest.mark.parametrize(
    ("entries", "refusal"),
    [
        ([("team:a", -5), ("revenue:tokens", 5)], None),
        ([("team:a", -5), ("revenue:tokens", 3), ("revenue:minutes", 2)], None),
        ([("team:a", -(2**62)), ("revenue:tokens", 2**62)], None),
        ([("team:a", -5), ("revenue:tokens", 4)], CHECK_VIOLATION),
        ([("team:a", -5)], CHECK_VIOLATION),
        ([], CHECK_VIOLATION),
        ([("team:a", 0), ("revenue:tokens", 0)], CHECK_VIOLATION),
        ([("team:a", -5), ("team:a", 5)], UNIQUE_VIOLATION),
        ([("team:nobody", -5), ("revenue:tokens", 5)], "23503"),
    ],
)
async def test_a_transaction_balances_or_is_refused(
    connection: Connection, accounts: None, entries: list[tuple[str, int]], refusal: str | None
) -> None:
    assert await attempt(connection, _booking(*entries)) == refusal


async def test_what_is_booked_later_has_to_balance_too(connection: Connection, accounts: None) -> None:
    assert await attempt(connection, _booking(("team:a", -5), ("revenue:tokens", 5))) is None
    assert await attempt(connection, _ENTRY, "revenue:minutes", 1) == CHECK_VIOLATION


async def test_a_posted_transaction_gets_no_more_entries_even_if_they_sum_to_zero(database: str) -> None:
    opened = await asyncpg.connect(database)
    try:
        await opened.execute(
            "INSERT INTO billing.accounts VALUES ('team:later', 'later', 'team'), ('revenue:one', NULL, 'revenue'), "
            "('revenue:two', NULL, 'revenue'), ('team:later2', 'later2', 'team')"
        )
        await opened.execute(
            _booking(("team:later", -5), ("revenue:one", 5))
            .replace("txn_1", "txn_later")
            .replace("job_1", "later")
        )
        more = (
            "INSERT INTO billing.entries VALUES ('txn_later', 'team:later2', 3::bigint), "
            "('txn_later', 'revenue:two', -3::bigint)"
        )
        assert await attempt(opened, more) == RESTRICT_VIOLATION
    finally:
        await opened.close()


_CORRECTION = """WITH header AS (
    INSERT INTO billing.transactions (transaction_id, unique_key, kind, team_id, words, corrects)
    VALUES ('txn_2', 'tokens:job_1:1', 'correction', $1, 'words', $2))
    INSERT INTO billing.entries VALUES ('txn_2', 'team:a', 5::bigint), ('txn_2', 'revenue:tokens', -5::bigint)"""


@pytest.mark.parametrize(
    ("team", "corrects", "refusal"),
    [
        ("a", "txn_1", None),
        ("a", None, CHECK_VIOLATION),
        ("a", "txn_none", "23503"),
        ("b", "txn_1", CHECK_VIOLATION),
        ("a", "txn_2", CHECK_VIOLATION),
    ],
)
async def test_a_correction_names_a_transaction_of_the_same_team(
    connection: Connection, accounts: None, team: str, corrects: str | None, refusal: str | None
) -> None:
    await connection.execute(_booking(("team:a", -5), ("revenue:tokens", 5)))
    assert await attempt(connection, _CORRECTION, team, corrects) == refusal


async def test_a_balance_that_no_bigint_can_hold_is_refused_and_nothing_is_booked(
    connection: Connection, accounts: None
) -> None:
    half = _booking(("team:a", -(2**62)), ("revenue:tokens", 2**62))
    rest = half.replace("txn_1", "txn_2").replace("job_1", "job_2")
    over = half.replace("txn_1", "txn_3").replace("job_1", "job_3")
    assert await attempt(connection, half) is None
    assert await attempt(connection, rest) is None  # -2^63, the last one that fits
    assert await attempt(connection, over) == "22003"
    assert await connection.fetchval("SELECT count(*) FROM billing.transactions") == 2
    balance = await connection.fetchval("SELECT balance_nanousd FROM billing_api.balances_v1")
    assert balance == -(2**63)


async def test_a_balance_changes_with_its_entries_alone(connection: Connection, accounts: None) -> None:
    await connection.execute(_booking(("team:a", -5), ("revenue:tokens", 5)))
    for change in (
        "UPDATE billing.balances SET balance_nanousd = 0",
        "DELETE FROM billing.balances",
        "INSERT INTO billing.balances VALUES ('revenue:tokens', 1, 1)",
    ):
        assert await attempt(connection, change) == RESTRICT_VIOLATION, change


@pytest.mark.parametrize(
    "table",
    [
        "prices",
        "rates",
        "usage_events",
        "transactions",
        "entries",
        "accounts",
        "balances",
        "team_terms",
        "payment_events",
    ],
)
async def test_money_and_facts_are_never_emptied(connection: Connection, table: str) -> None:
    assert await attempt(connection, f"TRUNCATE billing.{table} CASCADE") == RESTRICT_VIOLATION


async def test_a_charge_is_booked_once(connection: Connection, accounts: None) -> None:
    assert await attempt(connection, _booking(("team:a", -5), ("revenue:tokens", 5))) is None
    again = _booking(("team:a", -5), ("revenue:tokens", 5)).replace("txn_1", "txn_2")
    assert await attempt(connection, again) == UNIQUE_VIOLATION


@pytest.mark.parametrize(
    "table",
    [
        "prices",
        "rates",
        "usage_events",
        "transactions",
        "entries",
        "accounts",
        "team_terms",
        "payment_events",
    ],
)
async def test_money_and_facts_are_append_only_even_for_the_owner_of_the_database(
    connection: Connection, accounts: None, table: str
) -> None:
    await connection.execute("INSERT INTO billing.prices VALUES ('prc_1', 'm', 'live', 1, 1, now())")
    await connection.execute(
        "INSERT INTO billing.rates (rate_id, option_id, hourly_rate_nanousd, starts_at, actor) "
        "VALUES ('rate_1', 'opt_1', 1, now(), 'x')"
    )
    await connection.execute(
        "INSERT INTO billing.team_terms (team_id, pays, actor) VALUES ('a', 'prepaid', 'x')"
    )
    await connection.execute(
        "INSERT INTO billing.payment_events VALUES ('stripe', 'evt_1', 'pi_1', 'paid', '{}')"
    )
    await connection.execute("INSERT INTO billing.usage_events VALUES ('evt_1', 't', 'job_1', 'a', '{}')")
    await connection.execute(_booking(("team:a", -5), ("revenue:tokens", 5)))
    column = await connection.fetchval(
        """SELECT column_name FROM information_schema.columns
           WHERE table_schema = 'billing' AND table_name = $1 ORDER BY ordinal_position DESC LIMIT 1""",
        table,
    )
    assert await attempt(connection, f"UPDATE billing.{table} SET {column} = {column}") == RESTRICT_VIOLATION
    assert await attempt(connection, f"DELETE FROM billing.{table}") == RESTRICT_VIOLATION
    assert await connection.fetchval(f"SELECT count(*) FROM billing.{table}") >= 1


_WITHDRAW = "UPDATE billing.{0} SET withdrawn_at = now(), withdrawn_by = 'x'"


@pytest.mark.parametrize("table", ["prices", "rates"])
@pytest.mark.parametrize(
    ("starts", "change", "refusal"),
    [
        ("1 hour", _WITHDRAW, None),
        ("0 hours", _WITHDRAW, RESTRICT_VIOLATION),
        ("-1 hour", _WITHDRAW, RESTRICT_VIOLATION),
        ("1 hour", "DELETE FROM billing.{0}", RESTRICT_VIOLATION),
        ("1 hour", "UPDATE billing.{0} SET withdrawn_at = now()", CHECK_VIOLATION),
        ("1 hour", "UPDATE billing.{0} SET starts_at = starts_at + interval '1 hour'", RESTRICT_VIOLATION),
        ("1 hour", _WITHDRAW + ", starts_at = now()", RESTRICT_VIOLATION),
        ("1 hour", _WITHDRAW + ", created_at = now() - interval '1 hour'", RESTRICT_VIOLATION),
    ],
)
async def test_of_a_version_only_a_withdrawal_before_it_begins_is_written(
    connection: Connection, table: str, starts: str, change: str, refusal: str | None
) -> None:
    begin = "now() + interval '" + starts + "'"
    await connection.execute(f"INSERT INTO billing.prices VALUES ('prc_1', 'm', 'live', 1, 1, {begin})")
    await connection.execute(f"INSERT INTO billing.rates VALUES ('rate_1', 'opt_1', 1, {begin}, now(), 'x')")
    assert await attempt(connection, change.format(table)) == refusal
    again = _WITHDRAW.format(table)
    if refusal is None:
        assert await attempt(connection, again) == RESTRICT_VIOLATION


@pytest.mark.parametrize("table", ["prices", "rates"])
async def test_one_version_begins_at_a_moment_and_a_withdrawn_one_makes_room(
    connection: Connection, table: str
) -> None:
    values = {
        "prices": "INSERT INTO billing.prices VALUES ($1, 'm', 'live', 1, 1, '2999-01-01Z')",
        "rates": "INSERT INTO billing.rates VALUES ($1, 'opt_1', 1, '2999-01-01Z', now(), 'x')",
    }[table]
    assert await attempt(connection, values, "one") is None
    assert await attempt(connection, values, "two") == UNIQUE_VIOLATION
    assert await attempt(connection, _WITHDRAW.format(table)) is None
    assert await attempt(connection, values, "two") is None


async def test_the_balance_is_the_sum_of_the_entries(connection: Connection, accounts: None) -> None:
    balance = "SELECT balance_nanousd FROM billing_api.balances_v1 WHERE team_id = 'a'"
    assert await connection.fetchval(balance) == 0
    await connection.execute(_booking(("team:a", -5), ("revenue:tokens", 5)))
    assert await connection.fetchval(balance) == -5


@pytest.mark.parametrize(
    ("minutes", "hour", "refusal"),
    [
        (60, NOON, None),
        (0, NOON, None),
        (61, NOON, CHECK_VIOLATION),
        (-1, NOON, CHECK_VIOLATION),
        (5, NOON + timedelta(minutes=1), CHECK_VIOLATION),
    ],
)
async def test_an_hour_has_at_most_sixty_minutes(
    connection: Connection, minutes: int, hour: datetime, refusal: str | None
) -> None:
    sql = "INSERT INTO billing.minute_charges VALUES ('res_1', 0, $1, 50000000, 'team_1', $2, 1, 1)"
    assert await attempt(connection, sql, hour, minutes) == refusal


# ---- batches


@pytest.fixture
async def batch(connection: Connection) -> str:
    await connection.execute(
        """INSERT INTO batch.batches (batch_id, team_id, key_id, endpoint, input_file_id, input_path, completion_window,
                                      metadata, total, expires_at)
           VALUES ('batch_1', 'team_1', 'key_1', '/v1/completions', 'file_1', 'p', '24h', '{}', 2, now())"""
    )
    await connection.execute(
        "INSERT INTO batch.lines (batch_id, line, custom_id, byte_offset, byte_length) VALUES ('batch_1', 1, 'a', 0, 9)"
    )
    return "batch_1"


@pytest.mark.parametrize("state", BATCH_TRANSITIONS)
async def test_a_batch_makes_the_moves_of_its_table_only(
    connection: Connection, batch: str, state: str
) -> None:
    await connection.execute("ALTER TABLE batch.batches DISABLE TRIGGER batch_state")
    await connection.execute("UPDATE batch.batches SET state = $1", state)
    await connection.execute("ALTER TABLE batch.batches ENABLE TRIGGER batch_state")
    for to in BATCH_TRANSITIONS:
        trial = connection.transaction()
        await trial.start()
        refusal = await attempt(connection, "UPDATE batch.batches SET state = $1", to)
        await trial.rollback()
        legal = to == state or to in BATCH_TRANSITIONS[state]
        assert refusal == (None if legal else CHECK_VIOLATION), (state, to)


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled", "expired"])
async def test_a_line_ends_once(connection: Connection, batch: str, end: str) -> None:
    for state in ("running", "queued", "running", end):
        assert await attempt(connection, "UPDATE batch.lines SET state = $1", state) is None
    for state in ("queued", "running", "succeeded", "failed", "cancelled", "expired"):
        assert await attempt(connection, "UPDATE batch.lines SET state = $1", state) == CHECK_VIOLATION


async def test_a_batch_counts_no_more_lines_than_it_has(connection: Connection, batch: str) -> None:
    assert await attempt(connection, "UPDATE batch.batches SET completed = 1, failed = 1") is None
    assert await attempt(connection, "UPDATE batch.batches SET completed = 2") == CHECK_VIOLATION
