"""Messages for the same queue that are put down in one pass of the event loop leave together."""

from __future__ import annotations

import asyncio

import structlog

from shared.broker import Broker
from shared.messages import Message
from shared.outcomes import Unavailable

log = structlog.get_logger()


class Gathering:
    """For transient messages whose senders learn from silence that one is lost, and for queues that are read without acks."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiting: dict[str, list[Message]] = {}
        self._wake = asyncio.Event()

    def put(self, queue: str, message: Message) -> None:
        self._waiting.setdefault(queue, []).append(message)
        self._wake.set()

    async def run(self) -> None:
        """Send until cancelled; what cannot be sent is lost."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            waiting, self._waiting = self._waiting, {}
            for queue, messages in waiting.items():
                try:
                    await self._broker.send(queue, *messages)
                except Unavailable as error:
                    log.info("messages_not_sent", queue=queue, count=len(messages), error=str(error))
