"""Puts the parts of submission through the broker together, if its management API is given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import structlog

from services.batch.settings import BatchSettings
from services.batch.store import Store
from services.batch.submission.credentials import Credentials
from services.batch.submission.intake import Intake, Quota
from services.batch.submission.management import ManagementApi
from services.batch.submission.provisioner import Provisioner
from services.batch.submission.provisioning import Credential
from services.batch.submission.replies import Replies
from services.batch.submission.tables import SubmissionTables
from services.batch.views import Views
from shared.database import Connection, Database
from shared.messages import CommandResult, QueueCredentialCommand
from shared.outcomes import Unavailable
from shared.teams_broker import TeamsBroker

log = structlog.get_logger()

SWEEP_S = 600.0
SWEEP_GROUP = 1000


class _Parts:
    def __init__(
        self,
        credentials: Credentials,
        tables: SubmissionTables,
        provisioner: Provisioner,
        intake: Intake,
        replies: Replies,
    ) -> None:
        self.credentials, self.tables, self.provisioner = credentials, tables, provisioner
        self.intake, self.replies = intake, replies


class SubmissionDoor:
    """`commands` is None where batches come by HTTP alone."""

    def __init__(self) -> None:
        self._parts: _Parts | None = None
        self._group: asyncio.TaskGroup | None = None
        self._replying: asyncio.Task[None] | None = None
        self._has_news = False

    @classmethod
    async def open(
        cls,
        settings: BatchSettings,
        database: Database,
        store: Store,
        tables: SubmissionTables,
        views: Views,
        kept: Callable[[str], None],
        stack: AsyncExitStack,
    ) -> SubmissionDoor:
        """kept: told the batch that has new lines."""
        door = cls()
        if settings.amqp_management_url is None:
            return door
        quota = Quota(
            open_lines=settings.queue_lines_per_team,
            open_bytes=settings.queue_bytes_per_team,
            open_batches=settings.open_per_team,
        )
        credentials = Credentials(database, store)
        api = await ManagementApi.open(settings.amqp_management_url, stack)
        provisioner = Provisioner(
            credentials, api, settings.amqp_url, settings.teams_vhost, stack, door._changed
        )
        replies = Replies(tables, provisioner.declare_again)

        def has_lines(batch_id: str) -> None:
            replies.wake()
            kept(batch_id)

        intake = Intake(store, tables, views, quota, has_lines)
        door._parts = _Parts(credentials, tables, provisioner, intake, replies)
        return door

    @property
    def commands(self) -> SubmissionDoor | None:
        return None if self._parts is None else self

    async def run(self, connection: Connection, command: QueueCredentialCommand) -> CommandResult:
        """Carry out a command on credentials, in the caller's transaction."""
        assert self._parts is not None
        self._has_news = True
        return await self._parts.credentials.run(connection, command)

    def wake(self) -> None:
        """The transaction of a command is over."""
        if self._has_news and self._parts is not None:
            self._has_news = False
            self._parts.provisioner.wake()

    def start(self, group: asyncio.TaskGroup) -> None:
        """For the leader: end with the group."""
        if self._parts is not None:
            self._group = group
            group.create_task(self._parts.provisioner.run())
            group.create_task(_sweep(self._parts.tables))

    def _changed(self, broker: TeamsBroker, credentials: Sequence[Credential]) -> None:
        assert self._parts is not None and self._group is not None
        self._parts.replies.serve(credentials)
        if self._replying is None:
            self._replying = self._group.create_task(self._parts.replies.run(broker))
        self._parts.intake.serve(self._group, broker, credentials)


async def _sweep(tables: SubmissionTables) -> None:
    while True:
        try:
            while await tables.sweep(SWEEP_GROUP):
                pass
        except Unavailable as error:
            log.warning("submissions_not_swept", error=str(error))
        await asyncio.sleep(SWEEP_S)
