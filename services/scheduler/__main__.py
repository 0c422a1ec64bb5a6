"""Composition root of the scheduler: `python -m services.scheduler`."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

from services.scheduler.alarms import AlarmKeeper
from services.scheduler.dead_letters import DeadLetterKeeper
from services.scheduler.desired import Desired
from services.scheduler.fleet import Fleet
from services.scheduler.handlers import CommandHandler, ReportListener
from services.scheduler.leader import Leader
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.pin_keeper import PinKeeper
from services.scheduler.queue_depths import QueueDepths
from services.scheduler.residency_keeper import ResidencyKeeper
from services.scheduler.scaling_keeper import ScalingKeeper
from services.scheduler.settings import SchedulerSettings
from services.scheduler.store import Store
from shared import topology
from shared.broker import Broker
from shared.database import Database
from shared.ids import new_id
from shared.lease import Lease
from shared.messages import Alarm, FleetEvent, SchedulerCommand
from shared.outcomes import Unavailable
from shared.runtime import Lifetime, run

REPORTS_PREFETCH = 1000


async def serve(settings: SchedulerSettings, life: Lifetime) -> None:
    instance_id = new_id("sch")
    database = await Database.open(settings.database_url, "roundhouse_scheduler", life.stack)
    broker = await Broker.open(settings.amqp_url, f"scheduler:{instance_id}", life.stack)
    life.check("broker", lambda: broker.connected)
    life.check("database", lambda: database.healthy)

    fleet = Fleet()
    lease = Lease(database, instance_id, settings.lease_s)
    metrics = SchedulerMetrics(lambda: lease.is_leader)
    store, residency, pins = Store(database, lease), ResidencyKeeper(database, lease), PinKeeper(database)
    depths = QueueDepths(broker, fleet.changed)
    scaling = ScalingKeeper(depths, settings.limits.scaling)
    leader = Leader(
        broker, store, residency, pins, scaling, lease, fleet, settings.limits, metrics, settings.tick_s
    )
    commands = CommandHandler(broker, Desired(database, partial(_declare_job_queues, broker)), fleet.changed)

    await broker.subscribe(
        topology.scheduler_events(instance_id),
        FleetEvent,
        ReportListener(fleet).on_report,
        prefetch=REPORTS_PREFETCH,
        no_ack=True,
    )
    # One at a time: of two commands for one resource the later one holds.
    life.group.create_task(
        broker.consume(topology.SCHEDULER_COMMANDS, SchedulerCommand, commands.on_command, prefetch=1)
    )
    life.group.create_task(broker.consume(topology.ALARMS, Alarm, AlarmKeeper(database).on_alarm))
    life.group.create_task(DeadLetterKeeper(broker, database).run())
    life.group.create_task(depths.run())
    leading = life.group.create_task(leader.run())
    life.started()
    await life.stopping.wait()
    # What it has begun is finished or rolled back before another scheduler may lead.
    leading.cancel()
    await asyncio.wait({leading})
    with contextlib.suppress(Unavailable):
        await lease.release()


async def _declare_job_queues(broker: Broker, resource_id: str, pool: bool) -> None:
    await broker.declare(topology.job_queues(resource_id, pool=pool))


def main() -> None:
    run("scheduler", SchedulerSettings, serve)


if __name__ == "__main__":
    main()
