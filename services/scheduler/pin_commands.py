"""SQL of the commands about pins and preloads, each in the transaction of its command."""

from __future__ import annotations

from services.scheduler.pin_keeper import MODELS_OF
from services.scheduler.pins import MOST_PINS, Pin, problem_of_pins, room_for_pins
from services.scheduler.refused import Refused
from shared.database import Connection
from shared.messages import PinModel, PreloadModel, UnpinModel

# Of the resource's team or the platform's; a shared pool takes every team's.
_MODEL = """
    SELECT m.name, m.model_type, r.model_type AS resource_type
    FROM gateway_api.models_v1 m, scheduler.resources r
    WHERE m.model_id = $1 AND r.resource_id = $2 AND (r.pool OR m.is_platform OR m.team_id = r.team_id)
"""


async def pin(connection: Connection, command: PinModel, workers: int) -> str:
    """Store the pin; return the model's name. The resource's row is locked. Raises `Refused`."""
    name = await _model_name(connection, command)
    rows = await connection.fetch(
        "SELECT model_id, copies FROM scheduler.model_pins WHERE resource_id = $1 AND model_id <> $2 ORDER BY pinned_at",
        command.resource_id,
        command.model_id,
    )
    if len(rows) >= MOST_PINS:
        raise Refused("too_many_pins", f"a resource may have {MOST_PINS} pinned models; unpin one first")
    # Those that ask for more than there are since the resource was made smaller have what there is.
    pins = [Pin(row["model_id"], row["copies"] and min(row["copies"], workers)) for row in rows]
    pins.append(Pin(command.model_id, command.copies))
    problem = problem_of_pins(pins, workers, await _room(connection, command.resource_id))
    if problem is not None:
        too_many = command.copies is not None and command.copies > workers
        raise Refused("too_many_copies" if too_many else "pins_do_not_fit", problem)
    await connection.execute(
        """INSERT INTO scheduler.model_pins (resource_id, model_id, copies) VALUES ($1, $2, $3)
           ON CONFLICT (resource_id, model_id) DO UPDATE SET copies = excluded.copies""",
        command.resource_id,
        command.model_id,
        command.copies,
    )
    return name


async def unpin(connection: Connection, command: UnpinModel) -> bool:
    """Remove the pin; return whether there was one. Also of a model that is gone."""
    done = await connection.execute(
        "DELETE FROM scheduler.model_pins WHERE resource_id = $1 AND model_id = $2",
        command.resource_id,
        command.model_id,
    )
    return done == "DELETE 1"


async def preload(connection: Connection, command: PreloadModel) -> str:
    """Note that it was asked for; return the model's name. Raises `Refused`."""
    name = await _model_name(connection, command)
    count = await connection.fetchval(
        "SELECT count(*) FROM scheduler.model_preloads WHERE resource_id = $1 AND model_id <> $2",
        command.resource_id,
        command.model_id,
    )
    if count >= MOST_PINS:
        raise Refused(
            "too_many_preloads", f"{MOST_PINS} models were asked for within the hour; pin what has to stay"
        )
    await connection.execute(
        """INSERT INTO scheduler.model_preloads (resource_id, model_id) VALUES ($1, $2)
           ON CONFLICT (resource_id, model_id) DO UPDATE SET asked_at = now()""",
        command.resource_id,
        command.model_id,
    )
    return name


async def _model_name(connection: Connection, command: PinModel | PreloadModel) -> str:
    row = await connection.fetchrow(_MODEL, command.model_id, command.resource_id)
    if row is None:
        raise Refused("not_found", f"there is no model {command.model_id}")
    if row["model_type"] != row["resource_type"]:
        raise Refused(
            "model_type_mismatch",
            f"the model is of type {row['model_type']}, the resource of {row['resource_type']}",
        )
    return str(row["name"])


async def _room(connection: Connection, resource_id: str) -> int | None:
    """How many pins the resource's smallest worker has room for, as far as workers have reported."""
    row = await connection.fetchrow(MODELS_OF, [resource_id])
    memory_bytes = await connection.fetchval(
        """SELECT min(m.model_memory_bytes) FROM scheduler.worker_memory m
           JOIN scheduler.places p USING (incarnation) WHERE p.resource_id = $1 AND m.model_memory_bytes > 0""",
        resource_id,
    )
    if row is None or memory_bytes is None:
        return None
    return room_for_pins(int(memory_bytes), int(row["largest_bytes"]), int(row["models"]))
