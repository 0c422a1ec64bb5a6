"""Clients that write down what they saw: the other side of every audit.

One request is one `ClientRecord`. A stream that was cut has no usage to read; its tokens are counted from the text that
came, which is possible because answers are greedy and their tokens known from a run without faults.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec

from loadtest.audit_snapshot import ClientRecord

REQUEST_LIMIT_S = 60.0


@dataclass(slots=True)
class Seen:
    """What came back for one request."""

    status: int | None = None
    request_id: str | None = None
    text: str = ""
    events: int = 0
    usage: dict[str, Any] | None = None
    error_code: str | None = None
    done: bool = False
    left: bool = False
    """The client went of its own will, in mid-answer."""


@dataclass
class RecordingClient:
    """A team's client; `records` grow with every request that ended, in whatever way."""

    base_url: str
    api_key: str
    team: str
    records: list[ClientRecord] = field(default_factory=list)

    async def complete(
        self,
        session: aiohttp.ClientSession,
        model: str,
        prompt: str,
        max_tokens: int,
        *,
        stream: bool,
        tokens: Sequence[str] = (),
        leave_after: int | None = None,
    ) -> tuple[ClientRecord, str]:
        """One greedy completion; returns its record and text. Never raises for what a server or a network does.

        tokens: the texts of the whole answer's tokens, to count those of a stream that is cut. leave_after: close the
        connection after so many events of a stream.
        """
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        started_unix_ms = time.time_ns() // 1_000_000
        seen = Seen()
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                await self._exchange(session, body, seen, stream=stream, leave_after=leave_after)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            seen.error_code = seen.error_code or type(error).__name__
        record = self._record(model, stream, started_unix_ms, seen, tokens)
        self.records.append(record)
        return record, seen.text

    async def spell(
        self, session: aiohttp.ClientSession, model: str, prompt: str, max_tokens: int
    ) -> list[str]:
        """The texts of a greedy answer's tokens. Raises `RuntimeError` unless there is one and they join to its text."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1}
        headers = {"Authorization": f"Bearer {self.api_key}"}
        async with session.post(f"{self.base_url}/v1/completions", json=body, headers=headers) as answer:
            if answer.status != 200:
                raise RuntimeError(f"no answer to learn from: {answer.status} {await answer.text()}")
            [choice] = (await answer.json())["choices"]
        tokens = list(choice["logprobs"]["tokens"])
        if "".join(tokens) != choice["text"]:
            raise RuntimeError("the answer's tokens do not join to its text: choose a prompt of plain words")
        return tokens

    async def _exchange(
        self,
        session: aiohttp.ClientSession,
        body: dict[str, Any],
        seen: Seen,
        *,
        stream: bool,
        leave_after: int | None,
    ) -> None:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        async with session.post(f"{self.base_url}/v1/completions", json=body, headers=headers) as answer:
            seen.status = answer.status
            seen.request_id = answer.headers.get("x-request-id")
            if not stream or answer.status != 200:
                payload = await answer.json()
                if answer.status == 200:
                    seen.text, seen.usage, seen.done = payload["choices"][0]["text"], payload["usage"], True
                else:
                    seen.error_code = payload["error"]["code"]
                return
            async for line in answer.content:
                if line.startswith(b"data: [DONE]"):
                    seen.done = True
                elif line.startswith(b"data: "):
                    _take_event(json.loads(line[6:]), seen)
                    if leave_after is not None and seen.events >= leave_after and seen.usage is None:
                        seen.left = True
                        answer.close()
                        return

    def _record(
        self, model: str, stream: bool, started_unix_ms: int, seen: Seen, tokens: Sequence[str]
    ) -> ClientRecord:
        answered = seen.done and seen.usage is not None
        refused = (
            seen.status is not None and (seen.status != 200 or seen.error_code is not None) and not answered
        )
        usage = seen.usage or {}
        return ClientRecord(
            request_id=seen.request_id,
            team=self.team,
            model=model,
            stream=stream,
            started_unix_ms=started_unix_ms,
            ended_unix_ms=time.time_ns() // 1_000_000,
            status=seen.status,
            outcome=_outcome(seen, answered=answered, refused=refused),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens") if answered else tokens_shown(seen.text, tokens),
            error_code=seen.error_code,
        )

    def write_log(self, path: Path) -> None:
        """Append all records as JSON lines."""
        with path.open("ab") as file:
            for record in self.records:
                file.write(msgspec.json.encode(record) + b"\n")


def _outcome(
    seen: Seen, *, answered: bool, refused: bool
) -> Literal["answered", "error", "cut", "cancelled_by_client"]:
    if seen.left:
        return "cancelled_by_client"
    if answered:
        return "answered"
    return "error" if refused and not seen.text else "cut"


def tokens_shown(text: str, tokens: Sequence[str]) -> int | None:
    """How many whole tokens a text shows, given those of the whole answer; None if they are not known. Pure.

    A text that is not a beginning of the answer shows those of the part that is: the rest is another finding.
    """
    if not tokens:
        return None
    chars = 0
    for count, token in enumerate(tokens):
        if not text.startswith(token, chars):
            return count
        chars += len(token)
    return len(tokens)


def _take_event(event: dict[str, Any], seen: Seen) -> None:
    if "error" in event:
        seen.error_code = event["error"]["code"]
        return
    seen.events += 1
    for choice in event["choices"]:
        seen.text += choice["text"]
    if event.get("usage"):
        seen.usage = event["usage"]
