"""Messages that travel in one body, and what is gathered to travel so."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from shared import messages
from shared.broker import Broker
from shared.gathering import Gathering
from shared.messages import CancelJob, Message, WorkerCommand, encode, encode_together, together_decoder
from shared.outcomes import Unavailable


def cancel(number: int) -> CancelJob:
    return CancelJob(job_id=f"job_{number}", attempt=1, reason="client_gone")


class RecordingBroker:
    def __init__(self) -> None:
        self.sent: list[tuple[str, tuple[Message, ...]]] = []
        self.is_away = False

    async def send(self, queue: str, *together: Message) -> None:
        if self.is_away:
            raise Unavailable("not connected")
        self.sent.append((queue, together))


def test_one_message_alone_has_the_body_that_it_always_had() -> None:
    assert encode_together([cancel(1)]) == [encode(cancel(1))]


def test_bodies_are_cut_by_size_and_hold_every_message_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "TOGETHER_BYTES", 2 * len(encode(cancel(1))) + 10)
    bodies = encode_together([cancel(number) for number in range(5)])
    assert len(bodies) == 3
    decode: Any = together_decoder(WorkerCommand).decode
    found: list[Message] = []
    for body in bodies:
        one_or_more = decode(body)
        found += one_or_more if isinstance(one_or_more, list) else [one_or_more]
    assert found == [cancel(number) for number in range(5)]


async def test_what_is_put_down_in_one_pass_leaves_together_by_queue() -> None:
    broker = RecordingBroker()
    gathering = Gathering(cast(Broker, broker))
    running = asyncio.create_task(gathering.run())
    for number in range(3):
        gathering.put("a", cancel(number))
    gathering.put("b", cancel(3))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert broker.sent == [("a", (cancel(0), cancel(1), cancel(2))), ("b", (cancel(3),))]
    running.cancel()


async def test_what_cannot_be_sent_is_lost_and_what_follows_is_sent() -> None:
    broker = RecordingBroker()
    gathering = Gathering(cast(Broker, broker))
    running = asyncio.create_task(gathering.run())
    broker.is_away = True
    gathering.put("a", cancel(1))
    for _ in range(3):
        await asyncio.sleep(0)
    broker.is_away = False
    gathering.put("a", cancel(2))
    for _ in range(3):
        await asyncio.sleep(0)
    assert broker.sent == [("a", (cancel(2),))]
    running.cancel()
