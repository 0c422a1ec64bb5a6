"""An audit waits for a server that comes back, and for no longer than it was told."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest import audit
from loadtest.audit_checks import Result


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been read; the first two tries are refused."""
    tries: list[str] = []

    async def read_snapshot(url: str) -> Any:
        tries.append(url)
        if len(tries) < 3:
            raise ConnectionRefusedError("not yet")
        return "snapshot"

    monkeypatch.setattr(audit, "read_snapshot", read_snapshot)
    monkeypatch.setattr(audit, "audit", lambda snapshot, records: [Result("check", 1, [])])
    monkeypatch.setattr(audit, "POLL_S", 0.0)
    return tries


async def test_a_server_that_comes_back_is_waited_for(reads: list[str]) -> None:
    snapshot, results = await audit.settled_audit("url", [], 60.0)
    assert (len(reads), str(snapshot), len(results)) == (3, "snapshot", 1)


async def test_one_that_stays_away_is_an_error_in_the_end(reads: list[str]) -> None:
    with pytest.raises(ConnectionRefusedError):
        await audit.settled_audit("url", [], 0.0)
    assert len(reads) == 1
