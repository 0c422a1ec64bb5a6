"""The dead-letter queue: what failed for good is kept for an operator, and whoever waits for a job is told.

It does not go through `Broker.consume`, which would bury again what cannot be decoded or handled: here, for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import asyncpg
import msgspec
import structlog

from shared import telemetry, topology
from shared.broker import Broker, Delivery
from shared.database import Database
from shared.messages import JobFinished, JobQueueMessage, decoder
from shared.outcomes import Unavailable

log = structlog.get_logger()

PREFETCH = 8
RETRY_S = 1.0
MAX_KEPT_BODY_BYTES = 64 * 1024
_JOB_TYPES = frozenset(kind.__struct_config__.tag for kind in get_args(JobQueueMessage))
_decode_job = decoder(JobQueueMessage).decode
MONEY_PREFIXES = ("usage.", "payment.")
"""Types whose bodies are kept: facts about money, without any text of a team."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What is kept. Never a prompt: of jobs the ids only."""

    queue: str
    reason: str
    message_type: str
    job: JobQueueMessage | None
    body: bytes | None


def read_dead_letter(body: bytes, message_type: str, headers: Mapping[str, Any]) -> DeadLetter:
    """Make the most of a dead message; anything at all can be in one. Pure."""
    job = None
    if message_type in _JOB_TYPES:
        try:
            job = _decode_job(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            job = None
    queue, reason = _origin(headers)
    is_money = message_type.startswith(MONEY_PREFIXES)
    return DeadLetter(
        queue=_text(queue),
        reason=_text(reason),
        message_type=_text(message_type) or "unknown",
        job=job,
        body=body[:MAX_KEPT_BODY_BYTES] if is_money else None,
    )


def _origin(headers: Mapping[str, Any]) -> tuple[Any, Any]:
    """(queue, reason): from our own headers, or from the broker's when it dead-lettered the message itself."""
    if "x-dead-reason" in headers:
        return headers.get("x-dead-from", ""), headers["x-dead-reason"]
    deaths = headers.get("x-death")
    first = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict) else {}
    return first.get("queue", ""), first.get("reason", "")


def _text(value: Any) -> str:
    text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
    return "".join(character if character.isprintable() else " " for character in text[:500])


class DeadLetterKeeper:
    def __init__(self, broker: Broker, database: Database) -> None:
        self._broker = broker
        self._database = database
        self._kept = telemetry.meter().create_counter(
            telemetry.DEAD_LETTERS, description="Messages that failed for good, by kind: job, fact, other"
        )

    async def run(self) -> None:
        """Keep dead letters until cancelled. One that is stored and not acked in time is stored again."""
        waiting: asyncio.Queue[Delivery] = asyncio.Queue()
        subscription = await self._broker.subscribe(
            topology.DEAD, None, waiting.put_nowait, prefetch=PREFETCH
        )
        try:
            while True:
                delivery = await waiting.get()
                await self._keep(delivery)
                await delivery.ack()
        finally:
            await asyncio.shield(subscription.cancel())

    async def _keep(self, delivery: Delivery) -> None:
        letter = read_dead_letter(delivery.message, delivery.message_type, delivery.headers)
        while True:
            try:
                await self._store(letter)
                break
            except Unavailable as error:
                log.warning("dead_letter_waits", error=str(error))
                await asyncio.sleep(RETRY_S)
        # Type and reason may be anyone's text, which must not become a label.
        known = "fact" if letter.body is not None else "other"
        self._kept.add(1, {"kind": "job" if letter.job is not None else known})
        log.error(
            "dead_letter_kept",
            queue=letter.queue,
            reason=letter.reason,
            message_type=letter.message_type,
            job_id=letter.job.job_id if letter.job is not None else None,
        )
        if letter.job is not None:
            await self._tell_owner(letter.job)

    async def _store(self, letter: DeadLetter) -> None:
        job_id, team_id = (letter.job.job_id, letter.job.team_id) if letter.job is not None else (None, None)
        async with self._database.transaction() as connection:
            try:
                async with connection.transaction():
                    await _insert(connection, letter, job_id, team_id)
            except asyncpg.DataError:
                # Ids that no column can hold: the rest is still worth keeping.
                log.exception("dead_letter_ids_refused")
                await _insert(connection, letter, None, None)

    async def _tell_owner(self, job: JobQueueMessage) -> None:
        finished = JobFinished(
            job_id=job.job_id,
            attempt=0,
            worker_id="",
            outcome="failed",
            error_code="dead_letter",
            error_message="the job could not be handled",
        )
        try:
            await self._broker.send(job.owner_queue, finished)
        except Unavailable as error:
            # The owner gives the job up at its deadline by itself.
            log.warning("owner_not_told", job_id=job.job_id, error=str(error))


async def _insert(connection: Any, letter: DeadLetter, job_id: str | None, team_id: str | None) -> None:
    await connection.execute(
        """INSERT INTO scheduler.dead_letters (queue, reason, message_type, job_id, team_id, body)
           VALUES ($1, $2, $3, $4, $5, $6)""",
        letter.queue,
        letter.reason,
        letter.message_type,
        job_id,
        team_id,
        letter.body,
    )
