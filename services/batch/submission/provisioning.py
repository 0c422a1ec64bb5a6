"""What has to change at the broker so that its users are those that the table has. Pure.

1. A user that is wanted and missing, or has another password, is made anew; making it anew closes its connections.
2. One whose rights are not exactly those of its team gets these.
3. One of ours that has rights in the teams' vhost and is not wanted is deleted. Users without our prefix are not ours.
4. A credential that was revoked is gone when its user is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shared.topology import Rights, TeamNames

PREFIX = "qcr_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A row of the table. Its id is the user's name."""

    credential_id: str
    team_id: str
    key_id: str
    name: str
    password_hash: str = field(repr=False)
    tag: str
    is_revoked: bool
    is_applied: bool

    @property
    def names(self) -> TeamNames:
        return TeamNames(self.tag)

    @property
    def rights(self) -> Rights:
        return self.names.rights(self.name)


@dataclass(frozen=True, slots=True)
class Changes:
    make: tuple[Credential, ...] = ()
    """Delete the user if it is there, and make it with rights and limits."""
    allow: tuple[Credential, ...] = ()
    delete: tuple[str, ...] = ()


def plan(
    credentials: Iterable[Credential], users: Mapping[str, str], rights: Mapping[str, Rights]
) -> Changes:
    """Compare. users: password hashes by name; rights: those in the teams' vhost by name."""
    credentials = list(credentials)
    wanted = [each for each in credentials if not each.is_revoked]
    revoked = [each.credential_id for each in credentials if each.is_revoked]
    make = [each for each in wanted if users.get(each.credential_id) != each.password_hash]  # 1
    made = {each.credential_id for each in make}
    allow = [
        each
        for each in wanted
        if each.credential_id not in made and rights.get(each.credential_id) != each.rights
    ]  # 2
    keep = {each.credential_id for each in wanted}
    strays = [name for name in rights if name.startswith(PREFIX) and name not in keep]  # 3
    delete = sorted({*strays, *(name for name in revoked if name in users)})  # 4
    return Changes(tuple(make), tuple(allow), tuple(delete))
