"""Makes the broker agree with the table of credentials: vhost, users, rights, limits, exchanges and queues.

Level-triggered: each round compares all of it, so that a broker that lost its data is set up again. Passwords are not
known here, only what the broker keeps of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from urllib.parse import unquote, urlsplit

import structlog

from services.batch.submission.credentials import Credentials
from services.batch.submission.management import ManagementApi
from services.batch.submission.provisioning import Credential, plan
from shared import topology
from shared.amqp_url import in_vhost
from shared.outcomes import Unavailable
from shared.teams_broker import TeamsBroker
from shared.topology import Rights

log = structlog.get_logger()

LOOK_S = 15.0
RETRY_S = 1.0
DECLARE_AGAIN_S = 30.0
"""Queues that somebody deleted by hand are there again after this."""


class Provisioner:
    """changed: told all credentials that are in force, whenever a round is over."""

    def __init__(
        self,
        credentials: Credentials,
        api: ManagementApi,
        amqp_url: str,
        vhost: str,
        stack: AsyncExitStack,
        changed: Callable[[TeamsBroker, Sequence[Credential]], None],
    ) -> None:
        self._credentials, self._api = credentials, api
        self._amqp_url, self._vhost = amqp_url, vhost
        self._stack, self._changed = stack, changed
        self._broker: TeamsBroker | None = None
        self._declared: set[tuple[str, str]] = set()
        self._declared_s = 0.0
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """The table has changed."""
        self._wake.set()

    def declare_again(self) -> None:
        """A queue that was declared is not there: somebody deleted it by hand."""
        self._declared.clear()
        self._wake.set()

    async def run(self) -> None:
        while True:
            pause_s = LOOK_S
            try:
                await self._round()
            except Unavailable as error:
                log.warning("teams_vhost_not_set_up", error=str(error))
                pause_s = RETRY_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _round(self) -> None:
        broker = await self._set_up()
        credentials = await self._credentials.all()
        in_force = [each for each in credentials if not each.is_revoked]
        await self._declare(broker, in_force)
        changes = plan(credentials, await self._api.users(), await self._api.rights(self._vhost))
        for name in changes.delete:
            await self._api.delete_user(name)
            log.info("queue_user_deleted", user=name)
        for each in changes.make:
            await self._make(each)
        for each in changes.allow:
            await self._api.put_rights(self._vhost, each.credential_id, each.rights)
        gone = [each for each in credentials if each.is_revoked]
        for each in gone:
            await broker.delete(each.names.replies(each.name))
            self._declared.discard((each.tag, each.name))
        applied = [each for each in in_force if not each.is_applied]
        if applied or gone:
            await self._credentials.mark(applied, gone)
        self._changed(broker, in_force)

    async def _set_up(self) -> TeamsBroker:
        """The vhost with our own rights and its limits, and connections to it."""
        if await self._api.make_vhost(self._vhost) or self._broker is None:
            own = unquote(urlsplit(self._amqp_url).username or "guest")
            await self._api.put_rights(self._vhost, own, Rights(".*", ".*", ".*"))
            await self._api.limit_vhost(self._vhost, "max-connections", topology.TEAMS_MAX_CONNECTIONS)
            self._declared.clear()
        if self._broker is None:
            url = in_vhost(self._amqp_url, self._vhost)
            self._broker = await TeamsBroker.open(url, "batch", self._stack)
        return self._broker

    async def _declare(self, broker: TeamsBroker, credentials: Sequence[Credential]) -> None:
        now_s = time.monotonic()
        if now_s - self._declared_s > DECLARE_AGAIN_S:
            self._declared.clear()
            self._declared_s = now_s
        for each in credentials:
            if (each.tag, each.name) not in self._declared:
                await broker.declare(each.names, [each.name])
                self._declared.add((each.tag, each.name))

    async def _make(self, credential: Credential) -> None:
        name = credential.credential_id
        await self._api.delete_user(name)
        await self._api.put_user(name, credential.password_hash)
        await self._api.limit_user(name, "max-connections", topology.TEAM_MAX_CONNECTIONS)
        await self._api.limit_user(name, "max-channels", topology.TEAM_MAX_CHANNELS)
        # Last: a user without rights can do nothing yet.
        await self._api.put_rights(self._vhost, name, credential.rights)
        log.info("queue_user_made", user=name, team_id=credential.team_id)
