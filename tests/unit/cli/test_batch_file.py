"""How a file of lines is cut into messages of the queue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.cli.batch_file import message_of, parts_of
from services.cli.client import CliError
from shared.queue_format import MAX_LINES, MAX_SUBMISSION_BYTES, Submission, read_submission


def line(custom_id: str, model: str = "m", **body: Any) -> str:
    made = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": model, **body},
    }
    return json.dumps(made)


def messages(path: Path, text: bytes) -> list[list[str]]:
    """The ids of the lines of each message, all of which the format takes."""
    path.write_bytes(text)
    found = []
    for part in parts_of(path):
        read = read_submission(message_of(path, part, f"id/{part.number}", "30m"))
        assert isinstance(read, Submission) and (read.id, read.completion_window) == (
            f"id/{part.number}",
            "30m",
        )
        assert len(read.lines) == part.lines
        found.append([json.loads(bytes(each))["custom_id"] for each in read.lines])
    return found


def test_byte_order_mark_line_ends_and_empty_lines_are_as_in_a_file(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf\n" + "\r\n\n \r\n".join(line(name) for name in ("a", "\u00e4", "c")).encode()
    assert messages(tmp_path / "f", text) == [["a", "\u00e4", "c"]]
    spread = line("d").replace(", ", ",\r").encode()
    assert messages(tmp_path / "f", spread) == [["d"]]


def test_a_message_has_so_many_lines_and_no_more(tmp_path: Path) -> None:
    names = [str(n) for n in range(2 * MAX_LINES + 1)]
    cut = messages(tmp_path / "f", "\n".join(line(name) for name in names).encode())
    assert [len(each) for each in cut] == [MAX_LINES, MAX_LINES, 1]
    assert [name for each in cut for name in each] == names


def test_a_message_has_so_many_bytes_and_no_more(tmp_path: Path) -> None:
    size = MAX_SUBMISSION_BYTES // 4
    cut = messages(tmp_path / "f", "\n".join(line(str(n), prompt="x" * size) for n in range(7)).encode())
    assert [len(each) for each in cut] == [3, 3, 1]


def test_each_message_has_one_model(tmp_path: Path) -> None:
    text = "\n".join([line("a", "one"), line("b", "one"), line("c", "two"), line("d", "one")])
    assert messages(tmp_path / "f", text.encode()) == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n \n",
        b"nonsense",
        b"[1]",
        b"{}",
        b'{"url": "/v1"}',
        b"\xff",
        b"[" * 100_000,
        b'{"url": 1, "body": 1}',
    ],
)
def test_what_is_no_line_is_refused_before_anything_is_sent(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(CliError):
        messages(tmp_path / "f", text)


def test_a_line_over_its_bound_is_named(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="line 2 "):
        messages(tmp_path / "f", (line("a") + "\n" + line("b", prompt="x" * (1 << 20))).encode())
