"""Who leads: one row that the leader renews. Its epoch grows with each change of hands and fences every write.

Time is the database's alone. A leader that was stopped and wakes up finds another epoch in the row, and its writes
are refused in the same transaction in which they are tried.
"""

from __future__ import annotations

import time

import structlog

from shared.database import Connection, Database

log = structlog.get_logger()

_ACQUIRE = """
    INSERT INTO {table} AS lease (name, owner, epoch, expires_at)
    VALUES ('leader', $1, 1, clock_timestamp() + make_interval(secs => $2))
    ON CONFLICT (name) DO UPDATE
        SET owner = excluded.owner, epoch = lease.epoch + 1, expires_at = excluded.expires_at
        WHERE lease.expires_at < clock_timestamp()
    RETURNING epoch
"""
# Also past its time: as long as nobody took it over, the epoch is ours alone.
_RENEW = """
    UPDATE {table} SET expires_at = clock_timestamp() + make_interval(secs => $3)
    WHERE name = 'leader' AND owner = $1 AND epoch = $2
    RETURNING epoch
"""
_RELEASE = """
    UPDATE {table} SET expires_at = clock_timestamp() - interval '1 second'
    WHERE name = 'leader' AND owner = $1 AND epoch = $2
"""
# Shared: it holds off a change of hands until this transaction is over, so no write lands after it. A leader that is
# frozen right here holds it off for no longer than the time-out.
_FENCE = """
    SELECT set_config('idle_in_transaction_session_timeout', '3000', true) FROM {table}
    WHERE name = 'leader' AND owner = $1 AND epoch = $2
    FOR SHARE
"""


class Fenced(Exception):
    """The lease has another owner or epoch: this process is not the leader (any more)."""


class Lease:
    """One process's hold on the leader's lease. `epoch` is None while it does not lead."""

    def __init__(
        self, database: Database, owner: str, lease_s: float, table: str = "scheduler.lease"
    ) -> None:
        """table: the service's own, one of the code's constants."""
        self._acquire, self._renew, self._release, self._fence = (
            sql.format(table=table) for sql in (_ACQUIRE, _RENEW, _RELEASE, _FENCE)
        )
        self._database = database
        self._owner = owner
        self._lease_s = lease_s
        self._renewed_s = 0.0
        self.epoch: int | None = None

    @property
    def is_leader(self) -> bool:
        """As far as this process can tell; only the fence is sure."""
        return self.epoch is not None and time.monotonic() - self._renewed_s < self._lease_s

    async def ensure(self) -> bool:
        """Take the lease if it is free, renew it when due; return whether this process leads. Raises `Unavailable`."""
        started_s = time.monotonic()
        if self.epoch is not None and started_s - self._renewed_s < self._lease_s * 0.3:
            return True
        if self.epoch is None:
            row = await self._database.fetchrow(self._acquire, self._owner, self._lease_s)
            if row is None:
                return False
            self.epoch = int(row["epoch"])
            log.info("lease_taken", epoch=self.epoch)
        elif await self._database.fetchrow(self._renew, self._owner, self.epoch, self._lease_s) is None:
            self.lose()
            return False
        self._renewed_s = started_s
        return True

    def lose(self) -> None:
        """Step down; what was under way has been refused or will be."""
        log.warning("lease_lost", epoch=self.epoch)
        self.epoch = None

    async def release(self) -> None:
        """Hand the lease over at once instead of letting it run out. Raises `Unavailable`."""
        if self.epoch is not None:
            epoch, self.epoch = self.epoch, None
            await self._database.fetch(self._release, self._owner, epoch)
            log.info("lease_released", epoch=epoch)

    async def fence(self, connection: Connection) -> int:
        """Make the transaction one of the leader's and return its epoch. Raises `Fenced`."""
        if self.epoch is None or await connection.fetchval(self._fence, self._owner, self.epoch) is None:
            raise Fenced(f"epoch {self.epoch}")
        return self.epoch
