"""A team at the queue, for tests: credentials made over HTTP, messages published and answers read with them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aio_pika
import aio_pika.abc

from loadtest.stack import Stack
from shared.amqp_url import with_user

PATH = "/api/queue-credentials"
CHAT = "/v1/chat/completions"


def ask(stack: Stack, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(stack.base_url + path, method=method, data=data)
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {key or stack.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def make(stack: Stack, name: str, team: str | None = None) -> dict[str, Any]:
    """Credentials of the stack's team, or of another one by its slug; ready to be used."""
    key = None if team is None else stack._environment["ROUNDHOUSE_ADMIN_KEY"]
    of_team = "" if team is None else f"?team={team}"
    status, made = ask(stack, "POST", PATH + of_team, {"name": name}, key)
    assert status == 201, made
    deadline_s = time.monotonic() + 60
    while not made["ready"]:  # a busy broker takes longer than the gateway waits for it
        assert time.monotonic() < deadline_s, made
        time.sleep(0.2)
        _, shown = ask(stack, "GET", f"{PATH}/{made['credential_id']}{of_team}", None, key)
        made["ready"] = shown["ready"]
    return dict(made)


def url_of(credential: dict[str, Any]) -> str:
    return with_user(credential["url"], credential["username"], credential["secret"])


def chat_line(stack: Stack, custom_id: str, max_tokens: int = 4, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Question {custom_id}?"}]
    body = {"model": stack.model, "messages": messages, "max_tokens": max_tokens, **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def submission(submission_id: str, lines: list[dict[str, Any]], **more: Any) -> bytes:
    return json.dumps({"version": 1, "id": submission_id, "lines": lines, **more}).encode()


@dataclass(slots=True)
class Answers:
    """What came on a reply queue: bodies by AMQP message id. `copies` counts those that came again."""

    by_id: dict[str, dict[str, Any]] = field(default_factory=dict)
    copies: int = 0

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.by_id.values() if each["type"] == kind]

    def add(self, raw: aio_pika.abc.AbstractIncomingMessage) -> None:
        body = json.loads(raw.body)
        assert raw.message_id is not None and raw.type == body["type"]
        if raw.message_id in self.by_id:
            self.copies += 1
            assert self.by_id[raw.message_id] == body, "told again, it is the same"
        self.by_id[raw.message_id] = body


class Session:
    """One connection of a team's."""

    def __init__(self, credential: dict[str, Any], channel: aio_pika.abc.AbstractChannel) -> None:
        self.credential, self._channel = credential, channel

    async def publish(self, body: bytes, *, reply_to: str | None = "own", **properties: Any) -> None:
        """Publish and wait for the broker's confirm; raises what aio_pika raises."""
        exchange = await self._channel.get_exchange(self.credential["exchange"], ensure=False)
        if reply_to == "own":
            reply_to = self.credential["reply_queue"]
        message = aio_pika.Message(
            body, reply_to=reply_to, delivery_mode=aio_pika.DeliveryMode.PERSISTENT, **properties
        )
        await exchange.publish(message, "", mandatory=True, timeout=20)

    async def read(
        self, until: Callable[[Answers], bool], *, queue: str | None = None, limit_s: float = 40.0
    ) -> Answers:
        """Take and ack answers until there is what is waited for."""
        answers = Answers()
        source = await self._channel.get_queue(queue or self.credential["reply_queue"], ensure=False)
        deadline_s = time.monotonic() + limit_s
        while not until(answers):
            raw = await source.get(fail=False, timeout=10)
            if raw is None:
                assert time.monotonic() < deadline_s, (answers.of("refused"), sorted(answers.by_id))
                await asyncio.sleep(0.05)
                continue
            answers.add(raw)
            await raw.ack()
        return answers


@contextlib.asynccontextmanager
async def session(credential: dict[str, Any]) -> AsyncIterator[Session]:
    connection = await aio_pika.connect(url_of(credential), timeout=10)
    async with connection:
        yield Session(credential, await connection.channel(publisher_confirms=True, on_return_raises=True))
