"""Resources that are on for a time: turned off at its end, unless whoever turned them on has said again that they are needed.

So what was turned on for a batch goes off although the batch service is gone for good.
"""

from __future__ import annotations

from shared.database import Connection


async def set_until(connection: Connection, resource_id: str, until_unix_ms: int | None) -> None:
    """None: on until somebody turns it off. Times are compared with the database's clock alone."""
    await connection.execute(
        "UPDATE scheduler.resources SET on_until = to_timestamp($2::float8 / 1000) WHERE resource_id = $1",
        resource_id,
        until_unix_ms,
    )


async def end_holds(connection: Connection) -> list[str]:
    """Turn off what is past its time, in the leader's transaction; return what it was."""
    rows = await connection.fetch(
        """
        WITH ended AS (
            UPDATE scheduler.resources
            SET wanted = 'off', on_until = NULL, wanted_count = NULL, wanted_why = ''
            WHERE wanted = 'on' AND on_until < clock_timestamp() AND deleted_at IS NULL
            RETURNING resource_id
        )
        INSERT INTO scheduler.decisions (resource_id, action, words, inputs)
        SELECT resource_id, 'turned_off', 'turned off: the time is over that it was turned on for', '{}' FROM ended
        RETURNING resource_id
        """
    )
    return [row["resource_id"] for row in rows]
