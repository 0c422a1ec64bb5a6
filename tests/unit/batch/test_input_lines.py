"""What a line of an input file is, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.batch.input_lines import (
    MAX_LINE_BYTES,
    MAX_LINES,
    MAX_PROBLEMS,
    FileCheck,
    FileLine,
    LineSplitter,
    read_body,
)

URL = "/v1/chat/completions"


def line(custom_id: Any = "a", **changes: Any) -> bytes:
    values = {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"model": "m", "messages": []}}
    return json.dumps(values | changes).encode()


def split(*pieces: bytes) -> list[FileLine]:
    splitter = LineSplitter()

    def lines() -> Iterator[FileLine]:
        for piece in pieces:
            yield from splitter.feed(piece)
        yield from splitter.close()

    return list(lines())


def check(content: bytes) -> FileCheck:
    judged = FileCheck(URL)
    for each in split(content):
        if judged.full:
            break
        judged.add(each)
    judged.finish()
    return judged


# ---- lines


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"one\ntwo\n", [(1, 0, b"one"), (2, 4, b"two")]),
        (b"one\ntwo", [(1, 0, b"one"), (2, 4, b"two")]),
        (b"one\r\ntwo\r\n", [(1, 0, b"one"), (2, 5, b"two")]),
        (b"\xef\xbb\xbfone\ntwo", [(1, 3, b"one"), (2, 7, b"two")]),
        (b"\n\none\n  \t\r\ntwo\n\n", [(3, 2, b"one"), (5, 11, b"two")]),
        (b"one\n\xef\xbb\xbftwo", [(1, 0, b"one"), (2, 4, b"\xef\xbb\xbftwo")]),
        (b"", []),
        (b"\n\r\n \n", []),
        (b"\xef\xbb\xbf", []),
    ],
)
def test_lines_are_numbered_and_found_where_they_lie(
    content: bytes, lines: list[tuple[int, int, bytes]]
) -> None:
    found = split(content)
    assert [(each.number, each.offset, each.content) for each in found] == lines
    assert all(content[each.offset : each.offset + each.length] == each.content for each in found)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\r", b"")), max_size=8), st.data())
def test_how_a_file_is_cut_into_pieces_changes_nothing(parts: list[bytes], data: Any) -> None:
    content = b"\n".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    assert split(*pieces) == split(content)


def test_a_line_that_is_too_long_is_let_go_and_the_next_one_is_found() -> None:
    content = b"x" * (MAX_LINE_BYTES + 1) + b"\nnext\n"
    long, after = split(*(content[at : at + 100_000] for at in range(0, len(content), 100_000)))
    assert (long.number, long.content) == (1, None)
    assert (after.number, after.content) == (2, b"next")
    assert content[after.offset : after.offset + after.length] == b"next"


def test_a_line_of_exactly_the_limit_is_taken() -> None:
    content = b"y" * MAX_LINE_BYTES
    assert [each.length for each in split(content + b"\r\n", content)] == [MAX_LINE_BYTES, MAX_LINE_BYTES]


# ---- what is wrong


@pytest.mark.parametrize(
    ("content", "code", "number"),
    [
        (b"", "empty_file", None),
        (b"\n\n", "empty_file", None),
        (line() + b"\n{broken\n", "invalid_json_line", 2),
        (line() + b"\n[1]\n", "invalid_json_line", 2),
        (b'{"custom_id": "\xff\xfe"}', "invalid_json_line", 1),
        (line()[:-3] + b'\xff"}}', "invalid_json_line", 1),
        (line().replace(b'"messages": []', b'"messages": "\xff"'), "invalid_json_line", 1),
        (b"\xff\xfe{\x00", "invalid_json_line", 1),
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}', "invalid_json_line", 1),
        (line(custom_id=7), "invalid_json_line", 1),
        (line(body="text"), "invalid_json_line", 1),
        (line(body={"messages": []}), "invalid_json_line", 1),
        (line(body={"model": 3}), "invalid_json_line", 1),
        (line(""), "invalid_custom_id", 1),
        (line("x" * 257), "invalid_custom_id", 1),
        (line("a\x00b"), "invalid_custom_id", 1),
        (line("a") + b"\n\n" + line("b") + b"\n" + line("a"), "duplicate_custom_id", 4),
        (line(method="GET"), "invalid_method", 1),
        (line(url="/v1/completions"), "url_mismatch", 1),
        (line("a") + b"\r\n" + line("b", body={"model": "other"}), "model_mismatch", 2),
        (line("x" * MAX_LINE_BYTES), "line_too_large", 1),
    ],
)
def test_a_problem_has_its_code_and_line(content: bytes, code: str, number: int | None) -> None:
    problems = check(content).problems
    assert [(problem.code, problem.line) for problem in problems] == [(code, number)]
    assert len(problems[0].message) <= 320


def test_one_bad_line_among_many_is_the_only_one_named() -> None:
    lines = [line(str(index)) for index in range(10_000)]
    lines[6_999] = lines[6_999][:-1]
    judged = check(b"\n".join(lines))
    assert [(problem.code, problem.line) for problem in judged.problems] == [("invalid_json_line", 7_000)]


def test_problems_are_bounded() -> None:
    judged = check(b"{\n" * 1000)
    assert len(judged.problems) == MAX_PROBLEMS
    assert judged.problems[-1].line == MAX_PROBLEMS


def test_a_file_with_one_line_too_many_is_refused_whole() -> None:
    at_limit = b"\n".join(line(str(index)) for index in range(MAX_LINES))
    assert len(check(at_limit).accepted) == MAX_LINES
    assert not check(at_limit).problems
    over = check(at_limit + b"\n" + line("more"))
    assert [(problem.code, problem.line) for problem in over.problems] == [("too_many_tasks", None)]


def test_good_lines_are_kept_with_their_place() -> None:
    content = line("first") + b"\r\n\n" + line("zw\u00f6lf")
    judged = check(content)
    assert judged.model == "m" and not judged.problems
    assert [(each.number, each.custom_id) for each in judged.accepted] == [(1, "first"), (3, "zw\u00f6lf")]
    for each in judged.accepted:
        raw = content[each.offset : each.offset + each.length]
        assert json.loads(read_body(raw)) == {"model": "m", "messages": []}
