"""What is kept of a dead message: the origin always, ids of jobs, bodies of money facts, never a prompt."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from services.scheduler.dead_letters import read_dead_letter
from shared.messages import EmbedJob, GenerateJob, Job, ModelRef

JOB = GenerateJob(
    job_id="job_1",
    request_id="req_1",
    team_id="team_1",
    key_id="key_1",
    resource_id="res_1",
    billing="ppt",
    work_class="live",
    operation="chat",
    model_type="tiny",
    model=ModelRef(model_id="m", revision=1, name="t/m", folder="m/1", signature="s"),
    owner_queue="replies.v1.gw",
    prompt_tokens=[1, 2, 3],
    max_tokens=4,
    accepted_unix_ms=1,
    deadline_unix_ms=2,
)
BODY = msgspec.json.encode(JOB)
OURS = {"x-dead-reason": "ValueError in handler", "x-dead-from": "jobs.v1.res_1.live"}
BROKERS = {"x-death": [{"queue": "jobs.v1.res_1.live", "reason": "delivery_limit", "count": 1}]}


@pytest.mark.parametrize(
    ("headers", "queue", "reason"),
    [
        (OURS, "jobs.v1.res_1.live", "ValueError in handler"),
        (BROKERS, "jobs.v1.res_1.live", "delivery_limit"),
        ({}, "", ""),
        ({"x-death": "nonsense"}, "", ""),
        ({"x-death": []}, "", ""),
        ({"x-dead-reason": b"\xff\x00" + b"x" * 900}, "", "\ufffd " + "x" * 498),
    ],
)
def test_the_origin_is_read_from_our_headers_or_the_brokers(
    headers: dict[str, Any], queue: str, reason: str
) -> None:
    letter = read_dead_letter(BODY, "job.generate.v1", headers)
    assert (letter.queue, letter.reason) == (queue, reason)


def test_a_job_is_known_and_its_body_not_kept() -> None:
    letter = read_dead_letter(BODY, "job.generate.v1", OURS)
    assert letter.job == JOB and letter.body is None


def test_a_job_of_another_kind_is_known_too() -> None:
    common = {name: getattr(JOB, name) for name in Job.__struct_fields__}
    job = EmbedJob(**common, operation="embeddings", inputs=[[1, 2], [3]])
    assert read_dead_letter(msgspec.json.encode(job), "job.embed.v1", OURS).job == job


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"{}", BODY[:-1], b"[" * 10_000])
def test_anything_at_all_can_be_kept(body: bytes) -> None:
    letter = read_dead_letter(body, "job.generate.v1", {})
    assert letter.job is None and letter.body is None


@pytest.mark.parametrize(
    ("message_type", "kept"), [("usage.job_finished.v1", True), ("node.report.v1", False)]
)
def test_only_money_keeps_its_body(message_type: str, kept: bool) -> None:
    assert read_dead_letter(b"abc", message_type, {}).body == (b"abc" if kept else None)
    assert read_dead_letter(b"abc", "", {}).message_type == "unknown"
