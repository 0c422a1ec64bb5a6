"""`/v1/embeddings`: its body, its jobs, and the route behind the real edge, asked by the openai package."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import typing
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import openai
import pytest
from openai.types import embedding_create_params

from services.gateway.inference import schemas
from services.gateway.owner import Finished, OwnedStream
from shared.inference.checks import check_inputs, check_vocabulary, refusal_of
from shared.inference.embeddings import (
    EMBEDDING_FIELDS,
    JOB_INPUTS,
    MAX_INPUTS,
    EmbeddingRequest,
    build_embed_jobs,
    embedding_schema,
    parse_embedding,
)
from shared.inference.errors import ApiError, must_not_retry
from shared.inference.jobs import JobContext
from shared.messages import EmbedJob, Timings
from tests.unit.gateway.inference.builders import (
    FakeOwner,
    finished,
    make_model,
    make_principal,
    make_route,
    serving,
)
from tests.unit.gateway.inference.test_http import MODEL, client, post

BODY = {"model": MODEL, "input": "hi"}


def parse(**fields: Any) -> EmbeddingRequest:
    return parse_embedding({**BODY, **fields})


def is_valid(**fields: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(embedding_schema()).is_valid({**BODY, **fields}))


# ---- the body


def test_every_field_of_openais_schema_is_known() -> None:
    names = set(typing.get_type_hints(embedding_create_params.EmbeddingCreateParams))
    assert names >= {"input", "model", "encoding_format", "dimensions", "user"}
    assert names <= set(EMBEDDING_FIELDS)


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a"] * MAX_INPUTS, ("a",) * MAX_INPUTS),
    ],
)
def test_inputs_come_in_four_forms(given: Any, inputs: tuple[Any, ...]) -> None:
    assert parse(input=given).inputs == inputs
    assert is_valid(input=given)


def test_defaults_are_floats_and_the_mean() -> None:
    wanted = parse(user="someone", add_special_tokens=True)
    assert (wanted.encoding, wanted.pooling, wanted.dimensions) == ("float", "mean", None)
    assert wanted == parse(encoding_format=None, pooling=None, dimensions=None, user=None)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": None}, "missing_parameter", "input"),
        ({"input": ""}, "empty_prompt", "input"),
        ({"input": []}, "empty_prompt", "input"),
        ({"input": ["a", ""]}, "empty_prompt", "input[1]"),
        ({"input": ["a", [1]]}, "invalid_type", "input[1]"),
        ({"input": [[1], []]}, "empty_prompt", "input[1]"),
        ({"input": [-1]}, "invalid_token_id", "input"),
        ({"input": 5}, "invalid_type", "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "too_many_prompts", "input"),
        ({"encoding_format": "int8"}, "invalid_value", "encoding_format"),
        ({"encoding_format": 1}, "invalid_type", "encoding_format"),
        ({"dimensions": 0}, "invalid_value", "dimensions"),
        ({"dimensions": "8"}, "invalid_type", "dimensions"),
        ({"pooling": "cls"}, "invalid_value", "pooling"),
        ({"user": 5}, "invalid_type", "user"),
        ({"model": None}, "missing_parameter", "model"),
        ({"truncate_prompt_tokens": 5}, "unsupported_parameter", "truncate_prompt_tokens"),
        ({"normalize": False}, "unsupported_parameter", "normalize"),
        ({"temperature": 0}, "unknown_parameter", "temperature"),
        ({"stream": False}, "unknown_parameter", "stream"),
    ],
)
def test_body_is_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
    # That all of a list's items are of one kind, and that a text is more than blanks, no schema here says.
    assert code == "invalid_token_id" or not is_valid(**fields)


@pytest.mark.parametrize(
    ("inputs", "code"),
    [([[1] * 10, [1] * 11], "context_length_exceeded"), ([[1], []], "empty_prompt"), ([[1] * 10], None)],
)
def test_each_input_must_fit_the_context_and_have_a_token(inputs: list[list[int]], code: str | None) -> None:
    if code is None:
        return check_inputs(inputs, 10)
    with pytest.raises(ApiError) as caught:
        check_inputs(inputs, 10)
    assert (caught.value.code, caught.value.param) == (code, "input")
    assert "input[1]" in caught.value.message


def test_token_outside_of_the_vocabulary_is_refused() -> None:
    check_vocabulary(parse(input=[[1], [258]]), 259)
    with pytest.raises(ApiError) as caught:
        check_vocabulary(parse(input=[[1], [259]]), 259)
    assert (caught.value.code, caught.value.param) == ("invalid_token_id", "input")


# ---- jobs


def test_inputs_are_dealt_to_jobs_in_order() -> None:
    context = JobContext("req_1", make_principal(), make_model(), make_route(), "replies", 1_000, 300.0)
    ids = iter(f"job_{i}" for i in range(99))
    inputs = [[number] for number in range(2 * JOB_INPUTS + 1)]
    jobs = build_embed_jobs(parse(pooling="last", dimensions=8), inputs, context, lambda: next(ids))
    assert [job.job_id for job in jobs] == ["job_0", "job_1", "job_2"]
    assert [len(job.inputs) for job in jobs] == [JOB_INPUTS, JOB_INPUTS, 1]
    assert [tokens for job in jobs for tokens in job.inputs] == inputs
    assert {(job.pooling, job.dimensions, job.operation, job.team_id, job.work_class) for job in jobs} == {
        ("last", 8, "embeddings", "team_1", "live")
    }


@pytest.mark.parametrize(
    ("code", "param"), [("invalid_dimensions", "dimensions"), ("result_too_large", "input")]
)
def test_what_only_the_worker_can_see_is_a_bad_request_too(code: str, param: str) -> None:
    error = refusal_of(finished(0, outcome="failed", code=code))
    assert error is not None
    assert (error.status, error.code, error.param) == (400, code, param)


# ---- the route


def vector_of(tokens: list[int]) -> tuple[float, ...]:
    return (len(tokens) / 1024, tokens[-1] / 1024)


def finished_with(*vectors: tuple[float, ...]) -> Finished:
    packed = tuple(struct.pack(f"<{len(vector)}f", *vector) for vector in vectors)
    return Finished("succeeded", None, None, 0, (), Timings(queue_ms=1.0, prefill_ms=2.0), (), packed)


async def embed(job: EmbedJob, stream: OwnedStream) -> None:
    await asyncio.sleep(0.05 if job.inputs[0] == [0] else 0)  # the first job is the last to end
    stream.push(finished_with(*map(vector_of, job.inputs)))


async def test_the_openai_client_works_unchanged(tmp_path: Path) -> None:
    owner = FakeOwner(embed)
    async with serving(owner, tmp_path) as url, client(url) as ai:
        # The package asks for base64 by itself, and gives out floats.
        for more in ({}, {"encoding_format": "float"}):
            answer = await ai.embeddings.create(model="tiny", input=["abc", "b"], user="me", **more)  # type: ignore[arg-type]
            assert answer.object == "list" and answer.model == MODEL
            assert [(each.object, each.index) for each in answer.data] == [("embedding", 0), ("embedding", 1)]
            assert [tuple(each.embedding) for each in answer.data] == [
                vector_of(tokens) for tokens in owner.jobs[-1].inputs
            ]
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (4, 4)
        one = await ai.embeddings.create(
            model=MODEL, input=[1, 2, 3], dimensions=2, extra_body={"pooling": "last"}
        )
    assert tuple(one.data[0].embedding) == vector_of([1, 2, 3])
    job = owner.jobs[-1]
    assert (job.inputs, job.pooling, job.dimensions) == ([[1, 2, 3]], "last", 2)
    assert owner.voided == []


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_answers_are_as_described_and_in_the_order_of_the_inputs(tmp_path: Path, encoding: str) -> None:
    inputs = [[number] for number in range(JOB_INPUTS + 2)]
    async with serving(FakeOwner(embed), tmp_path) as url:
        status, data, headers = await post(
            url, "/v1/embeddings", {"model": MODEL, "input": inputs, "encoding_format": encoding}
        )
    answer = json.loads(data)
    assert status == 200
    assert headers["x-request-id"] and headers["x-ratelimit-limit-requests"] == "400"
    jsonschema.Draft202012Validator(schemas.EMBEDDINGS).validate(answer)
    assert [each["index"] for each in answer["data"]] == list(range(len(inputs)))
    found = [each["embedding"] for each in answer["data"]]
    if encoding == "base64":
        found = [list(struct.unpack("<2f", base64.b64decode(text))) for text in found]
    assert found == [list(vector_of(tokens)) for tokens in inputs]
    assert answer["usage"] == {
        "prompt_tokens": len(inputs),
        "total_tokens": len(inputs),
        "roundhouse": {"queue_ms": 1.0, "swap_ms": 0.0, "prefill_ms": 2.0, "decode_ms": 0.0},
    }


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "acme/other"}, 404, "model_not_found"),
        ({"input": "x" * 2049}, 400, "context_length_exceeded"),
        ({"input": [259]}, 400, "invalid_token_id"),
        ({"frobnicate": 1}, 400, "unknown_parameter"),
    ],
)
async def test_a_refused_request_starts_no_job(
    tmp_path: Path, change: dict[str, Any], status: int, code: str
) -> None:
    owner = FakeOwner(embed)
    async with serving(owner, tmp_path) as url:
        found, answer, _ = await post(url, "/v1/embeddings", {**BODY, **change})
    assert (found, json.loads(answer)["error"]["code"]) == (status, code)
    assert owner.jobs == []


async def test_a_resource_that_is_off_is_a_conflict_that_is_not_retried(tmp_path: Path) -> None:
    off = must_not_retry(ApiError(409, "resource_off", "The resource is off."))
    async with serving(FakeOwner(embed), tmp_path, route=off) as url, client(url) as ai:
        with pytest.raises(openai.ConflictError) as caught:
            await ai.embeddings.create(**BODY)  # type: ignore[arg-type]
    assert caught.value.code == "resource_off"
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("outcome", "code", "status", "shown"),
    [
        ("expired", "deadline_exceeded", 504, "deadline_exceeded"),
        ("failed", "invalid_dimensions", 400, "invalid_dimensions"),
        ("failed", "generation_failed", 503, "generation_failed"),
    ],
)
async def test_a_job_that_failed_is_told_as_everywhere(
    tmp_path: Path, outcome: str, code: str, status: int, shown: str
) -> None:
    async def fail(job: EmbedJob, stream: OwnedStream) -> None:
        stream.push(finished(0, outcome=outcome, code=code))

    async with serving(FakeOwner(fail), tmp_path) as url:
        found, answer, _ = await post(url, "/v1/embeddings", BODY)
    assert (found, json.loads(answer)["error"]["code"]) == (status, shown)


async def test_a_client_that_leaves_voids_every_job(tmp_path: Path) -> None:
    async def endless(job: EmbedJob, stream: OwnedStream) -> None:
        await asyncio.sleep(60)

    owner = FakeOwner(endless)
    async with serving(owner, tmp_path) as url:
        inputs = [[1]] * (JOB_INPUTS + 1)
        asking = asyncio.create_task(post(url, "/v1/embeddings", {"model": MODEL, "input": inputs}))
        async with asyncio.timeout(10):
            while len(owner.jobs) < 2:
                await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(owner.was_voided.wait(), 5)
    assert len(owner.jobs) == 2
    assert sorted(owner.voided) == sorted((job.job_id, "client_gone", 0) for job in owner.jobs)


async def test_too_few_vectors_are_an_error_and_not_a_short_answer(tmp_path: Path) -> None:
    async def forget_one(job: EmbedJob, stream: OwnedStream) -> None:
        stream.push(finished_with((1.0, 0.0)))

    owner = FakeOwner(forget_one)
    async with serving(owner, tmp_path) as url:
        status, answer, _ = await post(url, "/v1/embeddings", {"model": MODEL, "input": ["a", "b"]})
    assert (status, json.loads(answer)["error"]["code"]) == (500, "internal_error")
    assert [(reason, tokens) for _, reason, tokens in owner.voided] == [("failed", 0)]
