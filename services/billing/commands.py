"""Carries out commands from other services: each once, whatever arrives how often, with one stored answer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from services.billing import store
from services.billing.budgets import change_budget, create_budget, delete_budget
from services.billing.credit import grant_credit, set_team_terms
from services.billing.price_versions import set_price, set_rate, withdraw_price
from shared.broker import Broker, Delivery
from shared.database import Connection, Database
from shared.messages import (
    ChangeBudget,
    Command,
    CommandResult,
    CreateBudget,
    DeleteBudget,
    GrantCredit,
    SetPrice,
    SetRate,
    SetTeamTerms,
    WithdrawPrice,
)
from shared.outcomes import Done, Dropped, Outcome, Unavailable

log = structlog.get_logger()

Action = Callable[[Connection, Any], Awaitable[CommandResult]]
"""Runs in the transaction that keeps its answer: both are there, or neither."""

ACTIONS: dict[type[Command], Action] = {
    SetPrice: set_price,
    SetRate: set_rate,
    WithdrawPrice: withdraw_price,
    GrantCredit: grant_credit,
    SetTeamTerms: set_team_terms,
    CreateBudget: create_budget,
    ChangeBudget: change_budget,
    DeleteBudget: delete_budget,
}


class CommandHandler:
    """`on_command` is called for every delivery of `topology.BILLING_COMMANDS`."""

    def __init__(self, broker: Broker, database: Database) -> None:
        self._broker = broker
        self._database = database

    async def on_command(self, delivery: Delivery) -> Outcome:
        """Do it, or refuse; the answer goes to the asker's queue if it still exists."""
        command: Command = delivery.message
        if command.deadline_unix_ms < time.time_ns() // 1_000_000:
            return Dropped("command is past its deadline")
        async with self._database.transaction() as connection:
            await store.lock_name(connection, f"billing command {command.command_id}")
            result = await store.load_result(connection, command.command_id)
            if result is None:
                result = await ACTIONS[type(command)](connection, command)
                await store.insert_result(connection, result)
        log.info("command_done", command_id=command.command_id, code=result.code, actor=command.actor)
        try:
            await self._broker.send(command.reply_queue, result)
        except Unavailable as error:
            # Whoever asked repeats the command and gets this same answer.
            log.warning("command_answer_not_sent", command_id=command.command_id, reason=str(error))
        return Done()
