"""API keys: how they are made and kept, and a cache that answers without the database while it is away.

A key's 256 random bits need no slow hash; what is stored and compared is its SHA-256, looked up by an index. One task
asks again for all keys in use, so a revoked key stops working within `REFRESH_S` and requests seldom wait for a query.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from services.gateway.store import NewKey, Store
from shared.ids import new_id
from shared.inference.errors import ApiError
from shared.inference.principal import Principal
from shared.outcomes import Unavailable

log = structlog.get_logger()

PREFIX_CHARS = 12
REFRESH_S = 1.5
FRESH_S = 4.0
"""Revocation holds within 5 s: an answer of this age is asked for again."""
STALE_S = 30.0
"""While the database is away, keys seen this long ago still work."""
IDLE_S = 120.0
LOOKUP_TIMEOUT_S = 2.0
MAX_KNOWN = 20_000
MAX_UNKNOWN = 10_000


_SECRET = re.compile(r"sk-[A-Za-z0-9_-]{16,200}")


def is_secret(text: str) -> bool:
    """Whether this can be a key at all; anything else is not even looked up."""
    return _SECRET.fullmatch(text) is not None


def make_secret() -> str:
    """Return a new key, shown once."""
    return f"sk-rh-{secrets.token_urlsafe(32)}"


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def new_key(team_id: str, name: str, secret: str, scopes: tuple[str, ...]) -> NewKey:
    return NewKey(new_id("key"), team_id, name, secret[:PREFIX_CHARS], digest_of(secret), scopes)


@dataclass(slots=True)
class _Entry:
    principal: Principal | None
    suspended: bool
    asked_s: float
    used_s: float


class KeyCache:
    """Principals by key digest. One process's view; the database is the truth."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._now_s = clock
        self._known: OrderedDict[bytes, _Entry] = OrderedDict()
        self._unknown: OrderedDict[bytes, _Entry] = OrderedDict()
        self._database_away = False

    async def principal_for(self, secret: str) -> Principal | None:
        """Return who holds the key, or None. Raises `Unavailable`, or `ApiError` 403 for a suspended team."""
        if not is_secret(secret):
            return None
        digest = digest_of(secret)
        now_s = self._now_s()
        entry = self._known.get(digest) or self._unknown.get(digest)
        if entry is None or not self._is_usable(entry, now_s):
            entry = await self._ask(digest, entry, now_s)
        entry.used_s = now_s
        if entry.suspended:
            raise ApiError(403, "team_suspended", "The team of this key is suspended.")
        return entry.principal

    def _is_usable(self, entry: _Entry, now_s: float) -> bool:
        age_s = now_s - entry.asked_s
        # What is known to be away is not asked again by every request; the refreshing task asks.
        return age_s <= FRESH_S or (self._database_away and entry.principal is not None and age_s <= STALE_S)

    async def _ask(self, digest: bytes, entry: _Entry | None, now_s: float) -> _Entry:
        try:
            found = await self._store.principals([digest], LOOKUP_TIMEOUT_S)
        except Unavailable:
            self._database_away = True
            if entry is not None and self._is_usable(entry, now_s):
                return entry
            raise
        self._database_away = False
        return self._keep(digest, found.get(digest), now_s, now_s)

    def _keep(
        self, digest: bytes, found: tuple[Principal, bool] | None, now_s: float, used_s: float
    ) -> _Entry:
        principal, suspended = found or (None, False)
        entry = _Entry(principal, suspended, now_s, used_s)
        kept, other, limit = (
            (self._unknown, self._known, MAX_UNKNOWN)
            if principal is None
            else (self._known, self._unknown, MAX_KNOWN)
        )
        other.pop(digest, None)
        kept[digest] = entry
        kept.move_to_end(digest)
        if len(kept) > limit:
            kept.popitem(last=False)
        return entry

    def forget(self, digest: bytes) -> None:
        """The key was made or revoked here: ask at its next use."""
        self._known.pop(digest, None)
        self._unknown.pop(digest, None)

    async def refresh(self) -> None:
        """Ask again for all keys in use, in one query, and drop the idle ones."""
        asked_s = self._now_s()
        for digest in [d for d, entry in self._known.items() if asked_s - entry.used_s > IDLE_S]:
            del self._known[digest]
        used = {digest: entry.used_s for digest, entry in self._known.items()}
        if not used and not self._database_away:
            return
        try:
            found = await self._store.principals(used, LOOKUP_TIMEOUT_S)
        except Unavailable as error:
            if not self._database_away:
                log.warning("keys_not_refreshed", error=str(error))
            self._database_away = True
            return
        self._database_away = False
        for digest, used_s in used.items():
            if digest in self._known:
                # The time of asking, not of the answer: what was revoked in between is asked for again.
                self._keep(digest, found.get(digest), asked_s, max(used_s, self._known[digest].used_s))

    async def keep_fresh(self) -> None:
        """Refresh until cancelled."""
        while True:
            await asyncio.sleep(REFRESH_S)
            await self.refresh()
