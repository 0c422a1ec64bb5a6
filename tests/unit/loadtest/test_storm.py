"""What a storm comes to in its table, and which requests count as jobs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.local.layout import Layout
from infra.local.management_api import ManagementApi
from loadtest.audit_checks import Result
from loadtest.audit_snapshot import ClientRecord, Snapshot
from loadtest.clients import RecordingClient
from loadtest.storm import Storm, is_job, rows_of
from loadtest.storm_budgets import Capped, Money
from services.billing.instants import EPOCH, MINUTE_US
from services.billing.minutes import LiveInterval


def record(outcome: Any = "answered", **fields: Any) -> ClientRecord:
    values = {
        "request_id": "req_1", "team": "t", "model": "m", "stream": True, "started_unix_ms": 0, "ended_unix_ms": 1,
        "status": 200, "outcome": outcome, **fields,
    }  # fmt: skip
    return ClientRecord(**values)


def storm(tmp_path: Path, *records: ClientRecord, jobs: int = 2) -> Storm:
    made = Storm(
        layout=Layout(tmp_path), pool=RecordingClient("", "", "a"), own=RecordingClient("", "", "b"), own_model="m",
        demo=ManagementApi("http://x", "k"), resource_id="res_1", jobs=jobs, random=random.Random(1),
        capped=Capped(RecordingClient("", "", "c"), ManagementApi("http://x", "k"), "m", "p", 1),
    )  # fmt: skip
    made.pool.records += records
    return made


@pytest.mark.parametrize(
    ("seen", "job"),
    [
        (record(), True),
        (record("cut"), True),
        (record("cancelled_by_client"), True),
        (record("error"), True),  # taken, and failed in its stream
        (record("error", status=409), False),
        (record("error", status=503), False),
        (record("cut", status=None, request_id=None), False),
    ],
)
def test_a_job_is_what_the_gateway_took(seen: ClientRecord, job: bool) -> None:
    assert is_job(seen) is job


GOOD = Money(limit_nanousd=100, spent_nanousd=90, refused=3, leases=5, left_over=0)


def span(resource_id: str, from_minute: int, to_minute: int) -> LiveInterval:
    return LiveInterval(resource_id, "t", 0, 1, from_minute * MINUTE_US, to_minute * MINUTE_US)


def test_a_storm_without_long_spans_of_its_resource_is_below_its_floor(tmp_path: Path) -> None:
    snapshot = Snapshot(
        now_us=0, requests={}, facts={}, prices=[], entries=[], posted_minutes={}, teams={},
        spend_days={}, held_leases={}, intervals=[span("res_1", 0, 2), span("res_1", 3, 4), span("res_2", 3, 9)],
    )  # fmt: skip
    rows = rows_of(storm(tmp_path, record(), record()), snapshot, [], {}, GOOD, EPOCH)
    assert [row.name for row in rows if row.is_below_floor] == ["live intervals of over a minute"]


@pytest.mark.parametrize(
    ("records", "results", "months", "money", "below"),
    [
        ([record(), record("cut")], [Result("x", 5, [])], {"a": (100, [])}, GOOD, []),
        ([record(), record("error", status=409)], [], {}, GOOD, ["jobs"]),
        ([record(), record()], [Result("x", 5, ["bad"])], {}, GOOD, ["audit: x"]),
        ([record(), record()], [], {"a": (100, ["off by one"])}, GOOD, ["month of a again: 100 nano-USD"]),
        ([record(), record()], [], {}, replace(GOOD, spent_nanousd=100), []),
        (
            [record(), record()],
            [],
            {},
            replace(GOOD, spent_nanousd=101),
            ["spent under a cap that clients went on at"],
        ),
        ([record(), record()], [], {}, replace(GOOD, refused=0), ["requests that it refused"]),
        ([record(), record()], [], {}, replace(GOOD, leases=0), ["slices that gateways leased"]),
        ([record(), record()], [], {}, replace(GOOD, left_over=1), ["slices left over"]),
    ],
)
def test_what_is_missing_or_wrong_is_below_its_floor(
    tmp_path: Path,
    records: list[ClientRecord],
    results: list[Result],
    months: dict[str, tuple[int, list[str]]],
    money: Money,
    below: list[str],
) -> None:
    snapshot = Snapshot(
        now_us=0, requests={}, facts={}, prices=[], entries=[], posted_minutes={}, teams={},
        spend_days={}, held_leases={},
        intervals=[span("res_1", 0, 2), span("res_1", 3, 5), span("res_1", -2, 9), span("res_2", 0, 9)],
    )  # fmt: skip
    rows = rows_of(storm(tmp_path, *records), snapshot, results, months, money, EPOCH)
    assert [row.ours for row in rows if row.name.startswith("live intervals")] == [2, 2]
    assert [row.name for row in rows if row.is_below_floor] == below
