"""Tells submitters that their lines are kept, and what became of each. Level-triggered: the rows say what is to be told.

Told is what the broker has confirmed. A reply may go out twice, when this process dies before it has noted that: it
then has the same message id.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from services.batch.submission.provisioning import Credential
from services.batch.submission.tables import Acceptance, DueResult, SubmissionTables
from shared.inference.batch_output import output_line
from shared.inference.responses import encode
from shared.messages import MAX_MESSAGE_BYTES
from shared.outcomes import PublishRefused, Unavailable, Unroutable
from shared.queue_format import write_accepted, write_result
from shared.teams_broker import Answer, TeamsBroker

log = structlog.get_logger()

LOOK_S = 0.2
GROUP = 64
HOLD_S = 2.0
MAX_HOLD_S = 60.0
ENVELOPE_BYTES = 4096

T = TypeVar("T", Acceptance, DueResult)


@dataclass(slots=True)
class _Held:
    """A reply queue that did not take a reply: full, or not there. It is left alone for a while."""

    until_s: float
    pause_s: float


class Replies:
    """missing: told when a reply queue is not there."""

    def __init__(self, tables: SubmissionTables, missing: Callable[[], None]) -> None:
        self._tables, self._missing = tables, missing
        self._held: dict[str, _Held] = {}
        self._teams: dict[str, str] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There is something new to tell."""
        self._wake.set()

    def serve(self, credentials: Iterable[Credential]) -> None:
        """These are in force now."""
        self._teams = {each.names.replies(each.name).name: each.team_id for each in credentials}

    async def run(self, broker: TeamsBroker) -> None:
        while True:
            try:
                more = await self._tell(
                    broker, self._tables.acceptances, accepted, self._tables.mark_accepted
                )
                more |= await self._tell(broker, self._results, result, self._tables.mark_results)
                if more:
                    continue
            except Unavailable as error:
                log.warning("replies_held", error=str(error))
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _tell(
        self,
        broker: TeamsBroker,
        find: Callable[[Sequence[str], int], Awaitable[list[T]]],
        write: Callable[[T], Answer],
        mark: Callable[[Sequence[T]], Awaitable[None]],
    ) -> bool:
        """Publish a group and note what was taken; return whether there may be more. Raises `Unavailable`."""
        now_s = time.monotonic()
        held = [queue for queue, each in self._held.items() if each.until_s > now_s]
        found = await find(held, GROUP)
        taken = await asyncio.gather(*(self._publish(broker, write(each)) for each in found))
        told = [each for each, was_taken in zip(found, taken, strict=True) if was_taken]
        if told:
            await mark(told)
        return len(found) == GROUP

    async def _results(self, held: Sequence[str], limit: int) -> list[DueResult]:
        teams = {team for queue, team in self._teams.items() if queue not in held}
        return await self._tables.results(sorted(teams), held, limit)

    async def _publish(self, broker: TeamsBroker, answer: Answer) -> bool:
        try:
            await broker.publish(answer)
        except (PublishRefused, Unroutable, Unavailable) as error:
            if self._hold(answer.queue, error) and isinstance(error, Unroutable):
                self._missing()
            return False
        self._held.pop(answer.queue, None)
        return True

    def _hold(self, queue: str, error: Exception) -> bool:
        """Leave the queue alone for a while; return whether that is news: another reply of its group may have said so."""
        now_s, held = time.monotonic(), self._held.get(queue)
        if held is not None and held.until_s > now_s:
            return False
        if held is None or isinstance(
            error, Unavailable
        ):  # the broker is away, which says nothing of the queue
            pause_s = HOLD_S
        else:
            pause_s = min(held.pause_s * 2, MAX_HOLD_S)
        self._held[queue] = _Held(now_s + pause_s, pause_s)
        log.warning("reply_queue_held", queue=queue, reason=type(error).__name__, pause_s=pause_s)
        return True


def accepted(each: Acceptance) -> Answer:
    return Answer(
        queue=each.reply_queue,
        kind="accepted",
        body=write_accepted(each.submission_id, each.batch_id, each.first_line, each.lines),
        message_id=f"accepted_{each.batch_id}_{each.first_line}",
        correlation_id=each.submission_id,
    )


def result(each: DueResult) -> Answer:
    line = output_line(each.custom_id, each.state, each.request_id, each.status_code, each.response)
    if len(line) > MAX_MESSAGE_BYTES - ENVELOPE_BYTES:
        message = f"The result is too large for a message: GET /v1/batches/{each.batch_id}/results has it."
        error = {"code": "result_too_large", "message": message}
        line = encode({"id": "", "custom_id": each.custom_id, "response": None, "error": error})
    return Answer(
        queue=each.reply_queue,
        kind="result",
        body=write_result(each.submission_id, each.batch_id, each.line, line),
        message_id=f"result_{each.batch_id}_{each.line}",
        correlation_id=each.submission_id,
    )
