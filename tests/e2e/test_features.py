"""Embeddings and the finer sampling fields, from the real `openai` package to the real engine and back."""

from __future__ import annotations

import base64
import math
import struct
import time
from collections.abc import Sequence
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from services.worker.engine.images.image_file import open_image
from tests.e2e.conftest import System

pytestmark = pytest.mark.timeout(300)

TEXTS = (
    "A dog sleeps in the sun.",
    "The puppy is lying outside on a warm day.",
    "Interest rates were raised by a quarter of a point.",
)


@pytest.fixture
def client(system: System) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{system.url}/v1", api_key=system.api_key, max_retries=0)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.fixture(scope="module")
def states(system: System) -> list[torch.Tensor]:
    """transformers' own last hidden states of each text, in fp32."""
    folder = system.layout.models / "smollm2-135m-instruct"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0].clone() for text in TEXTS]


# ---- embeddings


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_models_own_states(
    client: openai.OpenAI, system: System, states: list[torch.Tensor], pooling: str
) -> None:
    answer = client.embeddings.create(
        model=system.model, input=list(TEXTS), user="tester", extra_body={"pooling": pooling}
    )
    assert [each.index for each in answer.data] == [0, 1, 2]
    for each, rows in zip(answer.data, states, strict=True):
        wanted = rows.mean(dim=0) if pooling == "mean" else rows[-1]
        assert math.hypot(*each.embedding) == pytest.approx(1.0, abs=1e-5)
        assert cosine(each.embedding, wanted.tolist()) > 0.995  # the engine computes in a lower precision
    assert answer.usage.prompt_tokens == sum(map(len, states)) == answer.usage.total_tokens


def test_like_texts_are_closer_than_unlike_ones(client: openai.OpenAI, system: System) -> None:
    vectors = [
        each.embedding for each in client.embeddings.create(model=system.model, input=list(TEXTS)).data
    ]
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2])


def test_forms_of_input_and_answer_mean_the_same(client: openai.OpenAI, system: System) -> None:
    def embed(given: Any, **more: Any) -> list[Any]:
        return [
            each.embedding for each in client.embeddings.create(model=system.model, input=given, **more).data
        ]

    by_text = embed(TEXTS[0])[0]
    assert embed(list(TEXTS))[0] == embed([TEXTS[0]])[0] == by_text
    assert embed(TEXTS[0], encoding_format="float")[0] == by_text
    packed = embed(TEXTS[0], encoding_format="base64")[0]
    assert list(struct.unpack(f"<{len(by_text)}f", base64.b64decode(packed))) == by_text
    short = embed(TEXTS[0], dimensions=64)[0]
    assert short == pytest.approx([value / math.hypot(*by_text[:64]) for value in by_text[:64]], abs=1e-6)
    ids = [[504, 3365], [504]]
    both = embed(ids)
    assert both == [embed(ids[0])[0], embed(ids[1])[0]]


def test_many_inputs_are_answered_in_order_beside_a_stream(client: openai.OpenAI, system: System) -> None:
    """More than one job's worth, while the same worker answers a chat."""
    texts = [f"Number {number} of many." for number in range(150)]
    stream = client.completions.create(
        model=system.model, prompt="Once upon a time", max_tokens=64, seed=1, stream=True
    )
    first = next(iter(stream))
    vectors = [each.embedding for each in client.embeddings.create(model=system.model, input=texts).data]
    rest = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert first.choices and rest
    assert len(vectors) == len(texts)
    for number in (0, 63, 64, 149):
        [alone] = client.embeddings.create(model=system.model, input=texts[number]).data
        assert cosine(alone.embedding, vectors[number]) > 0.9999


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"input": ""}, "empty_prompt", "input"),
        ({"input": "word " * 4000}, "context_length_exceeded", "input"),
        ({"input": [10**6]}, "invalid_token_id", "input"),
        ({"dimensions": 60_000}, "invalid_dimensions", "dimensions"),
        ({"encoding_format": "int8"}, "invalid_value", "encoding_format"),
        ({"extra_body": {"stream": True}}, "unknown_parameter", "stream"),
    ],
)
def test_a_bad_request_names_the_field(
    client: openai.OpenAI, system: System, change: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(**{"model": system.model, "input": "x", **change})
    assert (refused.value.code, refused.value.param) == (code, param)


# ---- sampling


QUESTION: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}


def complete(client: openai.OpenAI, system: System, **more: Any) -> Any:
    return client.completions.create(model=system.model, **{**QUESTION, **more})


def test_a_bad_word_is_not_said(client: openai.OpenAI, system: System) -> None:
    assert "Paris" in complete(client, system).choices[0].text
    answer = complete(client, system, n=2, extra_body={"bad_words": ["Paris"]})
    assert not any("Paris" in choice.text for choice in answer.choices)
    chat = client.chat.completions.create(
        model=system.model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=20,
        temperature=0,
        extra_body={"bad_words": ["Paris", "PARIS"]},
    )
    assert "Paris" not in (chat.choices[0].message.content or "")


def test_a_token_that_is_pushed_is_said_and_one_that_is_banned_is_not(
    client: openai.OpenAI, system: System
) -> None:
    scored = complete(client, system, logprobs=1, max_tokens=1).choices[0]
    assert scored.logprobs is not None and scored.text == " Paris"
    paris = 7042
    assert (
        "Paris" not in complete(client, system, logit_bias={str(paris): -100}, max_tokens=1).choices[0].text
    )
    pushed = complete(client, system, prompt="Two and two is", logit_bias={str(paris): 100}, max_tokens=3)
    assert pushed.choices[0].text == " Paris" * 3


def test_a_prompt_is_scored_without_an_answer(client: openai.OpenAI, system: System) -> None:
    answer = complete(client, system, max_tokens=0, echo=True, logprobs=2)
    [choice] = answer.choices
    assert choice.text == QUESTION["prompt"]
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value is not None and value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 0)


@pytest.mark.parametrize("knob", [{"top_k": 1}, {"min_p": 1.0}])
def test_a_draw_from_one_token_is_the_greedy_one(
    client: openai.OpenAI, system: System, knob: dict[str, Any]
) -> None:
    greedy = complete(client, system).choices[0].text
    assert complete(client, system, temperature=1.5, seed=9, extra_body=knob).choices[0].text == greedy


def test_penalties_change_an_answer_that_repeats_itself(client: openai.OpenAI, system: System) -> None:
    prompt = "one two one two one two one two one two"
    free = complete(client, system, prompt=prompt).choices[0].text
    for penalty in (
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"extra_body": {"repetition_penalty": 2.0}},
    ):
        assert complete(client, system, prompt=prompt, **penalty).choices[0].text != free, penalty


def test_an_answer_is_as_long_as_min_tokens_say(client: openai.OpenAI, system: System) -> None:
    def count(**more: Any) -> int:
        usage = complete(client, system, extra_body=more).usage
        assert usage is not None
        return int(usage.completion_tokens)

    paris = 7042
    assert count(stop_token_ids=[paris]) == 1
    assert count(stop_token_ids=[paris], min_tokens=5) > 4
    assert count(ignore_eos=True) == 12


# ---- models


def test_every_model_gets_its_image_before_anybody_asks_for_it(system: System) -> None:
    """The worker was told of all; one was loaded from its folder at the start. Models that were removed have none to wait for."""
    images = system.layout.home / "images"
    listed = list(system.platform.list("/api/models", team="demo"))
    assert len(listed) >= 3 and not any(model.get("base") for model in listed)
    deadline_s = time.monotonic() + 240
    for model in listed:
        while not (found := list(images.glob(f"{model['model_id']}-{model['revision']}-*.image"))):
            assert time.monotonic() < deadline_s, f"{model['name']} has none"
            time.sleep(0.5)
        [image] = found
        open_image(image).verify()
