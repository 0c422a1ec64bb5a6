"""SQL on the credentials of the teams' vhost, and the commands that change them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import asyncpg

from services.batch.store import READ_TIMEOUT_S, Store
from services.batch.submission.provisioning import PREFIX, Credential
from shared.database import Connection, Database
from shared.ids import new_id
from shared.messages import (
    CommandResult,
    CreateQueueCredential,
    QueueCredentialCommand,
    RevokeQueueCredential,
    RotateQueueCredential,
)

CREDENTIALS_PER_TEAM = 10
_PREFIX = PREFIX.removesuffix("_")
_TAG_BYTES = 12


class Credentials:
    def __init__(self, database: Database, store: Store) -> None:
        self._database, self._store = database, store

    async def run(self, connection: Connection, command: QueueCredentialCommand) -> CommandResult:
        """Carry out a command in the caller's transaction; the broker follows."""
        match command:
            case CreateQueueCredential():
                return await self._create(connection, command)
            case RotateQueueCredential():
                done = await connection.execute(
                    "UPDATE batch.queue_credentials SET password_hash = $3, rotated_at = now(), applied_at = NULL"
                    " WHERE team_id = $1 AND credential_id = $2 AND revoked_at IS NULL",
                    command.team_id,
                    command.credential_id,
                    command.password_hash,
                )
            case RevokeQueueCredential():
                done = await connection.execute(
                    "UPDATE batch.queue_credentials SET revoked_at = now()"
                    " WHERE team_id = $1 AND credential_id = $2 AND revoked_at IS NULL",
                    command.team_id,
                    command.credential_id,
                )
        if done != "UPDATE 1":
            return _no(command, "not_found", "")
        return _yes(command, command.credential_id)

    async def _create(self, connection: Connection, command: CreateQueueCredential) -> CommandResult:
        await connection.execute(
            "INSERT INTO batch.queue_teams (team_id, tag) VALUES ($1, $2) ON CONFLICT (team_id) DO NOTHING",
            command.team_id,
            secrets.token_hex(_TAG_BYTES),
        )
        # Whoever makes another one for this team waits here.
        await connection.execute(
            "SELECT 1 FROM batch.queue_teams WHERE team_id = $1 FOR UPDATE", command.team_id
        )
        held = await connection.fetchval(
            "SELECT count(*) FROM batch.queue_credentials WHERE team_id = $1 AND gone_at IS NULL",
            command.team_id,
        )
        if held >= CREDENTIALS_PER_TEAM:
            message = (
                f"A team has at most {CREDENTIALS_PER_TEAM} credentials for the queue; revoke one first."
            )
            return _no(command, "too_many_queue_credentials", message)
        credential_id = new_id(_PREFIX)
        added = await connection.fetchval(
            "INSERT INTO batch.queue_credentials (credential_id, team_id, key_id, name, password_hash)"
            " VALUES ($1, $2, $3, $4, $5) ON CONFLICT (team_id, name) WHERE gone_at IS NULL DO NOTHING"
            " RETURNING credential_id",
            credential_id,
            command.team_id,
            command.key_id,
            command.name,
            command.password_hash,
        )
        if added is None:
            return _no(command, "name_taken", "The team has credentials of this name.")
        return _yes(command, credential_id)

    async def all(self) -> list[Credential]:
        """All that the broker has or should have."""
        rows = await self._database.fetch(
            "SELECT c.credential_id, c.team_id, c.key_id, c.name, c.password_hash, t.tag,"
            " c.revoked_at IS NOT NULL AS is_revoked, c.applied_at IS NOT NULL AS is_applied"
            " FROM batch.queue_credentials c JOIN batch.queue_teams t USING (team_id)"
            " WHERE c.gone_at IS NULL ORDER BY c.credential_id",
            timeout_s=READ_TIMEOUT_S,
        )
        return [_credential(row) for row in rows]

    async def mark(self, applied: Sequence[Credential], gone: Sequence[Credential]) -> None:
        """Note what the broker has now, with which password, and what it has no more."""
        async with self._store.writing() as connection:
            await connection.execute(
                "UPDATE batch.queue_credentials AS c SET applied_at = now()"
                " FROM unnest($1::text[], $2::text[]) AS g(credential_id, password_hash)"
                " WHERE c.credential_id = g.credential_id AND c.password_hash = g.password_hash AND c.revoked_at IS NULL",
                [each.credential_id for each in applied],
                [each.password_hash for each in applied],
            )
            await connection.execute(
                "UPDATE batch.queue_credentials SET gone_at = now() WHERE credential_id = ANY($1) AND gone_at IS NULL",
                [each.credential_id for each in gone],
            )


def _credential(row: asyncpg.Record) -> Credential:
    return Credential(**dict(row))


def _yes(command: QueueCredentialCommand, credential_id: str) -> CommandResult:
    return CommandResult(command_id=command.command_id, ok=True, body={"credential_id": credential_id})


def _no(command: QueueCredentialCommand, code: str, message: str) -> CommandResult:
    return CommandResult(command_id=command.command_id, ok=False, code=code, message=message)
