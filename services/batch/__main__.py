"""Builds the batch service by hand and runs it: `python -m services.batch`."""

from __future__ import annotations

import asyncio

import structlog
from opentelemetry.metrics import CallbackOptions, Observation

from services.batch import upkeep
from services.batch.commands import CommandHandler
from services.batch.dispatch import Dispatcher
from services.batch.endings import Endings
from services.batch.owner import LineOwner
from services.batch.preparation import Preparer
from services.batch.results import Results
from services.batch.settings import BatchSettings
from services.batch.store import Store
from services.batch.views import Views
from shared import telemetry, topology
from shared.broker import Broker
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
    owner = LineOwner(broker, endings.on_done)
    preparer = Preparer(tokenizers, owner.queue)
    dispatcher = Dispatcher(store, views, files, owner, results, endings, preparer, settings.in_flight)
    commands = CommandHandler(broker, store, views, files, dispatcher.wake, settings.open_per_team)

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
            await upkeep.take_over(dispatcher.takeover)
            tokenizers.start(group)
            await owner.start(group)
            group.create_task(results.run())
            group.create_task(endings.run())
            group.create_task(dispatcher.run())
            group.create_task(upkeep.relay(store, broker))
            group.create_task(upkeep.sweep(store, files))
            group.create_task(
                broker.consume(topology.BATCH_COMMANDS, BatchCommand, commands.on_command, prefetch=4)
            )
            log.info("batch_service_leads", instance=owner.instance_id)

    acting = life.group.create_task(act())
    await life.stopping.wait()
    acting.cancel()
    await asyncio.wait([acting])
    # Answers that are here are kept; what is out is put back by whoever leads next, at once.
    await upkeep.hand_over(lease, results)


if __name__ == "__main__":
    run("batch", BatchSettings, serve)
