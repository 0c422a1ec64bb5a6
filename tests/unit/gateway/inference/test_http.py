"""The routes behind the real edge, asked by the openai package and by bare sockets. Loopback only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import aiohttp
import msgspec
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from services.gateway.inference.streams import StreamTimes
from services.gateway.owner import OwnedStream
from shared.inference.errors import ApiError, must_not_retry
from shared.inference.tokenization import load_tokenizer
from shared.messages import GenerateJob, TokenLogprob
from tests.unit.gateway.inference.builders import (
    BOS,
    KEY,
    FakeOwner,
    delta,
    finished,
    make_model,
    make_route,
    say_hello,
    serving,
)

MODEL = "acme/tiny"
HI: Any = [{"role": "user", "content": "hi"}]


def client(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


async def post(url: str, path: str, body: Any, **more: Any) -> tuple[int, Any, Any]:
    headers = {"Authorization": f"Bearer {KEY}", **more}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + path, json=body, headers=headers) as response,
    ):
        return response.status, await response.read(), response.headers


async def ask_by_socket(url: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A kept-alive connection with little room, whose reading is the caller's."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return reader, writer


@asynccontextmanager
async def streaming(url: str, path: str, **body: Any) -> AsyncIterator[aiohttp.ClientResponse]:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as session,
        session.post(url + path, json={"model": MODEL, "stream": True, **body}) as response,
    ):
        yield response


# ---- whole answers


async def test_models_are_listed_and_found(tmp_path: Path) -> None:
    async with serving(FakeOwner(say_hello), tmp_path) as url, client(url) as ai:
        listed = [model async for model in ai.models.list()]
        found = await ai.models.retrieve(MODEL)
        assert [model.id for model in listed] == [found.id] == [MODEL]
        assert (found.owned_by, found.created) == ("acme", 1_700_000_000)
        with pytest.raises(openai.NotFoundError) as caught:
            await ai.models.retrieve("acme/other")
        assert caught.value.code == "model_not_found"


async def test_chat_is_answered_whole(tmp_path: Path) -> None:
    owner = FakeOwner(say_hello)
    async with serving(owner, tmp_path) as url, client(url) as ai:
        answer = await ai.chat.completions.create(
            model="tiny", messages=HI, n=2, seed=5, stop=["END"], temperature=0, logprobs=True, top_logprobs=2,
            user="someone", metadata={"a": "b"}, store=False, extra_body={"top_k": 4, "min_p": 0.1},
        )  # fmt: skip
    assert [choice.message.content for choice in answer.choices] == ["Hello!", "Hello!"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert answer.model == MODEL
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len("b" + "user: hi" + "e\nassistant: "),
        12,
    )
    assert answer.usage.to_dict()["roundhouse"] == {
        "queue_ms": 1.0,
        "swap_ms": 2.0,
        "prefill_ms": 3.0,
        "decode_ms": 4.0,
    }
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == "Hello!"
    assert [bytes(entry.bytes or b"") for entry in logprobs.content] == [b"H", b"e", b"l", b"l", b"o", b"!"]
    assert {len(entry.top_logprobs) for entry in logprobs.content} == {2}
    (job,) = owner.jobs
    assert job.prompt_tokens[0] == BOS
    assert (job.choices, job.stop, job.max_tokens) == (2, ["END"], 100)
    assert (job.sampling.seed, job.sampling.top_k, job.sampling.min_p, job.sampling.temperature) == (
        5,
        4,
        0.1,
        0.0,
    )
    assert owner.voided == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": MODEL, "prompt": "x"}),
        ("/v1/chat/completions", {"model": MODEL, "messages": HI}),
        ("/models/acme/tiny/completions", {"prompt": "x"}),
    ],
)
async def test_every_sampling_field_reaches_the_job(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    owner = FakeOwner(say_hello)
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": -0.3, "logit_bias": {"5": -2.5}, "seed": 11, "min_tokens": 2, "ignore_eos": True,
    }  # fmt: skip
    more = {"n": 2, "stop": ["END"], "stop_token_ids": [9], "max_tokens": 12, "bad_words": ["A", " B"]}
    async with serving(owner, tmp_path) as url:
        status, answer, _ = await post(url, path, {**body, **fields, **more})
    assert status == 200, answer
    (job,) = owner.jobs
    sent = msgspec.to_builtins(job.sampling)
    assert {name: sent[name] for name in fields} == {**fields, "logit_bias": [(5, -2.5)]}
    assert (job.choices, job.stop, job.stop_token_ids, job.max_tokens) == (2, ["END"], [9], 12)
    spell = load_tokenizer(tmp_path).spell
    assert [b"".join(map(spell, ids)) for ids in job.sampling.bad_words] == [b"A", b" A", b" B"]


def test_sync_client_works_unchanged(tmp_path: Path) -> None:
    async def serve_while(ask: Any) -> Any:
        async with serving(FakeOwner(say_hello), tmp_path) as url:
            return await asyncio.to_thread(ask, url)

    def ask(url: str) -> tuple[str | None, str]:
        with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as ai:
            whole = ai.chat.completions.create(model=MODEL, messages=HI)
            stream = ai.completions.create(model=MODEL, prompt="hi", stream=True)
            return whole.choices[0].message.content, "".join(chunk.choices[0].text for chunk in stream)

    assert asyncio.run(serve_while(ask)) == ("Hello!", "Hello!")


async def test_several_prompts_are_several_jobs_and_one_answer(tmp_path: Path) -> None:
    async def slow_first(job: GenerateJob, stream: OwnedStream) -> None:
        await asyncio.sleep(0.05 if job.sampling.seed == 10 else 0)
        for choice in range(job.choices):
            stream.push(delta(f"{job.sampling.seed}.{choice}", choice, "length"))
        stream.push(finished(8, "length", "length"))

    owner = FakeOwner(slow_first)
    async with serving(owner, tmp_path) as url, client(url) as ai:
        answer = await ai.completions.create(model=MODEL, prompt=["one", "two"], n=2, seed=10, echo=True)
    assert [(c.index, c.text) for c in answer.choices] == [
        (0, "one10.0"),
        (1, "one10.1"),
        (2, "two12.0"),
        (3, "two12.1"),
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 16)
    assert [job.max_tokens for job in owner.jobs] == [16, 16]


async def test_token_prompt_is_echoed_with_its_logprobs(tmp_path: Path) -> None:
    async def score(job: GenerateJob, stream: OwnedStream) -> None:
        assert job.sampling.echo_logprobs
        stream.push(delta("c", job=job, finish="length"))
        scores = tuple(TokenLogprob(token=token, logprob=-2.0) for token in job.prompt_tokens[1:])
        stream.push(finished(1, "length", prompt_logprobs=scores))

    async with serving(FakeOwner(score), tmp_path) as url, client(url) as ai:
        answer = await ai.completions.create(
            model=MODEL, prompt=[64, 65], echo=True, logprobs=1, max_tokens=1
        )
    assert answer.choices[0].text == "abc"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (
        ["a", "b", "c"],
        [None, -2.0, -0.5],
        [0, 1, 2],
    )


# ---- streams


@pytest.mark.parametrize("n", [1, 2])
async def test_chat_stream_ends_with_usage_when_asked(tmp_path: Path, n: int) -> None:
    owner = FakeOwner(say_hello)
    async with serving(owner, tmp_path) as url, client(url) as ai:
        stream = await ai.chat.completions.create(
            model=MODEL, messages=HI, n=n, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
        chunks = [chunk async for chunk in stream]
    texts = [""] * n
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello!"] * n
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"] * n
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6 * n
    assert owner.voided == []


async def test_several_prompts_stream_side_by_side(tmp_path: Path) -> None:
    async with serving(FakeOwner(say_hello), tmp_path) as url, client(url) as ai:
        stream = await ai.completions.create(model=MODEL, prompt=["a", "b"], n=2, stream=True, echo=True)
        texts = [""] * 4
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == ["aHello!", "aHello!", "bHello!", "bHello!"]


async def test_what_arrives_together_is_written_together(tmp_path: Path) -> None:
    async def burst(job: GenerateJob, stream: OwnedStream) -> None:
        for char in "Hello!":
            stream.push(delta(char))
        stream.push(finished(6, "stop"))

    async with (
        serving(FakeOwner(burst), tmp_path) as url,
        streaming(url, "/v1/completions", prompt="x") as response,
    ):
        chunks = [data async for data, _ in response.content.iter_chunks()]
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-request-id"].startswith("req_")
        assert response.headers["x-ratelimit-limit-requests"] == "400"
    assert len(chunks) == 1
    assert chunks[0].endswith(b"data: [DONE]\n\n")


async def test_waiting_stream_shows_life(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def wait(job: GenerateJob, stream: OwnedStream) -> None:
        await go.wait()
        await say_hello(job, stream)

    times = StreamTimes(headers_after_s=0.05, sign_of_life_s=0.05)
    async with (
        asyncio.timeout(5),
        serving(FakeOwner(wait), tmp_path, times=times) as url,
        streaming(url, "/v1/chat/completions", messages=HI) as response,
    ):
        seen = [await response.content.readuntil(b"\n\n") for _ in range(2)]
        go.set()
        rest = await response.read()
    assert seen == [b": waiting\n\n"] * 2
    assert rest.count(b'"role":"assistant"') == 1
    assert rest.endswith(b"data: [DONE]\n\n")


async def test_error_before_the_first_byte_has_its_status(tmp_path: Path) -> None:
    async def expire(job: GenerateJob, stream: OwnedStream) -> None:
        stream.push(finished(0, outcome="expired", code="deadline_exceeded"))

    async with serving(FakeOwner(expire), tmp_path) as url:
        for more in ({}, {"stream": True}):
            status, body, headers = await post(
                url, "/v1/chat/completions", {"model": MODEL, "messages": HI, **more}
            )
            assert (status, json.loads(body)["error"]["code"]) == (504, "deadline_exceeded")
            assert headers["x-should-retry"] == "false"


async def test_error_after_a_token_is_the_streams_last_event(tmp_path: Path) -> None:
    sent = asyncio.Event()

    async def fail(job: GenerateJob, stream: OwnedStream) -> None:
        stream.push(delta("Hel"))
        await sent.wait()
        stream.push(delta("lo"))
        stream.push(finished(5, outcome="failed", code="poison"))

    owner = FakeOwner(fail)
    async with serving(owner, tmp_path) as url, client(url) as ai:
        text = ""
        with pytest.raises(openai.APIError, match="given up") as caught:
            async for chunk in await ai.chat.completions.create(model=MODEL, messages=HI, stream=True):
                text += chunk.choices[0].delta.content or ""
                if text:
                    sent.set()
    assert text == "Hello"
    assert caught.value.code == "poison"
    assert owner.voided == []  # the worker's failure says it all: nothing is charged


async def test_failed_stream_is_closed_without_its_usual_end(tmp_path: Path) -> None:
    async def fail(job: GenerateJob, stream: OwnedStream) -> None:
        stream.push(delta("Hello"))
        await asyncio.sleep(0.05)
        stream.push(finished(5, outcome="expired"))

    async with serving(FakeOwner(fail), tmp_path) as url, asyncio.timeout(5):
        reader, writer = await ask_by_socket(url, {"model": MODEL, "prompt": "x", "stream": True})
        answer = await reader.read()
        writer.close()
    assert b"Hello" in answer
    assert b"deadline_exceeded" in answer.split(b"\n\n")[-2]
    assert answer.endswith(b"\r\n0\r\n\r\n")
    assert b"[DONE]" not in answer


async def test_one_failed_prompt_fails_the_request_and_voids_the_others(tmp_path: Path) -> None:
    async def half(job: GenerateJob, stream: OwnedStream) -> None:
        if job.sampling.seed == 1:
            await asyncio.sleep(0.05)
            stream.push(finished(0, outcome="failed", code="worker_lost"))
        elif job.sampling.seed == 0:
            await say_hello(job, stream)

    owner = FakeOwner(half)
    async with serving(owner, tmp_path) as url:
        body = {"model": MODEL, "prompt": ["a", "b", "c"], "seed": 0}
        status, answer, headers = await post(url, "/v1/completions", body)
    assert (status, json.loads(answer)["error"]["code"]) == (503, "worker_lost")
    assert "Retry-After" in headers
    done, running = owner.jobs[0].job_id, owner.jobs[2].job_id
    assert sorted(owner.voided) == sorted([(done, "failed", 0), (running, "failed", 0)])


# ---- clients that leave


@pytest.mark.parametrize(
    ("path", "more"), [("chat/completions", {"messages": HI}), ("completions", {"prompt": ["a"]})]
)
async def test_client_that_leaves_a_stream_is_charged_for_what_it_saw(
    tmp_path: Path, path: str, more: Any
) -> None:
    async def endless(job: GenerateJob, stream: OwnedStream) -> None:
        stream.push(delta("Hello"))
        await asyncio.sleep(60)

    owner = FakeOwner(endless)
    async with serving(owner, tmp_path) as url:
        async with streaming(url, f"/v1/{path}", **more) as response:
            await response.content.readuntil(b"Hello")
            response.close()
        await asyncio.wait_for(owner.was_voided.wait(), 5)
    assert owner.voided == [(owner.jobs[0].job_id, "client_gone", 5)]


async def test_tokens_whose_text_was_held_back_are_not_delivered(tmp_path: Path) -> None:
    async def hold_back(job: GenerateJob, stream: OwnedStream) -> None:
        stream.push(delta("Hello"))
        await asyncio.sleep(0.05)
        held = delta("EN")
        stream.push(type(held)(0, "", held.tokens, (), None))
        await asyncio.sleep(0.05)
        stream.push(delta(" D") if job.sampling.seed else type(held)(0, "", (5,), (), None))
        await asyncio.sleep(60)

    async def delivered(seed: int, until: bytes) -> int:
        owner = FakeOwner(hold_back)
        async with serving(owner, tmp_path) as url:
            async with streaming(url, "/v1/completions", prompt="x", seed=seed) as response:
                await response.content.readuntil(until)
                await asyncio.sleep(0.2)
                response.close()
            await asyncio.wait_for(owner.was_voided.wait(), 5)
        return owner.voided[0][2]

    assert await delivered(0, b"Hello") == 5
    assert await delivered(1, b" D") == 5 + 2 + 2


async def test_client_that_leaves_before_the_answer_is_voided_with_nothing(tmp_path: Path) -> None:
    async def endless(job: GenerateJob, stream: OwnedStream) -> None:
        stream.push(delta("Hello"))
        await asyncio.sleep(60)

    owner = FakeOwner(endless)
    async with serving(owner, tmp_path) as url:
        asking = asyncio.create_task(post(url, "/v1/completions", {"model": MODEL, "prompt": ["a", "b"]}))
        async with asyncio.timeout(10):
            while len(owner.jobs) < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # its tokens are there
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(owner.was_voided.wait(), 5)
    assert sorted(owner.voided) == sorted((job.job_id, "client_gone", 0) for job in owner.jobs)


async def test_client_that_does_not_read_is_let_go(tmp_path: Path) -> None:
    async def flood(job: GenerateJob, stream: OwnedStream) -> None:
        for _ in range(400):
            stream.push(delta("x" * 100_000))
            await asyncio.sleep(0)
        await asyncio.sleep(60)

    owner = FakeOwner(flood)
    async with serving(owner, tmp_path, times=StreamTimes(write_s=0.2)) as url:
        reader, writer = await ask_by_socket(url, {"model": MODEL, "prompt": "x", "stream": True})
        await asyncio.wait_for(owner.was_voided.wait(), 10)
        writer.close()
        del reader
    ((_, reason, delivered),) = owner.voided
    assert reason == "client_gone"
    assert 0 < delivered < 400 * 100_000


# ---- the per-model URL


async def test_vendor_answer_and_stream(tmp_path: Path) -> None:
    owner = FakeOwner(say_hello)
    async with serving(owner, tmp_path) as url:
        path = f"/models/{MODEL}/completions"
        whole = {"text": "hi ", "length": 7, "stop_sequences": ["x"], "n": 2, "echo": True, "logprobs": 1}
        status, body, _ = await post(url, path, whole)
        assert status == 200
        answer = json.loads(body)
        assert [entry["completion"] for entry in answer["result"]] == ["hi Hello!"] * 2
        assert isinstance(answer["timestamp"], int)
        assert (owner.jobs[0].max_tokens, owner.jobs[0].stop) == (7, ["x"])

        status, body, _ = await post(url, path, {"prompt": "hi", "stream": True})
        blocks = [block.split("\n") for block in body.decode().removesuffix("\n\n").split("\n\n")]
        assert [(name, unquote(data.removeprefix("data: "))) for name, data in blocks] == [
            ("event: update", "Hel"),
            ("event: update", "Hello!"),
            ("event: end", "Hello!"),
        ]


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (must_not_retry(ApiError(409, "resource_off", "off")), 404),
        (must_not_retry(ApiError(409, "no_resource", "none")), 404),
        (ApiError(402, "spend_limit_reached", "no credit"), 403),
        (ApiError(503, "resource_starting", "soon", retry_after_s=9), 503),
    ],
)
async def test_vendor_statuses_differ_where_the_vendors_did(
    tmp_path: Path, refusal: ApiError, status: int
) -> None:
    async with serving(FakeOwner(say_hello), tmp_path, route=refusal) as url:
        found, body, headers = await post(url, f"/models/{MODEL}/completions", {"prompt": "x"})
        assert (found, json.loads(body)["error"]["code"]) == (status, refusal.code)
        assert headers.get("x-should-retry") == refusal.headers.get("x-should-retry")
        assert headers.get("Retry-After") == refusal.headers.get("Retry-After")
        found, _, _ = await post(url, "/v1/completions", {"model": MODEL, "prompt": "x"})
        assert found == refusal.status
        assert (await post(url, f"/models/{MODEL}/completions?key={KEY}", {"prompt": "x"}, Authorization=""))[
            0
        ] == 401


# ---- refusals


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", {"model": "acme/other", "messages": HI}, 404, "model_not_found"),
        ("/v1/chat/completions", {"model": "../../etc", "messages": HI}, 404, "model_not_found"),
        (
            "/v1/chat/completions",
            {"model": MODEL, "messages": HI, "max_tokens": 2048},
            400,
            "context_length_exceeded",
        ),
        ("/v1/completions", {"model": MODEL, "prompt": "x" * 5000}, 400, "context_length_exceeded"),
        ("/v1/completions", {"model": MODEL, "prompt": [300]}, 400, "invalid_token_id"),
        ("/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 0}, 400, "invalid_value"),
        ("/v1/completions", [], 400, "invalid_json"),
        ("/v1/images/generations", {"model": MODEL, "prompt": "x"}, 404, "not_found"),
        ("/v1/responses", {"model": MODEL, "input": "x"}, 404, "not_found"),
        ("/models/acme/other/completions", {"prompt": "x"}, 404, "model_not_found"),
    ],
)
async def test_refusal_is_json_with_a_code_and_starts_no_job(
    tmp_path: Path, path: str, body: Any, status: int, code: str
) -> None:
    owner = FakeOwner(say_hello)
    async with serving(owner, tmp_path) as url:
        found, answer, headers = await post(url, path, body)
    assert (found, json.loads(answer)["error"]["code"]) == (status, code)
    assert headers["x-request-id"]
    assert owner.jobs == []


async def test_refused_submit_reaches_the_client(tmp_path: Path) -> None:
    owner = FakeOwner(say_hello)

    async def full(job: Any, queue: Any) -> OwnedStream:
        if job.sampling.seed == 0:
            return await FakeOwner.submit(owner, job, queue)
        raise ApiError(429, "queue_full", "The resource's queue is full.", retry_after_s=2)

    owner.submit = full  # type: ignore[method-assign]
    async with serving(owner, tmp_path) as url:
        for prompt in ("a", ["a", "b"]):
            body = {"model": MODEL, "prompt": prompt, "seed": 1 if prompt == "a" else 0}
            status, answer, headers = await post(url, "/v1/completions", body)
            assert (status, json.loads(answer)["error"]["code"]) == (429, "queue_full")
            assert headers["Retry-After"] == "2"
    # Of two prompts one was accepted: its answer goes to nobody.
    assert owner.voided == [(owner.jobs[0].job_id, "failed", 0)]


async def test_pool_jobs_are_billed_by_the_token(tmp_path: Path) -> None:
    owner = FakeOwner(say_hello)
    model, route = make_model(team_slug="platform", team_id="team_0"), make_route(pool=True)
    route = type(route)(route.resource, "ppt")
    async with serving(owner, tmp_path, model=model, route=route) as url:
        assert (await post(url, "/v1/completions", {"model": "platform/tiny", "prompt": "x"}))[0] == 200
    assert (owner.jobs[0].billing, owner.jobs[0].team_id, owner.jobs[0].model.name) == (
        "ppt",
        "team_1",
        "platform/tiny",
    )
