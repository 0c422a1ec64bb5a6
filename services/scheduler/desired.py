"""SQL of commands: what teams want of their resources. Each is validated, done and answered in one transaction.

Commands write desired state only, so any scheduler may run them, leader or not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import msgspec

from services.scheduler import pin_commands
from services.scheduler.command_rules import problem_of
from services.scheduler.holds import set_until
from services.scheduler.quotas import set_quota, team_quota
from services.scheduler.refused import Refused
from services.scheduler.scaling_store import SettingsChanged, set_fixed, set_scaling
from shared.database import Connection, Database
from shared.ids import new_id
from shared.messages import (
    Command,
    CommandResult,
    CreateOption,
    CreateResource,
    DeleteResource,
    PinModel,
    PreloadModel,
    ScaleResource,
    SchedulerCommand,
    SetQuota,
    SetScaling,
    TurnOffResource,
    TurnOnResource,
    UnpinModel,
)

RESOURCES_PER_TEAM = 100
"""Each resource has queues of its own on the broker, up to nine of them."""

DeclareQueues = Callable[[str, bool], Awaitable[None]]
"""Declare the job queues of (resource_id, pool). Raises `Unavailable`."""


class Desired:
    """The commands' tables."""

    def __init__(self, database: Database, declare_queues: DeclareQueues) -> None:
        self._database = database
        self._declare_queues = declare_queues

    async def run(self, command: SchedulerCommand) -> CommandResult:
        """Do the command once; a repeated one gets the same answer and changes nothing. Raises `Unavailable`."""
        async with self._database.transaction() as connection:
            earlier = await self._claim(connection, command)
            if earlier is not None:
                return earlier
            result = await self._result(connection, command)
            await connection.execute(
                "UPDATE scheduler.command_results SET result = $2 WHERE command_id = $1",
                command.command_id,
                msgspec.json.encode(result).decode(),
            )
        return result

    async def _claim(self, connection: Connection, command: Command) -> CommandResult | None:
        """Make the command ours, or return what came of it before. Waits for another scheduler that has it."""
        claimed = await connection.fetchval(
            """INSERT INTO scheduler.command_results (command_id, result) VALUES ($1, '{}')
               ON CONFLICT DO NOTHING RETURNING command_id""",
            command.command_id,
        )
        if claimed is not None:
            return None
        stored = await connection.fetchval(
            "SELECT result FROM scheduler.command_results WHERE command_id = $1", command.command_id
        )
        return msgspec.json.decode(stored, type=CommandResult)

    async def _result(self, connection: Connection, command: SchedulerCommand) -> CommandResult:
        problem = problem_of(command)
        if problem is not None:
            return CommandResult(
                command_id=command.command_id, ok=False, code="invalid_value", message=problem
            )
        try:
            async with (
                connection.transaction()
            ):  # a savepoint: a refusal is stored, its half-done effect is not
                body = await self._effect(connection, command)
        except Refused as refused:
            return CommandResult(
                command_id=command.command_id, ok=False, code=refused.code, message=refused.message
            )
        return CommandResult(command_id=command.command_id, ok=True, body=body)

    async def _effect(self, connection: Connection, command: SchedulerCommand) -> dict[str, Any]:
        match command:
            case CreateOption():
                return await _create_option(connection, command)
            case CreateResource():
                return await self._create_resource(connection, command)
            case SetQuota():
                await set_quota(connection, command)
                return {"scope": command.scope}
            case ScaleResource():
                await _lock(connection, command.team_id, command.resource_id)
                await _check_quota(connection, command.team_id, command.fixed_count)
                await set_fixed(connection, command)
                await _note(connection, command.resource_id, "scaled", f"to {command.fixed_count}", command)
            case SetScaling():
                await _lock(connection, command.team_id, command.resource_id)
                most = max([command.max_count, *(window.max_count for window in command.windows)])
                await _check_quota(connection, command.team_id, most)
                try:
                    words = await set_scaling(connection, command)
                except SettingsChanged as error:
                    message = "the scaling settings were changed since you read them"
                    raise Refused("precondition_failed", message) from error
                await _note(connection, command.resource_id, "scaled", words, command)
            case TurnOnResource():
                await _want(connection, command, "on")
            case TurnOffResource():
                await _want(connection, command, "off")
            case DeleteResource():
                await _delete(connection, command)
            case PinModel() | UnpinModel() | PreloadModel():
                await _wish(connection, command)
        return {"resource_id": command.resource_id}

    async def _create_resource(self, connection: Connection, command: CreateResource) -> dict[str, Any]:
        option_type = await connection.fetchval(
            "SELECT model_type FROM scheduler.performance_options WHERE option_id = $1", command.option_id
        )
        if option_type is None:
            raise Refused("option_not_found", f"there is no performance option {command.option_id}")
        if option_type != command.model_type:
            raise Refused(
                "model_type_mismatch", f"the option is for model type {option_type}, not {command.model_type}"
            )
        await _check_quota(connection, command.team_id, command.fixed_count)
        # So that two schedulers do not both give the last place.
        await connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('scheduler resources of ' || $1, 0))",
            command.team_id,
        )
        held = await connection.fetchval(
            "SELECT count(*) FROM scheduler.resources WHERE team_id = $1 AND deleted_at IS NULL",
            command.team_id,
        )
        if held >= RESOURCES_PER_TEAM:
            raise Refused(
                "too_many_resources", f"a team may have {RESOURCES_PER_TEAM} resources; delete one first"
            )
        resource_id = new_id("res")
        try:
            await connection.execute(
                """INSERT INTO scheduler.resources
                       (resource_id, team_id, name, model_type, option_id, pool, fixed_count, takes_traffic)
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8)""",
                resource_id,
                command.team_id,
                command.name,
                command.model_type,
                command.option_id,
                command.pool,
                command.fixed_count,
                command.takes_traffic,
            )
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name == "one_pool_per_type":
                raise Refused("pool_exists", f"model type {command.model_type} has a shared pool") from error
            raise Refused("name_taken", f"the team has a resource named {command.name!r}") from error
        # Before the commit: nobody can see the resource without its queues being there.
        await self._declare_queues(resource_id, command.pool)
        await _note(connection, resource_id, "created", f"for {command.model_type}", command)
        return {"resource_id": resource_id}


async def _create_option(connection: Connection, command: CreateOption) -> dict[str, Any]:
    option_id = new_id("opt")
    try:
        await connection.execute(
            """INSERT INTO scheduler.performance_options
                   (option_id, model_type, name, device_kind, precision, max_batch, max_context_tokens, kv_tokens,
                    hourly_rate_nanousd)
               VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)""",
            option_id,
            command.model_type,
            command.name,
            command.device_kind,
            command.precision,
            command.max_batch,
            command.max_context_tokens,
            command.kv_tokens,
            command.hourly_rate_nanousd,
        )
    except asyncpg.UniqueViolationError as error:
        raise Refused(
            "name_taken", f"model type {command.model_type} has an option {command.name!r}"
        ) from error
    return {"option_id": option_id}


async def _check_quota(connection: Connection, team_id: str, count: int) -> None:
    """Refuse what the team could never have. What others of its resources take is counted at each grant."""
    quota = await team_quota(connection, team_id)
    if quota is not None and count > quota:
        raise Refused("over_quota", f"the team may have {quota} GPUs at once, and {count} were asked for")


async def _lock(connection: Connection, team_id: str, resource_id: str) -> asyncpg.Record:
    """Lock and return the team's resource; another team's is not found, in the same words. most: GPUs it may ever have."""
    row = await connection.fetchrow(
        """SELECT wanted, state, pool, greatest(max_now, coalesce(max_count, fixed_count)) AS most
           FROM scheduler.resources
           WHERE resource_id = $1 AND team_id = $2 AND deleted_at IS NULL FOR UPDATE""",
        resource_id,
        team_id,
    )
    if row is None:
        raise Refused("not_found", f"there is no resource {resource_id}")
    return row


async def _want(connection: Connection, command: TurnOnResource | TurnOffResource, wanted: str) -> None:
    row = await _lock(connection, command.team_id, command.resource_id)
    until = command.until_unix_ms if isinstance(command, TurnOnResource) else None
    await set_until(connection, command.resource_id, until)
    if row["wanted"] == wanted:
        return
    await connection.execute(
        "UPDATE scheduler.resources SET wanted = $2, wanted_count = NULL, wanted_why = '' WHERE resource_id = $1",
        command.resource_id,
        wanted,
    )
    # Failed starts before this are forgiven: the reconciler counts them from the latest "turned_on".
    await _note(connection, command.resource_id, f"turned_{wanted}", f"turned {wanted}", command)


async def _delete(connection: Connection, command: DeleteResource) -> None:
    row = await _lock(connection, command.team_id, command.resource_id)
    has_places = await connection.fetchval(
        "SELECT EXISTS (SELECT 1 FROM scheduler.places WHERE resource_id = $1)", command.resource_id
    )
    if row["wanted"] != "off" or row["state"] != "off" or has_places:
        raise Refused(
            "resource_not_off", f"the resource is {row['state']}; turn it off and wait until it is off"
        )
    await connection.execute(
        "UPDATE scheduler.resources SET deleted_at = now() WHERE resource_id = $1", command.resource_id
    )
    await connection.execute("DELETE FROM scheduler.model_pins WHERE resource_id = $1", command.resource_id)
    await _note(connection, command.resource_id, "deleted", "deleted", command)


async def _wish(connection: Connection, command: PinModel | UnpinModel | PreloadModel) -> None:
    """What a team wants to be resident; the leader sees to it."""
    row = await _lock(connection, command.team_id, command.resource_id)
    match command:
        case PinModel():
            name = await pin_commands.pin(connection, command, row["most"])
            copies = "everywhere" if command.copies is None else f"{command.copies} times"
            await _note(connection, command.resource_id, "pinned", f"{name} pinned {copies}", command)
        case UnpinModel():
            if await pin_commands.unpin(connection, command):
                words = f"{command.model_id} unpinned"
                await _note(connection, command.resource_id, "unpinned", words, command)
        case PreloadModel():
            if row["wanted"] != "on":
                raise Refused("resource_off", "the resource is off; turn it on, or pin the model")
            name = await pin_commands.preload(connection, command)
            await _note(connection, command.resource_id, "preload", f"{name} to be loaded", command)


async def _note(connection: Connection, resource_id: str, action: str, words: str, command: Command) -> None:
    await connection.execute(
        "INSERT INTO scheduler.decisions (resource_id, action, words, inputs) VALUES ($1, $2, $3, $4)",
        resource_id,
        action,
        f"{words} by {command.actor}",
        msgspec.json.encode(command).decode(),
    )
