"""Takes what teams publish: keeps the lines as those of a batch, or refuses, and only then acks.

A message that comes twice, since its ack was lost or its sender did not know, is one submission: its id says so. What
was kept is told by `replies.py`; a refusal is told here, as nothing is kept of it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import structlog

from services.batch.routing import Waiting, choose_line_route
from services.batch.store import Store
from services.batch.submission.judging import Judged, Team, judge
from services.batch.submission.provisioning import Credential
from services.batch.submission.tables import SubmissionTables
from services.batch.views import Views
from shared.broker import Subscription
from shared.database import Connection
from shared.inference.principal import ModelView
from shared.lease import Fenced
from shared.outcomes import PublishRefused, Unavailable, Unroutable
from shared.queue_format import Refusal, write_refused
from shared.teams_broker import Answer, RawDelivery, TeamsBroker

log = structlog.get_logger()

PREFETCH = 4
"""Messages of a team that are in this process at once."""
RETRY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Of one team's lines that came through the queue and are not over."""

    open_lines: int = 50_000
    open_bytes: int = 200 * 1024 * 1024
    open_batches: int = 50


@dataclass(slots=True)
class _Served:
    """A team whose messages are taken. `team` changes with its users."""

    team: Team
    task: asyncio.Task[None]
    waiting: asyncio.Queue[RawDelivery] = field(default_factory=asyncio.Queue)


class Intake:
    """kept: told the batch that has new lines, after they are committed."""

    def __init__(
        self, store: Store, tables: SubmissionTables, views: Views, quota: Quota, kept: Callable[[str], None]
    ) -> None:
        self._store, self._tables, self._views = store, tables, views
        self._quota, self._kept = quota, kept
        self._served: dict[str, _Served] = {}

    def serve(self, group: asyncio.TaskGroup, broker: TeamsBroker, credentials: Sequence[Credential]) -> None:
        """Take the messages of exactly these teams from now on."""
        teams = teams_of(credentials)
        for tag in self._served.keys() - teams.keys():
            self._served.pop(tag).task.cancel()
        for tag, team in teams.items():
            served = self._served.get(tag)
            if served is None or served.task.done():
                self._served[tag] = _Served(team, group.create_task(self._serve(broker, tag)))
            else:
                served.team = team

    async def _serve(self, broker: TeamsBroker, tag: str) -> None:
        served = self._served[tag]
        subscription: Subscription | None = None
        try:
            while subscription is None:
                try:
                    subscription = await broker.subscribe(
                        served.team.names.submissions, served.waiting.put_nowait, prefetch=PREFETCH
                    )
                except Unavailable as error:
                    log.warning("submissions_not_taken", tag=tag, error=str(error))
                    await asyncio.sleep(RETRY_S)
            while True:
                await self._settle(broker, served, await served.waiting.get())
        finally:
            if subscription is not None:
                await asyncio.shield(subscription.close())

    async def _settle(self, broker: TeamsBroker, served: _Served, raw: RawDelivery) -> None:
        """Keep or refuse one message, however long it takes; then ack it."""
        while True:
            try:
                refusal = await self._take(raw, served.team)
                if refusal is not None:
                    await _refuse(broker, served.team, raw, refusal)
                break
            except Unavailable as error:
                log.warning("submission_held", tag=served.team.tag, error=str(error))
                await asyncio.sleep(RETRY_S)
        await raw.ack()

    async def _take(self, raw: RawDelivery, team: Team) -> Refusal | None:
        """Return why nothing of the message was kept, or None. Raises `Unavailable`."""
        try:
            judged = judge(raw.body, raw.reply_to, team)
            return judged if isinstance(judged, Refusal) else await self._keep(judged)
        except (Unavailable, Fenced):
            raise
        except Exception:
            # Trying it again and again would keep the team's other messages waiting for ever.
            log.exception("submission_failed", tag=team.tag)
            return Refusal("internal_error", "The message could not be handled; nothing of it was kept.")

    async def _keep(self, judged: Judged) -> Refusal | None:
        if await self._views.is_suspended(judged.user.team_id):
            return Refusal("team_suspended", "The team is suspended.", judged.submission.id)
        model = await self._views.find_model(judged.user.team_id, judged.model)
        async with self._store.writing() as connection:
            found = await self._keep_in(connection, judged, model)
        if isinstance(found, Refusal):
            return found
        self._kept(found)
        return None

    async def _keep_in(
        self, connection: Connection, judged: Judged, model: ModelView | None
    ) -> Refusal | str:
        """Return the batch that has the lines.

        1. An id that is known, with the same content -> told again; with another one -> id_reused.
        2. A model that is not there -> model_not_found; one that nothing could ever run -> no_resource.
        3. More lines or bytes than a team may have open -> over_quota.
        4. They join the batch that collects such lines, if there is one; else a new one begins, if the team may have it.
        """
        team_id, submission = judged.user.team_id, judged.submission
        known = await self._tables.find(connection, team_id, submission.id)
        if known is not None:  # 1
            if known.digest != judged.digest:
                return Refusal(
                    "id_reused", "The id was used for a message with another content.", submission.id
                )
            await self._tables.tell_again(connection, judged)
            return known.batch_id
        if model is None:  # 2
            message = "The model does not exist, or you do not have access to it."
            return Refusal("model_not_found", message, submission.id)
        route = choose_line_route(team_id, True, model.model_type, await self._views.resources(connection))
        if isinstance(route, Waiting) and route.missing:
            return Refusal("no_resource", f"{route.reason}.".capitalize(), submission.id)
        lines, size_bytes = await self._tables.load(connection, team_id)
        quota = self._quota
        if (
            lines + len(judged.lines) > quota.open_lines or size_bytes + judged.size_bytes > quota.open_bytes
        ):  # 3
            message = (
                f"A team has at most {quota.open_lines} lines and {quota.open_bytes} bytes that are not over."
            )
            return Refusal("over_quota", message, submission.id)
        batch = await self._tables.collecting(connection, judged, model)  # 4
        if batch is None:
            if await self._store.open_count(connection, team_id) >= quota.open_batches:
                message = f"A team has at most {quota.open_batches} batches that are not over."
                return Refusal("too_many_batches", message, submission.id)
            batch = await self._tables.begin_batch(connection, judged, model), 0
        await self._tables.add(connection, judged, *batch)
        return batch[0]


async def _refuse(broker: TeamsBroker, team: Team, raw: RawDelivery, refusal: Refusal) -> None:
    """Tell the sender: on its reply queue, if it is one of the team's and takes it, else where the team finds refusals.

    Raises `Unavailable`; twice is harmless, as it says the same under the same id.
    """
    log.info("submission_refused", tag=team.tag, code=refusal.code)
    queues = [team.names.refusals.name]
    if raw.reply_to is not None and raw.reply_to in team.users:
        queues.insert(0, raw.reply_to)
    digest = hashlib.sha256(raw.body + (raw.message_id or "").encode()).hexdigest()[:32]
    for queue in queues:
        answer = Answer(
            queue=queue,
            kind="refused",
            body=write_refused(refusal),
            message_id=f"refused_{digest}",
            correlation_id=raw.correlation_id or raw.message_id or refusal.id,
        )
        try:
            return await broker.publish(answer)
        except (PublishRefused, Unroutable) as error:
            log.warning("refusal_not_taken", queue=queue, error=type(error).__name__)
    raise Unavailable("no queue takes the refusal")


def teams_of(credentials: Iterable[Credential]) -> dict[str, Team]:
    """The teams behind the credentials, by tag, each with its users by reply queue. Pure."""
    users: dict[str, dict[str, Credential]] = {}
    for each in credentials:
        users.setdefault(each.tag, {})[each.names.replies(each.name).name] = each
    return {tag: Team(next(iter(of.values())).team_id, tag, of) for tag, of in users.items()}
