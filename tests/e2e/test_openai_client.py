"""The real `openai` package against the running system, as a new user would use it."""

from __future__ import annotations

import itertools
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import openai
import pytest

from tests.e2e.conftest import System

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def client(system: System) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{system.url}/v1", api_key=system.api_key, max_retries=0)


def test_models_lists_the_teams_models_and_the_platforms(client: openai.OpenAI, system: System) -> None:
    names = [model.id for model in client.models.list()]
    assert system.model in names
    assert "demo/smollm2-135m-pirate" in names
    assert client.models.retrieve(system.model).object == "model"


def test_a_completion_is_answered_with_usage(client: openai.OpenAI, system: System) -> None:
    answer = client.completions.create(
        model=system.model, prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert "Paris" in answer.choices[0].text
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 8)
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_is_answered_and_stops_by_itself(client: openai.OpenAI, system: System) -> None:
    answer = client.chat.completions.create(
        model=system.model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=40,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_equals_the_whole_answer_and_ends_with_usage(client: openai.OpenAI, system: System) -> None:
    question: dict[str, Any] = {
        "model": system.model,
        "messages": [{"role": "user", "content": "Name three colours."}],
        "temperature": 0,
        "max_tokens": 32,
    }
    whole = client.chat.completions.create(**question)
    chunks = list(
        client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_the_async_client_streams_several_at_once(system: System) -> None:
    import asyncio

    async with openai.AsyncOpenAI(
        base_url=f"{system.url}/v1", api_key=system.api_key, max_retries=0
    ) as client:

        async def one(seed: int) -> str:
            stream = await client.completions.create(
                model=system.model, prompt="Once upon a time", max_tokens=24, seed=seed, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

        texts = await asyncio.gather(*(one(seed) for seed in (1, 2, 3, 1)))
    assert texts[0] == texts[3]
    assert len({texts[0], texts[1], texts[2]}) == 3


def test_n_logprobs_stop_and_echo(client: openai.OpenAI, system: System) -> None:
    answer = client.completions.create(
        model=system.model,
        prompt="One, two, three,",
        max_tokens=12,
        n=2,
        seed=5,
        logprobs=2,
        echo=True,
        stop=["six"],
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.text.startswith("One, two, three,")
        assert "six" not in choice.text
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens)[:16] == "One, two, three,"


def test_a_wrong_key_is_refused(system: System) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        openai.OpenAI(base_url=f"{system.url}/v1", api_key="sk-rh-" + "x" * 43).models.list()
    assert refused.value.code == "invalid_api_key"


def test_an_unknown_model_and_a_foreign_one_are_the_same(client: openai.OpenAI, system: System) -> None:
    bodies = []
    for name in ("demo/unknown", "platform/secret", "other/smollm2-135m-instruct"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.completions.create(model=name, prompt="x")
        assert refused.value.code == "model_not_found"
        bodies.append(refused.value.response.content)
    assert len(set(bodies)) == 1


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 100_000}, "context_length_exceeded", None),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"extra_body": {"frobnicate": 1}}, "unknown_parameter", "frobnicate"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
    ],
)
def test_bad_requests_name_the_field(
    client: openai.OpenAI, system: System, change: dict[str, Any], code: str, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": system.model, "prompt": "x", **change})
    assert refused.value.code == code
    if param is not None:
        assert refused.value.param == param


def test_the_per_model_url_answers_in_its_own_shape(system: System) -> None:
    answer = post(
        system,
        f"/models/{system.model}/completions",
        {"text": "The capital of France is", "length": 8, "temperature": 0},
    )
    assert "Paris" in answer["result"][0]["completion"]
    assert isinstance(answer["timestamp"], int | float)


def test_the_per_model_url_streams_updates_and_an_end(system: System) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "stream": True}
    with open_url(system, f"/models/{system.model}/completions", body) as answer:
        events = answer.read().decode().split("\n\n")
    updates = [event for event in events if event.startswith("event: update")]
    texts = [urllib.parse.unquote_plus(event.split("data: ", 1)[1]) for event in updates]
    assert "Paris" in texts[-1]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert any(event.startswith("event: end") for event in events)


def open_url(system: System, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(system.url + path, data=json.dumps(body).encode(), method="POST")
    request.add_header("Authorization", f"Bearer {system.api_key}")
    request.add_header("Content-Type", "application/json")
    return urllib.request.urlopen(request, timeout=60)


def post(system: System, path: str, body: dict[str, Any]) -> dict[str, Any]:
    with open_url(system, path, body) as answer:
        return dict(json.load(answer))
