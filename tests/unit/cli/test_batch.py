"""What `roundhouse batch` reads from a file before it sends it, and what it says of a batch's pace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.cli.batch import pace_of
from services.cli.batch_file import first_url
from services.cli.client import CliError

LINE = b'{"custom_id": "a", "url": "/v1/completions"}'


@pytest.mark.parametrize("content", [LINE, b"\xef\xbb\xbf" + LINE, b"\n \r\n" + LINE + b"\nmore"])
def test_the_first_line_names_the_endpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lines").write_bytes(content)
    assert first_url(tmp_path / "lines") == "/v1/completions"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"not json", b"[1]", b'{"custom_id": "a"}', b"\xff\xfe"])
def test_a_file_without_an_endpoint_is_refused_before_it_is_sent(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lines").write_bytes(content)
    with pytest.raises(CliError, match="first line"):
        first_url(tmp_path / "lines")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CliError, match="cannot be read"):
            first_url(path)


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        ({"waiting_for": "the team's resource is off"}, "waits: the team's resource is off"),
        ({}, ""),
        (
            {"expected_finish_at": 1125, "lines_per_s": 7.5, "tokens_per_s": 300.0},
            "7.5 lines/s, 300 tokens/s, 2:05 left",
        ),
        (
            {"expected_finish_at": 900, "lines_per_s": 7.5, "tokens_per_s": 3.0},
            "7.5 lines/s, 3 tokens/s, 0:00 left",
        ),
    ],
)
def test_the_pace_in_words(progress: dict[str, Any], words: str) -> None:
    known = {"waiting_for": None, "expected_finish_at": None, "lines_per_s": 0.0, "tokens_per_s": 0.0}
    assert pace_of({"roundhouse": known | progress}, 1000.0) == words
