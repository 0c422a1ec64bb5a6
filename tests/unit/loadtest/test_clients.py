"""What a client counts of an answer that was cut."""

from __future__ import annotations

import pytest

from loadtest.clients import tokens_shown

WHOLE = ["The", " sea", " is", " w", "ide", ""]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("The", 1),
        ("The s", 1),
        ("The sea", 2),
        ("The sea is w", 4),
        ("The sea is wide", 6),
        ("The lake", 1),
        ("A sea", 0),
    ],
)
def test_a_cut_text_counts_the_tokens_that_it_shows_whole(text: str, count: int) -> None:
    assert tokens_shown(text, WHOLE) == count


def test_without_the_whole_answer_nothing_is_counted() -> None:
    assert tokens_shown("The sea", []) is None
