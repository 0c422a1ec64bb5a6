from __future__ import annotations

import typing
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from shared.inference import parameters
from shared.inference.errors import ApiError
from shared.inference.parameters import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    MAX_TOKENS,
    VENDOR_FIELDS,
    GenerationRequest,
    parse_chat,
    parse_completion,
    parse_vendor,
)
from shared.inference.rules import IntegerIn, NumberIn, Only

MESSAGES = [{"role": "user", "content": "hi"}]
COMPLETION = {"model": "acme/tiny", "prompt": "hi"}
CHAT = {"model": "acme/tiny", "messages": MESSAGES}
VENDOR = {"prompt": "hi"}
DOORS: dict[str, tuple[Any, dict[str, Any], Any, Any]] = {
    "completion": (lambda body: parse_completion(body, random_seed=7), COMPLETION, COMPLETION_FIELDS, parameters.completion_schema()),
    "chat": (lambda body: parse_chat(body, random_seed=7), CHAT, CHAT_FIELDS, parameters.chat_schema()),
    "vendor": (lambda body: parse_vendor(body, model="m", random_seed=7), VENDOR, VENDOR_FIELDS, parameters.vendor_schema()),
}  # fmt: skip
# What a field needs beside it to be taken.
COMPANIONS: dict[str, dict[str, Any]] = {
    "min_tokens": {"max_tokens": MAX_TOKENS},
    "top_logprobs": {"logprobs": True},
}
NEEDS_ECHO = ("completion", "max_tokens", 0)


def numeric_fields() -> list[Any]:
    return [
        pytest.param(door, name, field.rule, id=f"{door}-{name}")
        for door, (_, _, table, _) in DOORS.items()
        for name, field in table.items()
        if isinstance(field.rule, IntegerIn | NumberIn)
    ]


def parse(door: str, **fields: Any) -> GenerationRequest:
    function, body, _, _ = DOORS[door]
    request: GenerationRequest = function({**body, **fields})
    return request


def is_valid(door: str, **fields: Any) -> bool:
    _, body, _, schema = DOORS[door]
    return bool(jsonschema.Draft202012Validator(schema).is_valid({**body, **fields}))


def refusal(door: str, **fields: Any) -> tuple[str, str | None]:
    with pytest.raises(ApiError) as caught:
        parse(door, **fields)
    assert caught.value.status == 400
    return caught.value.code, caught.value.param


@pytest.mark.parametrize(("door", "name", "rule"), numeric_fields())
def test_number_is_taken_at_its_limits_and_refused_beyond(
    door: str, name: str, rule: IntegerIn | NumberIn
) -> None:
    step = 1 if isinstance(rule, IntegerIn) else 1e-6
    lowest = rule.low + step if isinstance(rule, NumberIn) and rule.low_excluded else rule.low
    beyond = [rule.high + step, rule.low if lowest != rule.low else rule.low - step, 10**19]
    for value in (lowest, rule.high):
        companions = {"n": value} if name == "best_of" else COMPANIONS.get(name, {})
        if (door, name, value) == NEEDS_ECHO:
            companions = {"echo": True}
        parse(door, **{**companions, name: value})
        assert is_valid(door, **{**companions, name: value})
    for value in beyond:
        assert refusal(door, **{name: value}) == ("invalid_value", name)
        assert not is_valid(door, **{name: value})


@pytest.mark.parametrize(("door", "name", "rule"), numeric_fields())
def test_number_of_another_type_is_refused_by_name(door: str, name: str, rule: IntegerIn | NumberIn) -> None:
    wrong: list[Any] = [True, "5", [], {}, [1]] + ([5.0] if isinstance(rule, IntegerIn) else [])
    for value in wrong:
        assert refusal(door, **{name: value}) == ("invalid_type", name)
        assert value == 5.0 or not is_valid(door, **{name: value})  # JSON Schema calls 5.0 an integer


@pytest.mark.parametrize("door", DOORS)
def test_nan_is_refused_for_numbers(door: str) -> None:
    assert refusal(door, temperature=float("nan")) == ("invalid_value", "temperature")
    assert refusal(door, temperature=float("inf")) == ("invalid_value", "temperature")


@pytest.mark.parametrize("door", DOORS)
def test_null_means_absent(door: str) -> None:
    _, body, table, _ = DOORS[door]
    nulls = {name: None for name in table if name not in body}
    assert parse(door, **nulls) == parse(door)
    assert is_valid(door, **nulls)


@pytest.mark.parametrize(
    ("table", "theirs"),
    [
        (CHAT_FIELDS, (chat_params.CompletionCreateParamsBase, chat_params.CompletionCreateParamsStreaming)),
        (COMPLETION_FIELDS, (completion_params.CompletionCreateParamsBase, completion_params.CompletionCreateParamsStreaming)),
    ],
)  # fmt: skip
def test_every_field_of_openais_schema_is_known(table: dict[str, Any], theirs: tuple[Any, ...]) -> None:
    names = {name for kind in theirs for name in typing.get_type_hints(kind)}
    assert len(names) > 15
    assert names <= set(table)


@pytest.mark.parametrize(
    ("door", "name"),
    [
        (door, name)
        for door, (_, _, table, _) in DOORS.items()
        for name, f in table.items()
        if isinstance(f.rule, Only)
    ],
)
def test_unbuilt_field_takes_only_what_changes_nothing(door: str, name: str) -> None:
    rule = DOORS[door][2][name].rule
    for value in rule.values:
        assert parse(door, **{name: value}) == parse(door)
    for value in ("something", {"a": 1}, [{}], 17):
        assert refusal(door, **{name: value}) == ("unsupported_parameter", name)
        assert not is_valid(door, **{name: value})


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"tool_choice": "auto"}, "unsupported_parameter", "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"service_tier": "flex"}, "unsupported_parameter", "service_tier"),
        ({"parallel_tool_calls": True}, "unsupported_parameter", "parallel_tool_calls"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_tokens"),
        ({"min_tokens": 4, "max_tokens": 3}, "invalid_value", "min_tokens"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream": 1}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"usage": 1}}, "unknown_parameter", "stream_options.usage"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
        ({"stream": True, "stream_options": []}, "invalid_type", "stream_options"),
        ({"model": None}, "missing_parameter", "model"),
        ({"model": ""}, "invalid_value", "model"),
        ({"model": 5}, "invalid_type", "model"),
        ({"api_base": "x"}, "unknown_parameter", "api_base"),
        ({"__class__": "x"}, "unknown_parameter", "__class__"),
        ({"a" * 500: 1}, "unknown_parameter", "a" * 64),
        ({"stop": ["a"] * 5}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": ["a", "b" * 65]}, "invalid_value", "stop[1]"),
        ({"stop": [1]}, "invalid_type", "stop[0]"),
        ({"stop": 1}, "invalid_type", "stop"),
        ({"bad_words": ["a"] * 65}, "invalid_value", "bad_words"),
        ({"bad_words": ["a", ""]}, "invalid_value", "bad_words[1]"),
        ({"bad_words": ["b" * 65]}, "invalid_value", "bad_words[0]"),
        ({"bad_words": [[1, 2]]}, "invalid_type", "bad_words[0]"),
        ({"stop_token_ids": [1] * 65}, "invalid_value", "stop_token_ids"),
        ({"stop_token_ids": [True]}, "invalid_type", "stop_token_ids[0]"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids[0]"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"abc": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"01": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5"),
        ({"logit_bias": {"5": "1"}}, "invalid_type", "logit_bias.5"),
        ({"logit_bias": [1]}, "invalid_type", "logit_bias"),
        ({"metadata": {str(i): "" for i in range(17)}}, "invalid_metadata", "metadata"),
        ({"metadata": {"a" * 65: ""}}, "invalid_metadata", "metadata"),
        ({"metadata": {"a": "b" * 513}}, "invalid_metadata", "metadata"),
        ({"metadata": {"a": {"b": "c"}}}, "invalid_metadata", "metadata"),
        ({"metadata": "a"}, "invalid_type", "metadata"),
        ({"user": 5}, "invalid_type", "user"),
        ({"messages": None}, "missing_parameter", "messages"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": []}, "invalid_messages", "messages"),
        ({"messages": MESSAGES * 1025}, "invalid_messages", "messages"),
        ({"messages": ["hi"]}, "invalid_type", "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "missing_parameter", "messages[0].role"),
        ({"messages": [{"role": 5, "content": "hi"}]}, "invalid_type", "messages[0].role"),
        ({"messages": [{"role": "root", "content": "hi"}]}, "invalid_messages", "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "unsupported_parameter", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_parameter", "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "invalid_messages", "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "invalid_type", "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_parameter",
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_type", "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]}, "unknown_parameter",
         "messages[0].content[0].b"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "unknown_parameter", "messages[0].weight"),
        ({"messages": [{"role": "user", "content": "a", "name": "a b"}]}, "invalid_value", "messages[0].name"),
        ({"messages": [{"role": "user", "content": "a", "name": 5}]}, "invalid_type", "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "unsupported_parameter",
         "messages[0].tool_calls"),
    ],
)  # fmt: skip
def test_chat_body_is_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    assert refusal("chat", **fields) == (code, param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": None}, "missing_parameter", "prompt"),
        ({"prompt": 5}, "invalid_type", "prompt"),
        ({"prompt": ""}, "empty_prompt", "prompt"),
        ({"prompt": " \n"}, "empty_prompt", "prompt"),
        ({"prompt": []}, "empty_prompt", "prompt"),
        ({"prompt": [[]]}, "empty_prompt", "prompt[0]"),
        ({"prompt": ["a", ""]}, "empty_prompt", "prompt[1]"),
        ({"prompt": ["a", 1]}, "invalid_type", "prompt[1]"),
        ({"prompt": [1, "a"]}, "invalid_type", "prompt"),
        ({"prompt": [1, 2.0]}, "invalid_type", "prompt"),
        ({"prompt": [True]}, "invalid_type", "prompt"),
        ({"prompt": [-1]}, "invalid_token_id", "prompt"),
        ({"prompt": [2**31]}, "invalid_token_id", "prompt"),
        ({"prompt": ["a"] * 17}, "too_many_prompts", "prompt"),
        ({"prompt": [[1]] * 17}, "too_many_prompts", "prompt"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"best_of": 1, "n": 2}, "invalid_value", "best_of"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"stream": True, "echo": True, "logprobs": 1}, "unsupported_combination", "logprobs"),
        ({"messages": MESSAGES}, "unknown_parameter", "messages"),
    ],
)
def test_completion_body_is_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    assert refusal("completion", **fields) == (code, param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": None}, "missing_parameter", "prompt"),
        ({"prompt": ["a"]}, "invalid_type", "prompt"),
        ({"text": "other"}, "invalid_value", "text"),
        ({"max_tokens": 3, "length": 4}, "invalid_value", "length"),
        ({"stop": "a", "stop_sequences": ["b"]}, "invalid_value", "stop_sequences"),
        ({"stream": True, "n": 2}, "unsupported_combination", "n"),
        ({"key": "sk-x"}, "unknown_parameter", "key"),
    ],
)
def test_vendor_body_is_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    assert refusal("vendor", **fields) == (code, param)


def test_vendor_aliases_mean_the_same() -> None:
    theirs = parse_vendor({"text": "hi", "length": 9, "stop_sequences": ["x"]}, model="m", random_seed=7)
    assert theirs == parse_vendor({"prompt": "hi", "max_tokens": 9, "stop": "x"}, model="m", random_seed=7)


def test_chat_content_parts_are_joined_and_developer_speaks_as_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    echoed: dict[str, Any] = {
        "role": "assistant",
        "content": "c",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    request = parse("chat", messages=[{"role": "developer", "content": parts}, echoed])
    assert [(m.role, m.content) for m in request.messages] == [("system", "ab"), ("assistant", "c")]


def test_defaults_are_openais() -> None:
    request = parse("completion")
    assert (request.max_tokens, request.n, request.sampling.temperature, request.sampling.top_p) == (
        16,
        1,
        1.0,
        1.0,
    )
    assert request.sampling.seed == 7
    assert parse("chat").max_tokens is None
    assert parse("completion", seed=0).sampling.seed == 0
    assert parse("completion", top_k=-1).sampling.top_k == 0


@pytest.mark.parametrize("door", DOORS)
def test_bad_words_are_kept_until_their_tokens_are_known(door: str) -> None:
    request = parse(door, bad_words=["one", " two"])
    assert (request.bad_words, request.sampling.bad_words) == (("one", " two"), [])
    spelled = request.with_bad_words([[1], (2, 3)])
    assert spelled.sampling.bad_words == [[1], [2, 3]]
    assert spelled.sampling.seed == request.sampling.seed
    assert parse(door).bad_words == parse(door, bad_words=[]).bad_words == ()


def test_chat_logprobs_ask_for_the_drawn_token_alone_without_top() -> None:
    assert parse("chat", logprobs=True).sampling.logprobs == 0
    assert parse("chat", logprobs=True, top_logprobs=4).sampling.logprobs == 4
    assert parse("chat", logprobs=False).sampling.logprobs is None


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_json_is_parsed_or_refused_with_400(data: st.DataObject) -> None:
    door = data.draw(st.sampled_from(sorted(DOORS)))
    names = st.sampled_from(sorted(DOORS[door][2]))
    fields = data.draw(st.dictionaries(names, JSON_VALUES, max_size=3))
    try:
        parse(door, **fields)
    except ApiError as error:
        assert error.status == 400
        assert error.param
    else:
        assert is_valid(door, **fields)
