"""Asks other services to write what they own: one command, one answer on the caller's reply queue, one deadline.

The services keep their answers by command id: a command that comes again gets the same answer and does nothing twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass

import structlog

from shared import topology
from shared.broker import Broker
from shared.ids import new_id
from shared.inference.errors import ApiError
from shared.messages import Command, CommandResult
from shared.outcomes import PublishRefused, PublishUnknown, Unavailable, Unroutable

log = structlog.get_logger()

DEADLINE_S = 10.0
RETRY_S = 2


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields that every command has."""

    command_id: str
    deadline_unix_ms: int
    reply_queue: str
    actor: str


class CommandCaller:
    """One per process. `on_result` is called by whoever reads the reply queue."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiting: dict[str, asyncio.Future[CommandResult]] = {}
        self.reply_queue = ""
        """Name of the queue that answers come to; set once, before the first call."""

    def envelope(self, actor: str, same_request: bytes | None = None) -> Envelope:
        """Return the common fields.

        same_request: what tells a repeated request from another one, or None. It decides the command's id, so that a
        command whose answer was lost is answered, and not run, when the client sends its request again.
        """
        command_id = new_id("cmd")
        if same_request is not None:
            command_id = "cmd_" + hashlib.sha256(same_request).hexdigest()[:32]
        return Envelope(command_id, int((time.time() + DEADLINE_S) * 1000), self.reply_queue, actor)

    def on_result(self, result: CommandResult) -> None:
        waiter = self._waiting.get(result.command_id)
        if waiter is None or waiter.done():
            log.info("command_answer_late", command_id=result.command_id)
            return
        waiter.set_result(result)

    async def call(self, queue: topology.Queue, command: Command) -> CommandResult:
        """Publish and wait. Raises `ApiError` 503 when no answer came; the command may then have run or not."""
        waiter: asyncio.Future[CommandResult] = asyncio.get_running_loop().create_future()
        if command.command_id in self._waiting:
            raise ApiError(
                409, "command_in_progress", "The same request is being carried out.", retry_after_s=RETRY_S
            )
        self._waiting[command.command_id] = waiter
        try:
            async with asyncio.timeout(DEADLINE_S):
                try:
                    await self._broker.publish(queue, command)
                except PublishUnknown as error:
                    log.warning("command_publish_unknown", command_id=command.command_id, error=str(error))
                return await waiter
        except (PublishRefused, Unroutable, Unavailable) as error:
            raise ApiError(
                503, "service_unavailable", "The message broker is not reachable.", retry_after_s=RETRY_S
            ) from error
        except TimeoutError as error:
            message = "The service that does this did not answer in time."
            raise ApiError(503, "service_unavailable", message, retry_after_s=RETRY_S) from error
        finally:
            del self._waiting[command.command_id]
