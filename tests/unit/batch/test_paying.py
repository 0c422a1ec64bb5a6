"""A line's money: when it counts, what it holds of caps, and that each of its ends lets go of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from services.batch.line_run import LineRun, voided, voids_of_lost
from services.batch.paying import LinePayer, Paid, Unpaid, starting_at
from services.batch.preparation import Prepared, job_id_at
from services.batch.records import Lost, Reserved
from shared.budgets.caps import with_leases
from shared.inference.errors import ApiError
from shared.messages import GenerateJob, JobQueueMessage, ModelRef
from tests.unit.batch.test_preparation import NOW, make_batch
from tests.unit.gateway.inference.builders import make_model

NOW_MS = int(NOW.timestamp() * 1000)
ENDS_MS = int((NOW + timedelta(hours=1)).timestamp() * 1000)
FIRST_ID = "job_" + "0" * 31 + "1"


def make_line(jobs: int = 2) -> Prepared:
    made = [
        GenerateJob(
            job_id=job_id_at(FIRST_ID, index), request_id="req_1", team_id="team_1", key_id="key_1",
            resource_id="res_pool", billing="ppt", work_class="batch", model_type="tiny-type",
            model=ModelRef(model_id="mod_1", revision=3, name="acme/tiny", folder="f", signature="0" * 16),
            owner_queue="q", accepted_unix_ms=NOW_MS, deadline_unix_ms=ENDS_MS, operation="chat",
            prompt_tokens=[1, 2], max_tokens=5,
        )
        for index in range(jobs)
    ]  # fmt: skip
    wanted: Any = None
    return Prepared(make_batch(), 7, "req_1", wanted, (), made, make_model())


@pytest.mark.parametrize(
    ("after_s", "longest_s", "deadline_ms"),
    [
        (0, None, ENDS_MS),
        (1800, None, ENDS_MS),
        (1800, 60, NOW_MS + 1_860_000),
        (1800, 1800, ENDS_MS),
        (1800, 7200, ENDS_MS),
    ],
)
def test_a_line_counts_when_it_goes_out_and_a_capped_one_is_out_no_longer_than_it_may(
    after_s: int, longest_s: int | None, deadline_ms: int
) -> None:
    line = starting_at(make_line(), NOW_MS + after_s * 1000, longest_s)
    assert {job.accepted_unix_ms for job in line.jobs} == {NOW_MS + after_s * 1000}
    assert {job.deadline_unix_ms for job in line.jobs} == {deadline_ms}
    assert LineRun(line).ends_with_its_batch is (deadline_ms == ENDS_MS)


def test_whatever_ends_a_line_without_an_answer_lets_go_of_what_each_of_its_jobs_holds() -> None:
    line = make_line()
    paid = replace(line, jobs=with_leases(line.jobs, ["lease_a", "lease_b"], [30, 40]))
    voids = [voided(job, "batch_cancelled") for job in paid.jobs]
    lost = Lost(
        batch=line.batch, line=7, job_id=FIRST_ID, jobs=2, request_id="req_1", resource_id="res_pool",
        billing="ppt", accepted_unix_ms=NOW_MS, reserved=Reserved(["lease_a", "lease_b"], [30, 40]),
    )  # fmt: skip
    for found in (voids, voids_of_lost(lost)):
        assert [void.job_id for void in found] == [job.job_id for job in paid.jobs]
        assert [void.lease_ids for void in found] == [["lease_a", "lease_b"]] * 2
        assert [void.reserved_nanousd for void in found] == [30, 40]
    without_cap = voids_of_lost(replace(lost, reserved=Reserved()))
    assert [(void.lease_ids, void.reserved_nanousd) for void in without_cap] == [([], 0)] * 2


class Gate:
    """Answers as the gate of budgets does; keeps what became of the reservation."""

    def __init__(self, error: ApiError | None = None) -> None:
        self.error = error
        self.published_jobs: list[int] = []
        self.resolved = 0
        self.jobs: Sequence[JobQueueMessage] = ()

    def is_capped(self, job: JobQueueMessage) -> bool:
        return job.billing == "ppt"

    async def reserve(self, jobs: Sequence[JobQueueMessage]) -> Gate:
        if self.error is not None:
            raise self.error
        self.jobs = with_leases(jobs, ["lease_a"], [30] * len(jobs))
        return self

    def published(self, index: int) -> None:
        self.published_jobs.append(index)

    def resolve(self) -> None:
        self.resolved += 1


def make_payer(gate: Any) -> LinePayer:
    return LinePayer(gate, 60)


async def test_a_line_goes_out_with_its_leases_and_tells_once_whether_it_went() -> None:
    for went, published in ((True, [0, 1]), (False, [])):
        gate = Gate()
        answer = await make_payer(gate).reserve(make_line())
        assert isinstance(answer, Paid)
        assert [(job.lease_ids, job.reserved_nanousd) for job in answer.line.jobs] == [(["lease_a"], 30)] * 2
        if went:
            answer.sent()
        else:
            answer.kept()
        assert (gate.published_jobs, gate.resolved) == (published, 1)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (402, "budget_exceeded", "budget"),
        (402, "insufficient_credit", "credit"),
        (503, "billing_unavailable", "billing"),
        (409, "no_price", "price"),
    ],
)
async def test_a_line_without_room_under_a_cap_waits_and_says_for_what(
    status: int, code: str, words: str
) -> None:
    answer = await make_payer(Gate(ApiError(status, code, "no"))).reserve(make_line())
    assert isinstance(answer, Unpaid) and words in answer.reason


def test_only_what_is_paid_by_the_token_is_under_caps() -> None:
    line = make_line()
    own = replace(line, jobs=[msgspec.structs.replace(job, billing="resource") for job in line.jobs])
    payer = make_payer(Gate())
    assert payer.is_capped(line) and not payer.is_capped(own)
