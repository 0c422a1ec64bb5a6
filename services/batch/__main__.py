"""Builds the batch service by hand and runs it: `python -m services.batch`."""

from __future__ import annotations

import asyncio

import structlog
from opentelemetry.metrics import CallbackOptions, Observation

from services.batch import upkeep
from services.batch.commands import CommandHandler
from services.batch.dispatch import Dispatcher
from services.batch.endings import Endings
from services.batch.opening import Opener
from services.batch.own_resources import OwnResources
from services.batch.own_table import OwnTable
from services.batch.owner import LineOwner
from services.batch.paying import CAP_ACTIONS, LinePayer
from services.batch.preparation import Preparer
from services.batch.quote_views import QuoteViews
from services.batch.quotes import Quoter, QuoteTable
from services.batch.results import Results
from services.batch.schedules import Schedules
from services.batch.settings import BatchSettings
from services.batch.store import Store
from services.batch.submission.door import SubmissionDoor
from services.batch.submission.tables import SubmissionTables
from services.batch.views import Views
from shared import telemetry, topology
from shared.broker import Broker
from shared.budgets.gate import BudgetGate
from shared.budgets.table import BudgetTable
from shared.commands import CommandCaller
from shared.database import Database
from shared.file_store import FileStore
from shared.ids import new_id
from shared.inference.tokenizers_pool import TokenizerPool
from shared.lease import Lease
from shared.messages import BatchCommand
from shared.runtime import Lifetime, run

log = structlog.get_logger()
ROLE = "roundhouse_batch"


async def serve(settings: BatchSettings, life: Lifetime) -> None:
    database = await Database.open(settings.database_url, ROLE, life.stack)
    broker = await Broker.open(settings.amqp_url, "batch", life.stack)
    lease = Lease(database, new_id("bat"), settings.lease_s, "batch.lease")
    store, views, files = Store(database, lease), Views(database), FileStore(settings.file_store)
    tokenizers = TokenizerPool(settings.model_store)
    results = Results(store)
    endings = Endings(store, results, tokenizers, lambda batch_id: dispatcher.came_back(batch_id))
    calls = CommandCaller(broker)
    owner = LineOwner(broker, endings.on_done, calls.on_result)
    calls.reply_queue = owner.queue
    preparer = Preparer(tokenizers, owner.queue)
    caps = BudgetTable(database, CAP_ACTIONS)
    budgets = BudgetGate(broker, caps, owner.instance_id, settings.capped_line_s)
    payer = LinePayer(budgets, settings.capped_line_s)
    quote_views = QuoteViews(database)
    own = OwnResources(OwnTable(database, store), quote_views, files, preparer, calls)
    queued = SubmissionTables(database, store)
    dispatcher = Dispatcher(
        store, views, files, owner, results, endings, preparer, payer, own, queued, settings.in_flight
    )
    quotes = QuoteTable(database, store)
    quoter = Quoter(quotes, views, quote_views, files, preparer)
    door = await SubmissionDoor.open(
        settings, database, store, queued, views, dispatcher.has_more, life.stack
    )

    def changed() -> None:
        dispatcher.wake()
        quoter.wake()
        door.wake()

    opener = Opener(store, views, settings.open_per_team)
    schedules = Schedules(database, store, opener)
    commands = CommandHandler(broker, store, views, files, changed, opener, quotes, schedules, door.commands)

    def observe(_options: CallbackOptions) -> list[Observation]:
        return [Observation(dispatcher.lines_out)]

    telemetry.meter().create_observable_gauge(
        "roundhouse.batch.lines_out", [observe], description="Lines with the broker or a worker"
    )
    life.check("broker", lambda: broker.connected)
    life.check("database", lambda: database.healthy)
    life.started()

    async def act() -> None:
        """Stand by until this process leads; then do everything else, until cancelled."""
        await upkeep.lead(lease)
        async with asyncio.TaskGroup() as group:
            group.create_task(upkeep.keep_leading(lease))
            await upkeep.until_done(dispatcher.takeover)
            await upkeep.until_done(caps.refresh)
            group.create_task(caps.keep_fresh())
            tokenizers.start(group)
            await owner.start(group)
            group.create_task(results.run())
            group.create_task(endings.run())
            group.create_task(dispatcher.run())
            group.create_task(quoter.run())
            group.create_task(own.run())
            group.create_task(schedules.run())
            group.create_task(upkeep.relay(store, broker))
            group.create_task(upkeep.sweep(store, files))
            group.create_task(
                broker.consume(topology.BATCH_COMMANDS, BatchCommand, commands.on_command, prefetch=4)
            )
            door.start(group)
            log.info("batch_service_leads", instance=owner.instance_id)

    await budgets.start(life.group)
    acting = life.group.create_task(act())
    await life.stopping.wait()
    acting.cancel()
    await asyncio.wait([acting])
    await budgets.drain()
    # Answers that are here are kept; what is out is put back by whoever leads next, at once.
    await upkeep.hand_over(lease, results)


if __name__ == "__main__":
    run("batch", BatchSettings, serve)
