"""What a storm comes to in its table, and which requests count as jobs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from infra.local.layout import Layout
from infra.local.management_api import ManagementApi
from loadtest.audit_checks import Result
from loadtest.audit_snapshot import ClientRecord, Snapshot
from loadtest.clients import RecordingClient
from loadtest.storm import Storm, is_job, rows_of
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


@pytest.mark.parametrize(
    ("records", "results", "months", "below"),
    [
        ([record(), record("cut")], [Result("x", 5, [])], {"a": (100, [])}, []),
        ([record(), record("error", status=409)], [], {}, ["jobs"]),
        ([record(), record()], [Result("x", 5, ["bad"])], {}, ["audit: x"]),
        ([record(), record()], [], {"a": (100, ["off by one"])}, ["month of a again: 100 nano-USD"]),
    ],
)
def test_what_is_missing_or_wrong_is_below_its_floor(
    tmp_path: Path,
    records: list[ClientRecord],
    results: list[Result],
    months: dict[str, tuple[int, list[str]]],
    below: list[str],
) -> None:
    snapshot = Snapshot(
        now_us=0, requests={}, facts={}, prices=[], entries=[], posted_minutes={}, teams={},
        spend_days={}, held_leases={},
        intervals=[LiveInterval("res_1", "t", 0, 1, 0, 1), LiveInterval("res_2", "t", 0, 1, 0, 1)],
    )  # fmt: skip
    rows = rows_of(storm(tmp_path, *records), snapshot, results, months)
    assert [row.ours for row in rows if row.name.startswith("live intervals")] == [1]
    assert [row.name for row in rows if row.is_below_floor] == below
