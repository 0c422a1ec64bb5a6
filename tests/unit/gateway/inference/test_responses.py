from __future__ import annotations

import json
import math
from typing import Any
from urllib.parse import unquote

import jsonschema  # type: ignore[import-untyped]
import pytest

from services.gateway.inference import schemas
from services.gateway.inference.frames import ChatFrames, CompletionFrames, VendorFrames
from services.gateway.owner import TextDelta
from shared.inference.errors import ApiError, must_not_retry
from shared.inference.responses import (
    Choice,
    Echo,
    Head,
    TextOffsets,
    chat_body,
    chat_logprobs,
    completion_body,
    completion_logprobs,
    usage_of,
    vendor_body,
)
from shared.messages import Timings, TokenLogprob

HEAD = Head("req_0123", 1_700_000_000, 'acme/"tiny"', 3)
SPELLINGS = {1: b"a", 2: b"\xe6\xbc", 3: b"\xa2", 4: b"a", 5: b"bc"}
USAGE = usage_of(3, 4, [Timings(queue_ms=1.0, decode_ms=9.0), Timings(queue_ms=2.0, decode_ms=1.23456)])
AWKWARD = 'a"\\\n\u2028\x1f</script>🎉漢'


def events(data: bytes) -> list[Any]:
    """Parse server-sent events as a browser does; each `data` is JSON except the last marker."""
    found = []
    for block in data.decode().split("\n\n"):
        lines = [line.removeprefix("data: ") for line in block.split("\n") if line.startswith("data: ")]
        if lines:
            text = "\n".join(lines)
            found.append(text if text == "[DONE]" else json.loads(text))
    return found


def delta(text: str, *entries: TokenLogprob, finish: str | None = None) -> TextDelta:
    return TextDelta(0, text, (1,), entries, finish)


def test_usage_sums_tokens_and_shows_the_slowest_job() -> None:
    assert USAGE["total_tokens"] == 7
    assert USAGE["roundhouse"] == {"queue_ms": 2.0, "swap_ms": 0.0, "prefill_ms": 0.0, "decode_ms": 9.0}


def test_bodies_fit_their_schemas() -> None:
    entry = TokenLogprob(token=5, logprob=-0.1, top=[(5, -0.1), (1, -math.inf)])
    choices = [Choice([AWKWARD, "b"], [entry], "stop"), Choice(["c"], [], "length")]
    echoes = [Echo("echo ", 1, [entry]), None]
    chat = json.loads(chat_body(HEAD, choices, USAGE, spellings=SPELLINGS))
    completion = json.loads(completion_body(HEAD, choices, USAGE, spellings=SPELLINGS, echoes=echoes))
    vendor = json.loads(vendor_body(choices, 5, spellings=SPELLINGS, echoes=echoes))
    jsonschema.validate(chat, schemas.CHAT_COMPLETION)
    jsonschema.validate(completion, schemas.COMPLETION)
    jsonschema.validate(vendor, schemas.VENDOR_COMPLETION)
    assert chat["id"] == "chatcmpl-0123"
    assert [choice["message"]["content"] for choice in chat["choices"]] == [AWKWARD + "b", "c"]
    assert completion["choices"][0]["text"] == f"echo {AWKWARD}b"
    assert vendor["result"][0]["completion"] == f"echo {AWKWARD}b"
    assert json.loads(chat_body(HEAD, choices, USAGE, spellings=None))["choices"][0]["logprobs"] is None
    assert "logprobs" not in json.loads(vendor_body(choices, 5, spellings=None, echoes=echoes))["result"][0]


def test_impossible_token_has_a_number_for_its_logprob() -> None:
    found = chat_logprobs([TokenLogprob(token=1, logprob=-math.inf)], SPELLINGS)
    assert found["content"][0]["logprob"] == -9999.0


def test_completion_logprobs_show_the_drawn_token_among_the_top() -> None:
    entries = [
        TokenLogprob(token=1, logprob=-3.0, top=[(5, -0.1), (4, -1.0)]),
        TokenLogprob(token=5, logprob=-0.2),
    ]
    found = completion_logprobs(entries, SPELLINGS, TextOffsets(10))
    assert found["tokens"] == ["a", "bc"]
    assert found["token_logprobs"] == [-3.0, -0.2]
    # Tokens 1 and 4 have the same text: the likelier is shown.
    assert found["top_logprobs"] == [{"bc": -0.1, "a": -1.0}, {"bc": -0.2}]
    assert found["text_offset"] == [10, 11]


def test_offsets_count_a_character_of_several_tokens_once() -> None:
    entries = [TokenLogprob(token=token, logprob=-1.0) for token in (1, 2, 3, 5)]
    assert completion_logprobs(entries, SPELLINGS, TextOffsets())["text_offset"] == [0, 1, 1, 2]


def test_echoed_prompt_comes_first_and_its_first_token_has_no_logprob() -> None:
    echo = Echo("abc", 1, [TokenLogprob(token=5, logprob=-0.5)])
    found = completion_logprobs([TokenLogprob(token=4, logprob=-1.0)], SPELLINGS, TextOffsets(), echo)
    assert found == {
        "tokens": ["a", "bc", "a"],
        "token_logprobs": [None, -0.5, -1.0],
        "top_logprobs": [None, {"bc": -0.5}, {"a": -1.0}],
        "text_offset": [0, 1, 3],
    }


def test_chat_token_carries_its_exact_bytes() -> None:
    (entry,) = chat_logprobs([TokenLogprob(token=2, logprob=-1.0)], SPELLINGS)["content"]
    assert (entry["token"], entry["bytes"]) == ("\ufffd", [0xE6, 0xBC])


@pytest.mark.parametrize("include_usage", [False, True])
def test_chat_stream_reads_back_as_it_was_written(include_usage: bool) -> None:
    frames = ChatFrames(HEAD, 2, include_usage=include_usage, with_logprobs=False)
    data = (
        frames.begin() + frames.delta(1, delta(AWKWARD), {}) + frames.delta(0, delta("x", finish="stop"), {})
    )
    data += frames.delta(1, delta("", finish="length"), {}) + frames.end(USAGE)
    found = events(data)
    assert found[-1] == "[DONE]"
    chunks = found[:-2] if include_usage else found[:-1]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-0123"}
    assert {chunk["model"] for chunk in chunks} == {HEAD.model}
    assert [(c["index"], c["delta"], c["finish_reason"]) for chunk in chunks for c in chunk["choices"]] == [
        (0, {"role": "assistant", "content": "", "refusal": None}, None),
        (1, {"role": "assistant", "content": "", "refusal": None}, None),
        (1, {"content": AWKWARD}, None),
        (0, {"content": "x"}, None),
        (0, {}, "stop"),
        (1, {}, "length"),
    ]
    assert [chunk.get("usage", "absent") for chunk in chunks] == [None if include_usage else "absent"] * 6
    if include_usage:
        assert found[-2]["choices"] == []
        assert found[-2]["usage"] == USAGE


def test_completion_stream_reads_back_as_it_was_written() -> None:
    frames = CompletionFrames(HEAD, ["", "prompt "], include_usage=True, with_logprobs=True)
    entry = TokenLogprob(token=5, logprob=-0.25)
    data = (
        frames.begin()
        + frames.delta(1, delta("bc", entry), SPELLINGS)
        + frames.delta(1, delta("bc", entry), SPELLINGS)
    )
    data += frames.delta(0, delta(AWKWARD, finish="length"), SPELLINGS) + frames.end(USAGE)
    choices = [choice for chunk in events(data)[:-2] for choice in chunk["choices"]]
    assert [(c["index"], c["text"], c["finish_reason"]) for c in choices] == [
        (1, "prompt ", None),
        (1, "bc", None),
        (1, "bc", None),
        (0, AWKWARD, "length"),
    ]
    assert [c["logprobs"]["text_offset"] for c in choices[1:3]] == [[7], [9]]


def test_held_back_text_makes_no_event() -> None:
    assert ChatFrames(HEAD, 1, include_usage=False, with_logprobs=False).delta(0, delta(""), {}) == b""
    assert (
        CompletionFrames(HEAD, [""], include_usage=False, with_logprobs=False).delta(0, delta(""), {}) == b""
    )
    assert VendorFrames("").delta(0, delta(""), {}) == b""
    # But its log-probabilities are not lost.
    entry = TokenLogprob(token=5, logprob=-0.25)
    assert b"-0.25" in ChatFrames(HEAD, 1, include_usage=False, with_logprobs=True).delta(
        0, delta("", entry), SPELLINGS
    )


def test_vendor_stream_repeats_the_text_so_far() -> None:
    frames = VendorFrames("p ")
    data = (
        frames.begin()
        + frames.delta(0, delta(AWKWARD), {})
        + frames.delta(0, delta("+&\n"), {})
        + frames.end(USAGE)
    )
    blocks = [block.split("\n") for block in data.decode().removesuffix("\n\n").split("\n\n")]
    assert [(name, unquote(text.removeprefix("data: "))) for name, text in blocks] == [
        ("event: update", "p "),
        ("event: update", f"p {AWKWARD}"),
        ("event: update", f"p {AWKWARD}+&\n"),
        ("event: end", f"p {AWKWARD}+&\n"),
    ]


def test_error_event_is_openais() -> None:
    error = must_not_retry(ApiError(504, "deadline_exceeded", "Too late."))
    data = ChatFrames(HEAD, 1, include_usage=False, with_logprobs=False).error(error)
    expected = {"message": "Too late.", "type": "server_error", "param": None, "code": "deadline_exceeded"}
    assert events(data) == [{"error": expected}]
