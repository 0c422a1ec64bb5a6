"""Builds the billing service by hand and runs it: `python -m services.billing`."""

from __future__ import annotations

import asyncio

import structlog

from services.billing.advice_round import AdviceRound
from services.billing.budget_leases import LeaseHandler, LeaseRound
from services.billing.budget_round import BudgetRound
from services.billing.commands import CommandHandler
from services.billing.credit_round import CreditRound
from services.billing.handlers import EventHandler
from services.billing.instruments import Instruments
from services.billing.intake import Intake
from services.billing.metrics_round import MetricsRound
from services.billing.payments_store import PaymentIntake
from services.billing.request_cost_round import RequestCostRound
from services.billing.rounds import MinutesRound, SweepRound, repeat
from services.billing.settings import BillingSettings
from shared import topology
from shared.broker import Broker
from shared.database import Database
from shared.messages import AskBudget, BillingCommand
from shared.runtime import Lifetime, run

log = structlog.get_logger()
ROLE = "roundhouse_billing"


async def serve(settings: BillingSettings, life: Lifetime) -> None:
    instruments = Instruments()
    database = await Database.open(settings.database_url, ROLE, life.stack, size=10)
    broker = await Broker.open(settings.amqp_url, "billing", life.stack)
    intake = Intake(database, instruments)
    events = EventHandler(broker, intake, PaymentIntake(database, instruments), instruments)
    commands = CommandHandler(broker, database)
    minutes = MinutesRound(database, instruments, settings.minutes_lookback_h)
    credit = CreditRound(broker, database)
    leases, lease_round = LeaseHandler(broker, database), LeaseRound(broker, database)
    budgets = BudgetRound(broker, database)
    sweep = SweepRound(database, intake, instruments, settings.request_retention_days)
    costs = RequestCostRound(database, settings.request_retention_days)
    advice = AdviceRound(database)
    metrics = MetricsRound(database, settings.request_retention_days)

    life.check("broker", lambda: broker.connected)
    life.check("database", lambda: database.healthy)
    life.group.create_task(events.run(life.stopping))
    life.group.create_task(broker.consume(topology.BILLING_COMMANDS, BillingCommand, commands.on_command))
    life.group.create_task(repeat("credit", settings.minutes_interval_s, life.stopping, credit.once))
    asks = broker.consume(topology.BILLING_BUDGETS, AskBudget, leases.on_ask, prefetch=4)
    life.group.create_task(asks)
    life.group.create_task(repeat("leases", settings.leases_interval_s, life.stopping, lease_round.once))
    life.group.create_task(repeat("budgets", settings.budgets_interval_s, life.stopping, budgets.once))
    life.group.create_task(repeat("minutes", settings.minutes_interval_s, life.stopping, minutes.once))
    life.group.create_task(repeat("sweep", settings.sweep_interval_s, life.stopping, sweep.once))
    life.group.create_task(repeat("request costs", settings.sweep_interval_s, life.stopping, costs.once))
    life.group.create_task(repeat("metrics", settings.metrics_interval_s, life.stopping, metrics.once))
    life.group.create_task(repeat("advice", settings.advice_interval_s, life.stopping, advice.once))
    life.started()
    await life.stopping.wait()
    try:
        async with asyncio.timeout(settings.drain_timeout_s):
            await events.drained()
    except TimeoutError:
        log.warning("facts_left_to_the_broker")  # not acked: whoever runs next gets them


if __name__ == "__main__":
    run("billing", BillingSettings, serve)
