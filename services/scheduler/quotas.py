"""How many places a team, and the platform, may have taken: the counting (pure), and the SQL of the command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from msgspec import Struct

from shared.database import Connection
from shared.messages import SetQuota

EVERY_TEAM = "every_team"
PLATFORM = "platform"
MAX_PLACES = 100_000


class QuotaRoom(Struct, frozen=True, kw_only=True):
    """How many more places a resource's team, and the platform, may take; None: no bound is known."""

    team_places: int
    team_left: int
    platform_left: int

    @property
    def left(self) -> int:
        return max(min(self.team_left, self.platform_left), 0)

    @property
    def reason(self) -> str:
        """Why there is no room. A team learns nothing of how much others have."""
        if self.team_left <= self.platform_left:
            return f"the team's quota of {self.team_places} places is used up"
        return "the platform has no place left to give"


class QuotaBook:
    """Places taken, by team: what was granted in a look counts at once."""

    def __init__(self, quotas: Mapping[str, int], teams_of_places: Iterable[str]) -> None:
        self._quotas = quotas
        self._taken = Counter(teams_of_places)

    def take(self, team_id: str) -> None:
        self._taken[team_id] += 1

    def room(self, team_id: str) -> QuotaRoom | None:
        """None where no quotas are set at all."""
        if EVERY_TEAM not in self._quotas or PLATFORM not in self._quotas:
            return None
        places = self._quotas.get(team_id, self._quotas[EVERY_TEAM])
        return QuotaRoom(
            team_places=places,
            team_left=places - self._taken[team_id],
            platform_left=self._quotas[PLATFORM] - self._taken.total(),
        )


async def team_quota(connection: Connection, team_id: str) -> int | None:
    found = await connection.fetchval(
        """SELECT places FROM scheduler.quotas WHERE scope IN ($1, 'every_team')
           ORDER BY scope = 'every_team' LIMIT 1""",
        team_id,
    )
    return None if found is None else int(found)


async def set_quota(connection: Connection, command: SetQuota) -> None:
    """Store the quota; places None: the team has no quota of its own any more."""
    if command.places is None:
        await connection.execute("DELETE FROM scheduler.quotas WHERE scope = $1", command.scope)
    else:
        await connection.execute(
            """INSERT INTO scheduler.quotas (scope, places) VALUES ($1, $2)
               ON CONFLICT (scope) DO UPDATE SET places = excluded.places""",
            command.scope,
            command.places,
        )
