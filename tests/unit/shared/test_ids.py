"""Ids: UUIDv7 text with a prefix."""

from __future__ import annotations

import re
import time
import uuid

import pytest

from shared.ids import new_id


def test_an_id_is_a_prefix_and_a_uuid_of_version_7() -> None:
    made = new_id("job")
    assert re.fullmatch(r"job_[0-9a-f]{32}", made)
    parsed = uuid.UUID(made.removeprefix("job_"))
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)


def test_an_id_tells_when_it_was_made() -> None:
    before_ms = time.time_ns() // 1_000_000
    stamp_ms = int(new_id("job").removeprefix("job_")[:12], 16)
    assert before_ms <= stamp_ms <= time.time_ns() // 1_000_000


def test_ids_sort_by_the_time_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for stamp_ms in (1, 2, 255, 256, 1_793_980_800_000, 1_793_980_800_001, 2**48 - 1):
        monkeypatch.setattr(time, "time_ns", lambda stamp_ms=stamp_ms: stamp_ms * 1_000_000)
        made.append(new_id("job"))
    assert sorted(made) == made


def test_ids_of_one_moment_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_793_980_800_000 * 1_000_000)
    assert len({new_id("job") for _ in range(20_000)}) == 20_000


def test_all_74_random_bits_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    ones, zeros = 0, (1 << 128) - 1
    for _ in range(500):
        value = int(new_id("x").removeprefix("x_"), 16)
        ones |= value
        zeros &= value
    assert (ones & ~zeros).bit_count() == 74
