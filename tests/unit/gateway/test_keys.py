from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pytest

from services.gateway import keys
from services.gateway.keys import KeyCache, digest_of, make_secret
from services.gateway.store import Store
from shared.inference.errors import ApiError
from shared.inference.principal import Principal
from shared.outcomes import Unavailable

SECRET = "sk-rh-" + "a" * 43
ACME = Principal("key_1", "team_1", "acme", False, False, frozenset({"inference"}))


class MemoryStore:
    """The keys' table; `away` makes it unreachable."""

    def __init__(self) -> None:
        self.rows: dict[bytes, tuple[Principal, bool]] = {digest_of(SECRET): (ACME, False)}
        self.away = False
        self.asked = 0

    async def principals(self, digests: Iterable[bytes], timeout_s: float) -> dict[bytes, Any]:
        self.asked += 1
        if self.away:
            raise Unavailable("away")
        return {digest: self.rows[digest] for digest in digests if digest in self.rows}


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(store: MemoryStore, clock: Clock) -> KeyCache:
    return KeyCache(cast(Store, store), clock)


def test_a_new_key_has_256_random_bits_and_only_its_digest_is_kept() -> None:
    secret = make_secret()
    made = keys.new_key("team_1", "k", secret, ("inference",))
    assert keys.is_secret(secret) and len(secret) == len("sk-rh-") + 43
    assert made.prefix == secret[:12]
    assert secret not in str(made)
    assert make_secret() != secret


async def test_a_key_in_use_is_asked_for_once(cache: KeyCache, store: MemoryStore, clock: Clock) -> None:
    for _ in range(5):
        assert await cache.principal_for(SECRET) == ACME
        clock.now_s += keys.FRESH_S / 10
    assert store.asked == 1


async def test_an_unknown_key_is_not_asked_for_again_at_once(cache: KeyCache, store: MemoryStore) -> None:
    for _ in range(5):
        assert await cache.principal_for("sk-rh-" + "z" * 43) is None
    assert store.asked == 1


async def test_what_cannot_be_a_key_is_not_looked_up(cache: KeyCache, store: MemoryStore) -> None:
    for text in ("", "sk-", "x" * 50, "sk-rh-" + "a" * 400, "sk-rh-" + "ä" * 43, SECRET + "\n"):
        assert await cache.principal_for(text) is None
    assert store.asked == 0


async def test_unknown_keys_take_bounded_memory(cache: KeyCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_UNKNOWN", 10)
    for index in range(50):
        await cache.principal_for(f"sk-rh-{index:043d}")
    assert len(cache._unknown) == 10


async def test_a_revoked_key_stops_working_after_a_refresh(cache: KeyCache, store: MemoryStore) -> None:
    await cache.principal_for(SECRET)
    store.rows.clear()
    await cache.refresh()
    assert await cache.principal_for(SECRET) is None


async def test_a_revoked_key_stops_working_without_a_refresh_too(
    cache: KeyCache, store: MemoryStore, clock: Clock
) -> None:
    await cache.principal_for(SECRET)
    store.rows.clear()
    clock.now_s += keys.FRESH_S + 0.1
    assert await cache.principal_for(SECRET) is None


async def test_a_key_made_elsewhere_works_once_the_no_is_old(
    cache: KeyCache, store: MemoryStore, clock: Clock
) -> None:
    rows = dict(store.rows)
    store.rows.clear()
    assert await cache.principal_for(SECRET) is None
    store.rows.update(rows)
    clock.now_s += keys.FRESH_S + 0.1
    assert await cache.principal_for(SECRET) == ACME


async def test_known_keys_work_while_the_database_is_away_but_not_for_ever(
    cache: KeyCache, store: MemoryStore, clock: Clock
) -> None:
    await cache.principal_for(SECRET)
    store.away = True
    clock.now_s += keys.STALE_S - 1
    assert await cache.principal_for(SECRET) == ACME
    asked = store.asked
    assert await cache.principal_for(SECRET) == ACME
    assert store.asked == asked, "a database that is known to be away is not waited for again"
    clock.now_s += 2
    with pytest.raises(Unavailable):
        await cache.principal_for(SECRET)
    store.away = False
    assert await cache.principal_for(SECRET) == ACME


async def test_an_unknown_key_is_unavailable_and_not_wrong_while_the_database_is_away(
    cache: KeyCache, store: MemoryStore
) -> None:
    store.away = True
    with pytest.raises(Unavailable):
        await cache.principal_for(SECRET)


async def test_a_suspended_team_is_told_so(cache: KeyCache, store: MemoryStore) -> None:
    store.rows[digest_of(SECRET)] = (ACME, True)
    with pytest.raises(ApiError) as caught:
        await cache.principal_for(SECRET)
    assert (caught.value.status, caught.value.code) == (403, "team_suspended")


async def test_idle_keys_are_forgotten(cache: KeyCache, store: MemoryStore, clock: Clock) -> None:
    await cache.principal_for(SECRET)
    clock.now_s += keys.IDLE_S + 1
    await cache.refresh()
    assert len(cache._known) == 0
