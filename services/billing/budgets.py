"""Makes, changes and deletes budgets. Every function runs inside the caller's database transaction."""

from __future__ import annotations

from services.billing import budget_store, store
from services.billing.budget_rules import MAX_BUDGETS, Budget, budget_refusal, cap_refusal, changed
from services.billing.instants import to_unix_ms
from shared.budgets.period import day_of, period_start
from shared.database import Connection
from shared.ids import new_id
from shared.messages import ChangeBudget, CommandResult, CreateBudget, DeleteBudget


async def create_budget(connection: Connection, command: CreateBudget) -> CommandResult:
    """Keep a new budget, or refuse: one for the same thing and period, a cap that is passed already, too many."""
    budget = Budget(
        budget_id=new_id("bud"),
        team_id=command.team_id,
        scope=command.scope,
        scope_id=command.scope_id,
        period=command.period,
        limit_nanousd=command.limit_nanousd,
        alert_percents=tuple(command.alert_percents),
        actions=tuple(command.actions),
    )
    await store.lock_name(connection, f"billing budgets {command.team_id}")
    refusal = budget_refusal(budget) or await _cap_refusal(connection, None, budget)
    if refusal is not None:
        return store.refused(command, refusal)
    if await budget_store.count_budgets(connection, command.team_id) >= MAX_BUDGETS:
        return store.refused(command, ("too_many_budgets", f"A team may have {MAX_BUDGETS} budgets."))
    if not await budget_store.insert_budget(connection, budget):
        return store.refused(
            command, ("budget_exists", f"There is a budget of this {budget.scope} for this period.")
        )
    return CommandResult(command_id=command.command_id, ok=True, body={"budget_id": budget.budget_id})


async def change_budget(connection: Connection, command: ChangeBudget) -> CommandResult:
    """Write what is to be different, or refuse and change nothing."""
    before = await budget_store.lock_budget(connection, command.budget_id)
    if before is None or before.team_id != command.team_id:
        return store.refused(command, ("not_found", "There is no such budget."))
    after = changed(before, command)
    refusal = budget_refusal(after) or await _cap_refusal(connection, before, after)
    if refusal is not None:
        return store.refused(command, refusal)
    await budget_store.save_budget(connection, after)
    return CommandResult(command_id=command.command_id, ok=True, body={"budget_id": after.budget_id})


async def delete_budget(connection: Connection, command: DeleteBudget) -> CommandResult:
    """Requests that run go on; what they cost is in the ledger as ever."""
    budget = await budget_store.lock_budget(connection, command.budget_id)
    if budget is None or budget.team_id != command.team_id:
        return store.refused(command, ("not_found", "There is no such budget."))
    await budget_store.delete_budget(connection, command.budget_id)
    return CommandResult(command_id=command.command_id, ok=True)


async def _cap_refusal(
    connection: Connection, before: Budget | None, after: Budget
) -> tuple[str, str] | None:
    """How the budget stands decides whether the limit may be a cap. The account is read under the budget's lock."""
    now_unix_ms = to_unix_ms(await connection.fetchval("SELECT clock_timestamp()"))
    start = period_start(after.period, day_of(now_unix_ms))
    return cap_refusal(before, after, await budget_store.load_account(connection, after, start))
