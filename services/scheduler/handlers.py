"""What is done with a command and with a report: glue between the broker and the tables."""

from __future__ import annotations

import asyncio
import time

import structlog

from services.scheduler.desired import Desired
from services.scheduler.fleet import Fleet
from shared import topology
from shared.broker import Broker, Delivery
from shared.messages import DeleteResource, SchedulerCommand
from shared.outcomes import Done, Dropped, Outcome, Unavailable

log = structlog.get_logger()


class CommandHandler:
    """Runs commands; whoever sent one is answered after its effect is committed."""

    def __init__(self, broker: Broker, desired: Desired, changed: asyncio.Event) -> None:
        self._broker = broker
        self._desired = desired
        self._changed = changed

    async def on_command(self, delivery: Delivery) -> Outcome:
        command: SchedulerCommand = delivery.message
        if time.time() * 1000 > command.deadline_unix_ms:
            return Dropped(f"command {command.command_id} is late")
        result = await self._desired.run(command)
        self._changed.set()
        log.info(
            "command_done",
            command=type(command).__name__,
            command_id=command.command_id,
            actor=command.actor,
            code=result.code,
        )
        try:
            await self._broker.send(command.reply_queue, result)
        except Unavailable as error:
            # Done and stored: the sender asks again with the same id and gets the same answer.
            log.warning("answer_not_sent", command_id=command.command_id, error=str(error))
        if isinstance(command, DeleteResource) and result.ok:
            await delete_job_queues(self._broker, command.resource_id)
        return Done()


async def delete_job_queues(broker: Broker, resource_id: str) -> None:
    """Delete the queues of a deleted resource; what fails now is done when a scheduler next takes the lead."""
    try:
        for queue in topology.job_queues(resource_id, pool=True) + topology.job_queues(
            resource_id, pool=False
        ):
            await broker.delete(queue)
    except Unavailable as error:
        log.warning("job_queues_not_deleted", resource_id=resource_id, error=str(error))


class ReportListener:
    """Takes reports in at once, inside the delivery: there is nothing to wait for."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def on_report(self, delivery: Delivery) -> None:
        self._fleet.hear(delivery.message, now_unix_s=time.time(), now_s=time.monotonic())
