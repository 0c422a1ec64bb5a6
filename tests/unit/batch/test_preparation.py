"""From lines to jobs: what a live request would get, in groups; a line that is refused fails alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from services.batch import endings
from services.batch.endings import Endings
from services.batch.line_run import LineRun, voided
from services.batch.preparation import (
    GROUP_BYTES,
    GROUP_LINES,
    Prepared,
    Preparer,
    Refused,
    Tokenizers,
    cut_groups,
    job_id_at,
)
from services.batch.records import Batch
from services.batch.results import Results
from services.batch.store import Store
from shared.inference.batch_output import output_line
from shared.inference.errors import ApiError, bad_request
from shared.inference.prompts import ChatMessage
from shared.messages import EmbedJob, GenerateJob, Timings
from shared.ownership import Deliver, End
from tests.unit.gateway.inference.builders import EOS, InProcessTokenizers, make_model, make_route

NOW = datetime.now(UTC)


def make_batch(endpoint: str = "/v1/chat/completions") -> Batch:
    return Batch(
        batch_id="batch_1", team_id="team_1", key_id="key_1", endpoint=endpoint, input_path="p", metadata={},
        output_expires_after_s=None, state="in_progress", model_id="mod_1", revision=3, model_name="acme/tiny",
        model_type="tiny-type", total=1, waiting_for="", created_at=NOW, expires_at=NOW + timedelta(hours=1),
    )  # fmt: skip


def line(**body: Any) -> bytes:
    body = {"model": "tiny"} | body
    return json.dumps({"custom_id": "a", "method": "POST", "url": "u", "body": body}).encode()


def chat(text: str = "hi", **body: Any) -> bytes:
    return line(messages=[{"role": "user", "content": text}], **body)


class Counting(InProcessTokenizers):
    """Refuses a conversation that says so; counts questions."""

    questions = 0
    busy = False

    async def encode_chats(
        self, folder: str, conversations: Sequence[Sequence[ChatMessage]]
    ) -> list[list[int]]:
        self.questions += 1
        if self.busy:
            raise ApiError(503, "service_unavailable", "busy")
        if any("REFUSE" in message.content for messages in conversations for message in messages):
            raise bad_request("invalid_messages", "refused", "messages")
        return await super().encode_chats(folder, conversations)


@pytest.fixture
def tokenizers(tmp_path: Path) -> Counting:
    return Counting(tmp_path)


async def prepare(
    tokenizers: Counting, *lines: bytes, endpoint: str = "/v1/chat/completions"
) -> list[Prepared | Refused]:
    preparer = Preparer(tokenizers, "replies.v1.bat_1")
    return await preparer.prepare(
        make_batch(endpoint), make_model(), make_route(), list(enumerate(lines, start=1))
    )


async def test_a_line_becomes_the_job_of_a_live_request_with_the_batch_s_class(tokenizers: Counting) -> None:
    (found,) = await prepare(tokenizers, chat("hi", max_tokens=7, seed=5, stop="x"))
    assert isinstance(found, Prepared)
    (job,) = found.jobs
    assert isinstance(job, GenerateJob)
    expected = await tokenizers.encode_chat("", (ChatMessage("user", "hi"),))
    assert job.prompt_tokens == expected == list(found.prefix)
    assert (job.max_tokens, job.sampling.seed, job.stop, job.stop_token_ids) == (7, 5, ["x"], [EOS])
    assert (job.work_class, job.billing, job.resource_id, job.team_id, job.key_id) == (
        "batch", "resource", "res_1", "team_1", "key_1",
    )  # fmt: skip
    assert job.owner_queue == "replies.v1.bat_1" and job.request_id == found.request_id
    assert job.deadline_unix_ms == pytest.approx(make_batch().expires_at.timestamp() * 1000, abs=2)
    assert found.cost_tokens == len(expected) + 7


async def test_a_line_without_a_seed_gets_the_same_one_each_time(tokenizers: Counting) -> None:
    seeds = [
        [job.sampling.seed for each in await prepare(tokenizers, chat(), chat()) for job in _jobs(each)]
        for _ in range(2)
    ]
    assert seeds[0] == seeds[1] and seeds[0][0] != seeds[0][1]


def _jobs(found: Prepared | Refused) -> list[GenerateJob]:
    assert isinstance(found, Prepared)
    return [job for job in found.jobs if isinstance(job, GenerateJob)]


async def test_lines_go_to_the_tokenizer_together_and_one_that_is_refused_fails_alone(
    tokenizers: Counting,
) -> None:
    good = await prepare(tokenizers, *[chat(f"q{index}") for index in range(GROUP_LINES)])
    assert all(isinstance(each, Prepared) for each in good) and tokenizers.questions == 1
    found = await prepare(tokenizers, chat("one"), chat("REFUSE"), chat("two"))
    assert [type(each) for each in found] == [Refused, Prepared, Prepared]
    assert sorted(each.line for each in found) == [1, 2, 3]
    (refused,) = [each for each in found if isinstance(each, Refused)]
    assert (refused.line, refused.error.code) == (2, "invalid_messages")


async def test_busy_tokenizers_are_tried_again_and_nothing_is_refused(tokenizers: Counting) -> None:
    tokenizers.busy = True
    with pytest.raises(ApiError) as caught:
        await prepare(tokenizers, chat())
    assert caught.value.status == 503


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (chat(temperature=3), "invalid_value"),
        (chat(nonsense=1), "unknown_parameter"),
        (chat(stream=True), "unsupported_parameter"),
        (chat(logit_bias={"259": 1}), "invalid_token_id"),
        (chat("x" * 3000), "context_length_exceeded"),
        (line(), "missing_parameter"),
        (chat()[:-9], "invalid_json_line"),
        (chat("a").replace(b'"a"', b'"\xff"', 2), "invalid_json_line"),
    ],
)
async def test_a_line_that_the_endpoint_would_refuse_is_refused_with_its_answer(
    tokenizers: Counting, content: bytes, code: str
) -> None:
    (found,) = await prepare(tokenizers, content)
    assert isinstance(found, Refused)
    assert (found.error.status, found.error.code) == (400, code)


async def test_prompts_and_inputs_become_jobs_with_ids_in_a_row(tokenizers: Counting) -> None:
    (prompts,) = await prepare(
        tokenizers, line(prompt=["one", "two"], max_tokens=2, echo=True), endpoint="/v1/completions"
    )
    assert isinstance(prompts, Prepared) and list(prompts.prompt_texts) == ["one", "two"]
    first = prompts.jobs[0].job_id
    assert [job.job_id for job in prompts.jobs] == [first, job_id_at(first, 1)]
    (tokens,) = await prepare(tokenizers, line(prompt=[5, 6], echo=True), endpoint="/v1/completions")
    assert isinstance(tokens, Prepared) and len(tokens.prompt_texts) == 1
    (inputs,) = await prepare(tokenizers, line(input=["a"] * 70), endpoint="/v1/embeddings")
    assert isinstance(inputs, Prepared)
    assert [len(job.inputs) for job in inputs.jobs if isinstance(job, EmbedJob)] == [64, 6]


def test_groups_are_bounded_in_number_and_size() -> None:
    short = [(index, b"x") for index in range(2 * GROUP_LINES + 1)]
    assert [len(group) for group in cut_groups(short)] == [GROUP_LINES, GROUP_LINES, 1]
    large = [(1, b"x" * GROUP_BYTES), (2, b"y"), (3, b"z" * GROUP_BYTES), (4, b"x" * (GROUP_BYTES + 1))]
    assert [[line for line, _ in group] for group in cut_groups(large)] == [[1], [2], [3], [4]]
    assert cut_groups([]) == []


# ---- the answer


def make_end(outcome: Any = "succeeded", code: str | None = None) -> End:
    return End(outcome, code, None, Timings(), (), by_worker=True)


async def test_an_answer_comes_together_and_costs_what_was_generated(tokenizers: Counting) -> None:
    (prepared,) = await prepare(
        tokenizers, line(prompt=["one", "two"], max_tokens=2, n=2), endpoint="/v1/completions"
    )
    assert isinstance(prepared, Prepared)
    run = LineRun(prepared)
    for index, choice, text in ((1, 1, "d"), (0, 0, "a"), (0, 1, "b"), (1, 0, "c")):
        run.deliver(index, Deliver(choice, (7,), text, (), "length"))
    over = []
    for index in (0, 1):
        run.ends[index] = make_end()
        over.append(run.is_over)
    assert over == [False, True] and run.failure() is None and run.tokens_to_spell() == []
    body = json.loads(run.body(None))
    assert [choice["text"] for choice in body["choices"]] == ["a", "b", "c", "d"]
    assert body["usage"]["prompt_tokens"] == 6


class _Spelling:
    """Tokenizers that fail."""

    def __init__(self, error: ApiError) -> None:
        self._error = error

    async def spellings(self, *_: Any) -> dict[int, str]:
        raise self._error


@pytest.mark.parametrize(
    ("error", "limit_s"),
    [
        pytest.param(bad_request("invalid_value", "no"), 60.0, id="refused"),
        pytest.param(ApiError(503, "service_unavailable", "gone"), 0.05, id="gone for good"),
    ],
)
async def test_an_answer_that_cannot_be_spelled_fails_its_line_and_costs_nothing(
    tokenizers: Counting, monkeypatch: pytest.MonkeyPatch, error: ApiError, limit_s: float
) -> None:
    monkeypatch.setattr(endings, "RETRY_S", 0.01)
    monkeypatch.setattr(endings, "SPELL_LIMIT_S", limit_s)
    (prepared,) = await prepare(tokenizers, chat(logprobs=True))
    assert isinstance(prepared, Prepared)
    run = LineRun(prepared)
    results = Results(cast(Store, None))
    found = Endings(cast(Store, None), results, cast(Tokenizers, _Spelling(error)), lambda _: None)
    async with asyncio.timeout(10):
        await found._spelled(run)
    ((ended, told),) = results._waiting
    assert (ended.state, ended.status_code, len(told)) == ("failed", error.status, len(prepared.jobs))


async def test_a_job_that_nobody_has_the_answer_of_costs_nothing(tokenizers: Counting) -> None:
    (prepared,) = await prepare(tokenizers, chat())
    assert isinstance(prepared, Prepared)
    for code, reason in (("batch_expired", "deadline"), ("batch_cancelled", "failed"), ("poison", "failed")):
        void = voided(prepared.jobs[0], code)
        assert (void.reason, void.delivered_tokens, void.error_code) == (reason, 0, code)
        assert (void.billing, void.work_class) == ("resource", "batch")


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (
            "succeeded",
            {"response": {"status_code": 200, "request_id": "req_1", "body": {"a": 1}}, "error": None},
        ),
        (
            "failed",
            {"response": {"status_code": 200, "request_id": "req_1", "body": {"a": 1}}, "error": None},
        ),
        ("cancelled", {"response": None, "error": "batch_cancelled"}),
        ("expired", {"response": None, "error": "batch_expired"}),
    ],
)
def test_a_result_has_an_answer_or_says_why_there_is_none(state: str, shown: dict[str, Any]) -> None:
    line = json.loads(output_line("mine", state, "req_1", 200, b'{"a": 1}'))
    assert (line["id"], line["custom_id"]) == ("batch_req_1", "mine")
    assert line["response"] == shown["response"]
    assert (line["error"] and line["error"]["code"]) == shown["error"]
